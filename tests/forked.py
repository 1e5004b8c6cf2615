"""Processes that begin with everything imported: forks of one server, where a fresh interpreter imports for seconds.

The server starts with the first of them and ends with the process that it serves. What it forks is as new as any
process to the code under test: no thread, no random state and no process group of the tests is in it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["vqkernels.models", "accelerate", "torch._dynamo", "torch.utils.tensorboard", "pytest"])
LONGEST = 400  # seconds, of all ranks


def _begin(target: Callable[..., None], errors: Path | None, environment: dict[str, str], *args: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        target(*args)
    except BaseException:
        if errors is not None:
            errors.write_text(traceback.format_exc())
        sys.exit(1)


def start(
    target: Callable[..., None],  # of a module, as for any process
    *args: Any,
    errors: Path | None = None,  # where a traceback goes
    environment: dict[str, str] | None = None,
) -> ForkServerProcess:
    process = SERVER.Process(target=_begin, args=(target, errors, environment or {}, *args))
    process.start()
    return process


def run_ranks(
    target: Callable[..., None],  # of a module; called with the rank and args
    ranks: int,
    *args: Any,
    environment: Callable[[int], dict[str, str]] = lambda rank: {},
) -> None:
    """Ends when all of them have; where one fails, the others are stopped.

    Raises:
        AssertionError: one of them fails, with its traceback; or it takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.txt" for rank in range(ranks)]
        started = [
            start(target, rank, *args, errors=files[rank], environment=environment(rank)) for rank in range(ranks)
        ]
        running = {each.sentinel: each for each in started}
        while running:
            ended = multiprocessing.connection.wait(running, LONGEST)
            failed = [running.pop(each).exitcode for each in ended]
            if not ended or any(failed):
                for each in running.values():
                    each.kill()
                found = [file.read_text() for file in files if file.exists()]
                raise AssertionError(
                    "\n".join(found)[-3000:] or f"a rank ends with {failed}, or none within {LONGEST} s"
                )
