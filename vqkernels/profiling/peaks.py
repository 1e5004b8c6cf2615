"""What the machine can do at most, measured in the same run as the kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..benchmarks.peaks import SGEMM, SGEMM_SIZE, SGEMM_SIZE_CUDA
from ..benchmarks.peaks import Peaks as Rounds

COPIED_BYTES = 256 << 20  # far beyond any cache of a CPU
COPIED_BYTES_CUDA = 1 << 30
CACHED_BYTES = 256 << 10  # per thread, read and written: inside the second-level cache of today's CPUs
CALLS = 5


@dataclass(frozen=True)
class Peaks:
    """Ceilings of the roofline: multiply-adds count as two operations, a copied byte as one read and one written."""

    rates: dict[str, float]  # FLOP/s by number format, the fastest first
    bandwidth: float  # bytes/s to memory
    cache_bandwidth: float | None  # bytes/s inside the second-level cache; None on a GPU
    method: dict[str, str]  # how each was measured


def _best_seconds(action: Callable[[], object], device: torch.device) -> float:
    """The quickest of several calls: a peak is what nothing disturbed."""
    action()
    best = float("inf")
    for _ in range(CALLS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _copy_rate(count: int, device: torch.device, *, repeats: int = 1) -> float:  # bytes/s
    """Bytes read and written a second by a copy of ``count`` bytes."""
    source = torch.ones(count // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(repeats):
            target.copy_(source)

    return 2 * source.nbytes * repeats / _best_seconds(copy, device)


def _half_product_rate(device: torch.device) -> float:  # FLOP/s
    size = SGEMM_SIZE_CUDA
    a, b = (torch.randn(size, size, device=device).half() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device)


def _on_cuda(rounds: Rounds, device: torch.device) -> Peaks:
    rates = {"float16": _half_product_rate(device), "float32": rounds.medians()[SGEMM]}
    method = {
        "rates": f"torch.mm of {SGEMM_SIZE_CUDA} x {SGEMM_SIZE_CUDA}, float32 without TF32",
        "bandwidth": f"copy of {COPIED_BYTES_CUDA >> 20} MiB, read and written bytes, best of {CALLS}",
    }
    return Peaks(rates, _copy_rate(COPIED_BYTES_CUDA, device), None, method)


def measure_peaks(rounds: Rounds, device: torch.device, threads: int) -> Peaks:
    """Arithmetic ceilings out of the rounds in which the kernels were timed, and the bandwidth of copies.

    Args:
        rounds: the bench's probe, after its last round and with its sgemm's timing.
        device: cpu or cuda.
        threads: CPU threads in force.
    """
    if device.type == "cuda":
        return _on_cuda(rounds, device)
    rates = {name: rate for name, rate in rounds.medians().items() if rate > 0}  # 0: the CPU has no such pass
    sgemm = rates.pop(SGEMM)
    how = "multiply-adds in registers alone, median of the rounds in which the kernels were timed"
    if not rates:
        how = f"torch.mm of {SGEMM_SIZE} x {SGEMM_SIZE}; the compiled kernels, which have a better probe, are not there"
    method = {
        "rates": how,
        "bandwidth": f"copy of {COPIED_BYTES >> 20} MiB, read and written bytes, best of {CALLS}",
        "cache_bandwidth": f"the same with {CACHED_BYTES >> 10} KiB per thread, again and again",
    }
    ordered = dict(sorted((rates or {"float32": sgemm}).items(), key=lambda item: -item[1]))
    cached = _copy_rate(CACHED_BYTES * threads, device, repeats=200)
    return Peaks(ordered, _copy_rate(COPIED_BYTES, device), cached, method)
