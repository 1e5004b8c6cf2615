"""How much each kernel has to compute and to move, by formula, and how near to the machine's limit it comes.

A kernel with F operations and B bytes can run at most at min(peak, bandwidth * F / B) operations a second
(Williams, Waterman and Patterson 2009, "Roofline"). B is the least that has to be read and written, once each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .peaks import Peaks

COARSE_BYTES = {"int16": 2, "float16": 2, "float32": 4, "float64": 8}  # of a number that the coarse pass multiplies


@dataclass(frozen=True)
class Sizes:
    """A problem in numbers."""

    tokens: int  # N
    codes: int  # K
    dim: int  # D
    bytes: int  # s, of a number of x


@dataclass(frozen=True)
class Work:
    """What one kernel has to do."""

    flops: int
    bytes: int
    flops_formula: str
    bytes_formula: str
    rate: str  # the ceiling that holds for it, a name in Peaks.rates


def _search(sizes: Sizes, ceiling: str) -> Work:
    n, k, d, s = sizes.tokens, sizes.codes, sizes.dim, sizes.bytes
    moved = "s (N D + K D) + 12 N: read x and codebook, write codes and distance"
    return Work(2 * n * k * d, s * (n * d + k * d) + 12 * n, "2 N K D", moved, ceiling)


def _coarse(sizes: Sizes, number: str, ceiling: str) -> Work:
    n, k, d, b = sizes.tokens, sizes.codes, sizes.dim, COARSE_BYTES[number]
    moved = f"{b} (N D + K D): read the tokens and codes that were packed as {number}"
    return Work(2 * n * k * d, b * (n * d + k * d), "2 N K D", moved, ceiling)


def _gather(sizes: Sizes) -> Work:
    n, d, s, rows = sizes.tokens, sizes.dim, sizes.bytes, min(sizes.tokens, sizes.codes)
    moved = "s (2 N D + min(N, K) D) + 12 N: read x, codes and codebook rows, write quantized and error"
    return Work(3 * n * d, s * (2 * n * d + rows * d) + 12 * n, "3 N D: (x - q)², summed", moved, "float32")


def _statistics(sizes: Sizes) -> Work:
    n, k, d, s = sizes.tokens, sizes.codes, sizes.dim, sizes.bytes
    moved = "s N D + 8 N + 4 K D + 4 K: read x and codes, write sums and counts"
    return Work(n * d, s * n * d + 8 * n + 4 * k * d + 4 * k, "N D", moved, "float32")


def _ema(sizes: Sizes) -> Work:
    k, d = sizes.codes, sizes.dim
    moved = "16 K D + 12 K: read sums, read and write embed_sum, write the codebook; cluster_size likewise"
    return Work(4 * k * d, 16 * k * d + 12 * k, "4 K D: decay, add, divide", moved, "float32")


def _backward(sizes: Sizes, rotation: bool) -> Work:
    n, d, s = sizes.tokens, sizes.dim, sizes.bytes
    flops, formula = (22, "22 N D: two norms, two products, the rotation") if rotation else (3, "3 N D: g + e (x - q)")
    moved = "4 s N D + 12 N: read x, quantized, dquantized and codes, write dx"
    return Work(flops * n * d, 4 * s * n * d + 12 * n, formula, moved, "float32")


def kernel_work(sizes: Sizes, *, coarse_pass: str | None, rotation: bool, rates: dict[str, float]) -> dict[str, Work]:
    """Operations and bytes of every kernel of a quantizer step.

    Args:
        sizes: the problem.
        coarse_pass: number format of the search's low-precision pass; "none" where there was no such pass, None where
            it is not known.
        rotation: whether the backward is the rotation trick's.
        rates: Peaks.rates; the search is held against the coarse pass's format, or the fastest where it is unknown.
    """
    fastest = next(iter(rates))
    ceiling = coarse_pass if coarse_pass in rates else "float32" if coarse_pass else fastest
    work = {"search": _search(sizes, ceiling)}
    if coarse_pass in COARSE_BYTES:
        work["coarse"] = _coarse(sizes, coarse_pass, ceiling)
    work |= {"gather": _gather(sizes), "statistics": _statistics(sizes), "ema": _ema(sizes)}
    return work | {"backward": _backward(sizes, rotation)}


def place(work: Work, seconds: float, peaks: Peaks) -> dict[str, Any]:
    """Where a kernel stands under the roofline, as the report's JSON holds it."""
    intensity, peak = work.flops / work.bytes, peaks.rates[work.rate]
    roof = min(peak, peaks.bandwidth * intensity)
    rate = work.flops / seconds
    return {
        "seconds": seconds,
        "flops": work.flops,
        "bytes": work.bytes,
        "flops_formula": work.flops_formula,
        "bytes_formula": work.bytes_formula,
        "intensity": intensity,
        "flops_per_second": rate,
        "bytes_per_second": work.bytes / seconds,
        "ceiling": work.rate if roof == peak else "bandwidth",
        "roof_flops_per_second": roof,
        "share_of_roof": rate / roof,
        "share_of_peak": rate / peak,
    }
