"""codebook_stats: how many tokens chose each code, and their sum.

counts_k = #{n : codes_n = k}      sums_k = sum of x_n over those n, always added in the same order
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .._dtypes import DTYPES, accumulation_dtype
from . import plain
from ._library import as_tokens, check_codes, define, run


def _run(x: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    return run("codebook_stats", x, codes, codebook_size)


def _fake(x: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    counts = x.new_empty((codebook_size,), dtype=accumulation_dtype(x.dtype))
    return counts, x.new_empty((codebook_size, x.shape[-1]), dtype=accumulation_dtype(x.dtype))


_codebook_stats = define("codebook_stats(Tensor x, Tensor codes, int codebook_size) -> (Tensor, Tensor)", _run, _fake)


add_statistics_ = define(  # for the modules, which collect them in buffers
    "add_statistics_(Tensor x, Tensor codes, Tensor(a!) counts, Tensor(b!)? sums) -> ()",
    partial(run, "add_statistics_"),
)


def codebook_stats(
    x: Tensor,  # [..., D]
    codes: Tensor,  # int64 [...]
    codebook_size: int,
) -> tuple[Tensor, Tensor]:  # counts [K], sums [K, D]
    """Counts and sums of the tokens of each code: the statistics of an EMA codebook and of a k-means step.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        codes: int64 [...] below ``codebook_size``; negative ones (padding, non-finite tokens) are left out.
        codebook_size: K.

    Returns:
        counts [K] and sums [K, D], float32 (float64 for float64 tokens); bitwise the same on every run and for any
        number of threads. Not differentiable.

    Raises:
        TypeError, ValueError: a bad argument, named. A code >= K raises on CPU; on CUDA, where looking would wait
            for the device, such a token is left out.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    check_codes(codes, x)
    if codebook_size < 1:
        raise ValueError(f"codebook_size: expected >= 1, got {codebook_size}")
    tokens = as_tokens(x.detach())
    stats = plain.codebook_stats if plain.active() else _codebook_stats
    return stats(tokens, codes.reshape(tokens.shape[:2]), codebook_size)
