"""How much each kernel has to compute and to move, by formula, and how near to the machine's limit it comes.

A kernel with F operations and B bytes can run at most at min(peak, bandwidth * F / B) operations a second
(Williams, Waterman and Patterson 2009, "Roofline"). B is the least that has to be read and written, once each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .peaks import Peaks
from .subject import StepOptions

COARSE_BYTES = {  # of a number that the coarse pass multiplies
    "byte": 1,
    "int8": 2,  # high and low
    "int16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
}


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


def _codebook_gradient(sizes: Sizes) -> Work:
    n, k, d, s = sizes.tokens, sizes.codes, sizes.dim, sizes.bytes
    moved = "s (2 N D + K D) + 12 N: read x, quantized, codes and derror, write dcodebook"
    return Work(3 * n * d, s * (2 * n * d + k * d) + 12 * n, "3 N D: e (q - x), summed", moved, "float32")


# The softmax over the codebook, without an array of N x K. Its exponentials are not counted.


def _sampling(sizes: Sizes) -> Work:
    n, k, d, s = sizes.tokens, sizes.codes, sizes.dim, sizes.bytes
    flops = "4 N K D: the logits for their sums of exponentials, and again for the running sums"
    moved = "s (N D + K D) + 8 N: read x and codebook, write codes"
    return Work(4 * n * k * d, s * (n * d + k * d) + 8 * n, flops, moved, "float32")


def _propagation(sizes: Sizes) -> Work:
    n, k, d, s = sizes.tokens, sizes.codes, sizes.dim, sizes.bytes
    flops = (
        "10 N K D: the logits for their sums of exponentials and again for the probabilities, the products of "
        "dquantized with the codes, dx and dcodebook"
    )
    moved = "s (3 N D + 2 K D) + 8 N: read x, dquantized, codes and codebook, write dx and dcodebook"
    return Work(10 * n * k * d, s * (3 * n * d + 2 * k * d) + 8 * n, flops, moved, "float32")


def _entropy_forward(sizes: Sizes, batch: bool) -> Work:
    n, k, d, s = sizes.tokens, sizes.codes, sizes.dim, sizes.bytes
    once = "2 N K D: the logits for their sums of exponentials and the entropies"
    twice = "4 N K D: the logits for their sums of exponentials, and again for the mean distribution"
    moved = "s (N D + K D) + 8 N + 4 K: read x and codebook, write each token's sum and entropy, and the code sums"
    if not batch:
        moved = "s (N D + K D) + 8 N: read x and codebook, write each token's sum and entropy"
    bytes_ = s * (n * d + k * d) + 8 * n + 4 * k * batch
    return Work((4 if batch else 2) * n * k * d, bytes_, twice if batch else once, moved, "float32")


def _entropy_backward(sizes: Sizes, learns: bool) -> Work:
    n, k, d, s = sizes.tokens, sizes.codes, sizes.dim, sizes.bytes
    rest = 4 * n + 4 * k
    if learns:
        moved = "s (2 N D + 2 K D) + 4 N + 4 K: read x, codebook, sums and upstream, write dx and dcodebook"
        bytes_ = s * (2 * n * d + 2 * k * d) + rest
        return Work(6 * n * k * d, bytes_, "6 N K D: the logits again, dx and dcodebook", moved, "float32")
    flops = "4 N K D: the logits again, and dx; a codebook of moving averages gets no gradient"
    moved = "s (2 N D + K D) + 4 N + 4 K: read x, codebook, sums and upstream, write dx"
    return Work(4 * n * k * d, s * (2 * n * d + k * d) + rest, flops, moved, "float32")


def _learning(sizes: Sizes, options: StepOptions) -> dict[str, Work]:
    """What follows the search, and how the gradient comes back."""
    work = {"sampling": _sampling(sizes)} if options.sampling_temperature else {}
    work["gather"] = _gather(sizes)
    if options.propagates:
        return work | {"propagation": _propagation(sizes)}
    if options.update == "ema":
        work |= {"statistics": _statistics(sizes), "ema": _ema(sizes)}
    else:
        work["codebook gradient"] = _codebook_gradient(sizes)
    return work | {"backward": _backward(sizes, options.gradient == "rotation")}


def kernel_work(
    sizes: Sizes, options: StepOptions, *, coarse_pass: str | None, rates: dict[str, float]
) -> dict[str, Work]:
    """Operations and bytes of every kernel of a quantizer step.

    Args:
        sizes: the problem.
        options: what the step is told.
        coarse_pass: number format of the search's low-precision pass; "none" where there was no such pass, None where
            it is not known.
        rates: Peaks.rates; the search is held against the coarse pass's format, or the fastest where it is unknown.
    """
    fastest = next(iter(rates))
    ceiling = coarse_pass if coarse_pass in rates else "float32" if coarse_pass else fastest
    work = {"search": _search(sizes, ceiling)}
    if coarse_pass in COARSE_BYTES:
        work["coarse"] = _coarse(sizes, coarse_pass, ceiling)
    work |= _learning(sizes, options)
    if options.entropy is not None:
        work["entropy forward"] = _entropy_forward(sizes, options.entropy.batch_weight > 0)
        work["entropy backward"] = _entropy_backward(sizes, options.update == "gradient")
    return work


def kmeans_work(sizes: Sizes, search: Work) -> dict[str, Work]:
    """Operations and bytes of the parts of one iteration of k-means; the assignment is a search."""
    n, k, d, s, w = sizes.tokens, sizes.codes, sizes.dim, sizes.bytes, max(sizes.bytes, 4)
    added = "s N D + 12 N + 8 K D + 16 K: read x, codes and distances, write sums, counts and inertia in float64"
    sums = Work(n * d, s * n * d + 12 * n + 8 * k * d + 16 * k, "N D", added, "float32")
    divided = f"{8 + 2 * w} K D + 16 K: read sums, counts and inertia, read and write the centroids"
    update = Work(k * d, (8 + 2 * w) * k * d + 16 * k, "K D: the division", divided, "float32")
    return {"k-means assignment": search, "k-means sums": sums, "k-means update": update}


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
