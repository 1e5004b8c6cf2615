"""A few cases of the fuzz on every backend, and proof that it would notice a wrong answer and a stale cache."""

from __future__ import annotations

import fuzz
import fuzz_inputs
import pytest
import torch
from requirements import skip_or_fail
from torch import Tensor

import vqkernels as vq
from vqkernels._extension import cpu_library
from vqkernels.backends import requested_backend

EXACT = vq.nearest
REFERENCE_AND_COMPILED = [fuzz.Run("reference"), fuzz.Run("compiled")]


@pytest.fixture(autouse=True)
def _small_and_compiled(monkeypatch):
    if (reason := cpu_library()) is not None:
        skip_or_fail("compiled", reason)
    monkeypatch.setattr(fuzz_inputs, "MOST_ELEMENTS", 100_000)
    monkeypatch.setattr(fuzz_inputs, "MOST_TIED", 5_000)


def _mismatches(cases: int) -> list[str]:
    found = fuzz.fuzz(7, range(cases), oracle_share=0.0, runs=REFERENCE_AND_COMPILED)
    return [text for _, wrong in found for text in wrong]


def test_every_backend_gives_one_answer():
    backends = set()
    for problem, wrong in fuzz.fuzz(2, range(24)):
        assert not wrong, "\n".join(wrong)
        backends |= {run.backend for run in problem.runs}
    assert {"reference", "compiled"} <= backends


def test_one_wrong_code_is_noticed(monkeypatch):
    def wrong_at_the_end(x: Tensor, codebook: Tensor, *, metric: str) -> tuple[Tensor, Tensor]:
        codes, distance = EXACT(x, codebook, metric=metric)
        if requested_backend() == "compiled" and codes.numel() > 40:
            codes.flatten()[-1] += 1
        return codes, distance

    assert _mismatches(25) == []
    monkeypatch.setattr(vq, "nearest", wrong_at_the_end)
    found = _mismatches(25)
    assert found
    assert all("1 of " in text and "compiled" in text for text in found)


def test_a_stale_codebook_is_noticed(monkeypatch):
    """A cache that trusts address, shape and torch's version counter misses writes through .data and NumPy."""
    kept: dict[tuple, Tensor] = {}

    def cached(x: Tensor, codebook: Tensor, *, metric: str) -> tuple[Tensor, Tensor]:
        if requested_backend() != "compiled" or codebook.is_inference():
            return EXACT(x, codebook, metric=metric)
        key = (codebook.data_ptr(), codebook._version, codebook.shape, codebook.stride())
        return EXACT(x, kept.setdefault(key, codebook.clone()), metric=metric)

    monkeypatch.setattr(vq, "nearest", cached)
    found = [text for text in _mismatches(40) if "codebook changed" in text]
    assert any("data" in text for text in found)
    assert any("numpy" in text or "swapped" in text or "one entry" in text for text in found)


def test_the_script_ends_with_1_and_says_how_to_see_it_again(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--seed", "7", "--only", "3", "--oracle", "1"])
    monkeypatch.setattr(fuzz, "available_runs", lambda: REFERENCE_AND_COMPILED)
    assert fuzz.main() == 0
    assert "1 of 1 cases, 0 with mismatches" in capsys.readouterr().out
    monkeypatch.setattr(
        vq, "nearest", lambda x, codebook, metric: (torch.full(x.shape[:-1], -1), torch.zeros(x.shape[:-1]))
    )
    assert fuzz.main() == 1
    assert "again: python tests/fuzz.py --seed 7 --only 3" in capsys.readouterr().out
