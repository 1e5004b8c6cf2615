"""The processes that tests start: a failing one is told, and does not leave the others waiting."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from forked import run_ranks


def fail_in_one(rank: int, message: str, file: str) -> None:
    if rank == 1:
        raise ValueError(message)
    time.sleep(300)
    Path(file).touch()


def begin_clean(rank: int) -> None:
    assert os.environ["RANK"] == str(rank)
    assert torch.get_num_threads() == 1
    assert not torch.distributed.is_initialized()


def test_the_failing_rank_is_named_and_the_others_are_stopped(tmp_path: Path):
    with pytest.raises(AssertionError, match="ValueError: no such thing"):
        run_ranks(fail_in_one, 2, "no such thing", str(tmp_path / "awake"))
    assert not (tmp_path / "awake").exists()


def test_ranks_begin_clean():
    run_ranks(begin_clean, 3, environment=lambda rank: {"RANK": str(rank)})
