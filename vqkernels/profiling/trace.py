"""A trace of one step for Perfetto, with a named range around each kernel; NVTX ranges too on a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MOST_OPERATORS = 12


@contextmanager
def named_range(name: str, device: torch.device) -> Iterator[None]:
    """A range that torch.profiler shows, and Nsight Systems where the device is a GPU."""
    with record_function(name):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield


@contextmanager
def _without_debug_lines() -> Iterator[None]:
    """torch 2.13 writes a line to stderr, below Python, whenever a profiler starts or stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def start(profiler: profile) -> None:
    """Begins recording."""
    with _without_debug_lines():
        profiler.start()


def stop(profiler: profile, device: torch.device) -> None:
    """Ends recording, with everything that the device was still busy with."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with _without_debug_lines():
        profiler.stop()


def make_profiler(device: torch.device) -> profile:
    """torch.profiler for the CPU, and for CUDA where the device is one."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return profile(activities=activities)


def _operators(profiler: profile, device: torch.device) -> list[dict[str, Any]]:
    """The operators and device kernels that took the most time of their own."""
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, own))[:MOST_OPERATORS]
    return [{"name": row.key, "calls": row.count, "seconds": getattr(row, own) / 1e6} for row in rows]


def write_trace(profiler: profile, path: Path, device: torch.device) -> list[dict[str, Any]]:
    """Writes a stopped profiler's trace as gzipped JSON; returns its most expensive operators."""
    profiler.export_chrome_trace(str(path))  # compresses where the name ends in .gz
    return _operators(profiler, device)


def trace_calls(calls: Mapping[str, Callable[[], object]], path: Path, device: torch.device) -> list[dict[str, Any]]:
    """Traces each call once, in a range of its name."""
    profiler = make_profiler(device)
    start(profiler)
    for name, call in calls.items():
        with named_range(f"vqkernels.{name}", device):
            call()
    stop(profiler, device)
    return write_trace(profiler, path, device)
