"""The road of tokens that the coarse pass could not prove: a float64 scan, then exact arithmetic between what ties.

A float64 sum of D squared differences is off by less than (D + 4) 2^-53 of itself, a float64 cosine by less than
(2 D + 8) 2^-53: one code inside that window of the best is the answer, among several the exact order decides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_arithmetic import compare_codes, cosine_of, row_dot
from .triton_common import row_offsets

UNIT64 = tl.constexpr(2.0**-53)
TIE_COSINE = tl.constexpr(2.0**-90)
NO_CODE = tl.constexpr((1 << 31) - 1)


@triton.jit
def tile_scores(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D] float32
    scale_ptr,  # [K] float64, 1 / |c|
    offset,
    stride_d,
    codes,  # [BLOCK_K] int32
    K,
    D,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_K] float64, small is near: |x - c|^2, or -|x| cos; inf past the last code."""
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    inside = codes < K
    rows = codes.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + offset + dims.to(tl.int64) * stride_d, mask=dims < D, other=0.0).to(tl.float64)[None, :]
        where = codebook_ptr + rows[:, None] + dims[None, :]
        c = tl.load(where, mask=inside[:, None] & (dims < D)[None, :], other=0.0).to(tl.float64)
        if COSINE:
            total -= x * c
        else:
            total += (x - c) * (x - c)
    score = tl.sum(total, 1)
    if COSINE:
        score *= tl.load(scale_ptr + codes, mask=inside, other=0.0)
    return tl.where(inside, score, float("inf"))


@triton.jit
def scan(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D] float32
    scale_ptr,  # [K] float64, 1 / |c|
    offset,
    stride_d,
    K,
    D,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The best float64 score, its code, and the best score of any other code."""
    best = tl.full([], float("inf"), tl.float64)
    second = tl.full([], float("inf"), tl.float64)
    code = tl.full([], 0, tl.int32)
    for start in range(0, K, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        score = tile_scores(x_ptr, codebook_ptr, scale_ptr, offset, stride_d, codes, K, D, COSINE, BLOCK_K, BLOCK_D)
        low = tl.min(score, 0)
        first = tl.min(tl.where(score == low, codes, NO_CODE), 0)
        others = tl.min(tl.where(codes == first, float("inf"), score), 0)
        second = tl.minimum(tl.maximum(best, low), tl.minimum(second, others))
        code = tl.where(low < best, first, code)
        best = tl.minimum(best, low)
    return best, second, code


@triton.jit
def differ_from(
    codebook_ptr,  # [K, D] float32
    codes,  # [BLOCK_K] int32
    code,
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_K] bool: the codes whose row is not ``code``'s; equal rows of higher index can never win."""
    differ = tl.zeros([BLOCK_K, BLOCK_D], tl.int32)
    rows = codes.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        inside = (codes < K)[:, None] & (dims < D)[None, :]
        c = tl.load(codebook_ptr + rows[:, None] + dims[None, :], mask=inside, other=0.0)
        one = tl.load(codebook_ptr + code.to(tl.int64) * D + dims, mask=dims < D, other=0.0)
        differ = tl.maximum(differ, (c != one[None, :]).to(tl.int32))
    return tl.max(differ, 1) > 0


@triton.jit
def closest_of_tied(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D] float32
    scale_ptr,  # [K] float64, 1 / |c|
    offset,
    stride_d,
    limit,  # float64 scalar
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The truly nearest among the codes whose score is within ``limit``, lowest index on equality."""
    winner = tl.full([], -1, tl.int32)
    for start in range(0, K, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        score = tile_scores(x_ptr, codebook_ptr, scale_ptr, offset, stride_d, codes, K, D, False, BLOCK_K, BLOCK_D)
        tied = score <= limit
        if winner >= 0:
            tied = tied & differ_from(codebook_ptr, codes, winner, K, D, BLOCK_K, BLOCK_D)
        code = tl.min(tl.where(tied, codes, NO_CODE), 0)
        while code < NO_CODE:
            if winner < 0:  # noqa: SIM114  (`or` would compare first, and look at code -1)
                winner = code
            elif compare_codes(x_ptr, offset, stride_d, codebook_ptr, code, winner, D, BLOCK_D) < 0:
                winner = code
            tied = tied & (codes > code) & differ_from(codebook_ptr, codes, code, K, D, BLOCK_K, BLOCK_D)
            code = tl.min(tl.where(tied, codes, NO_CODE), 0)
    return winner


@triton.jit
def exact_cosine(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D] float32
    offset,
    stride_d,
    x_high,  # |x|^2 as a double-double
    x_low,
    code,
    D,
    BLOCK_D: tl.constexpr,
):
    """cos(x, c) as a double-double."""
    row = code.to(tl.int64) * D
    dot_high, dot_low = row_dot(x_ptr, offset, stride_d, codebook_ptr, row, 1, D, BLOCK_D)
    c_high, c_low = row_dot(codebook_ptr, row, 1, codebook_ptr, row, 1, D, BLOCK_D)
    return cosine_of(dot_high, dot_low, x_high, x_low, c_high, c_low)


@triton.jit
def most_parallel_of_tied(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D] float32
    scale_ptr,  # [K] float64, 1 / |c|
    offset,
    stride_d,
    limit,  # float64 scalar
    x_high,  # |x|^2 as a double-double
    x_low,
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Among the codes whose score is within ``limit``: the first whose cosine is within 2^-90 of the largest."""
    high = tl.full([], -2.0, tl.float64)
    low = tl.full([], 0.0, tl.float64)
    top = tl.full([], -1, tl.int32)
    winner = tl.full([], -1, tl.int32)
    for phase in tl.static_range(2):  # the largest, then the first that ties with it
        for start in range(0, K, BLOCK_K):
            codes = start + tl.arange(0, BLOCK_K)
            score = tile_scores(x_ptr, codebook_ptr, scale_ptr, offset, stride_d, codes, K, D, True, BLOCK_K, BLOCK_D)
            tied = (score <= limit) & (winner < 0)
            if phase == 0:  # noqa: SIM102  (a constexpr and a tensor do not join)
                if top >= 0:
                    tied = tied & differ_from(codebook_ptr, codes, top, K, D, BLOCK_K, BLOCK_D)
            code = tl.min(tl.where(tied, codes, NO_CODE), 0)
            while code < NO_CODE:
                c_high, c_low = exact_cosine(x_ptr, codebook_ptr, offset, stride_d, x_high, x_low, code, D, BLOCK_D)
                gain = (c_high - high) + (c_low - low)
                if phase == 0:
                    top = tl.where(gain > 0, code, top)
                    low = tl.where(gain > 0, c_low, low)
                    high = tl.where(gain > 0, c_high, high)
                else:
                    winner = tl.where((winner < 0) & (gain >= -TIE_COSINE), code, winner)
                tied = tied & (codes > code) & (winner < 0)
                tied = tied & differ_from(codebook_ptr, codes, code, K, D, BLOCK_K, BLOCK_D)
                code = tl.min(tl.where(tied, codes, NO_CODE), 0)
    return winner


@triton.jit(do_not_specialize=["tokens_per_batch", "stride_b", "K"])
def exact_kernel(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D] float32
    scale_ptr,  # [K] float64, 1 / |c|
    codes_ptr,  # [N] int64
    distance_ptr,  # [N] float32
    listed_ptr,  # [N] int64
    count_ptr,  # [1] int32
    tokens_per_batch,
    stride_b,
    stride_t,
    stride_d,
    K,
    D,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program takes every so-many-th listed token: their number is known to the device alone."""
    for index in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        row = tl.load(listed_ptr + index)
        offset = row_offsets(row, tokens_per_batch, stride_b, stride_t)
        best, second, code = scan(x_ptr, codebook_ptr, scale_ptr, offset, stride_d, K, D, COSINE, BLOCK_K, BLOCK_D)
        if COSINE:
            x_high, x_low = row_dot(x_ptr, offset, stride_d, x_ptr, offset, stride_d, D, BLOCK_D)
            x_norm = tl.sqrt(x_high)
            limit = best + x_norm * (2 * D + 8) * (2.1 * UNIT64)
            if second <= limit:
                code = most_parallel_of_tied(
                    x_ptr, codebook_ptr, scale_ptr, offset, stride_d, limit, x_high, x_low, K, D, BLOCK_K, BLOCK_D
                )
            distance = tl.maximum(1.0 + best / x_norm, 0.0)
        else:
            limit = best + best * (D + 4) * (2.1 * UNIT64)
            if second <= limit:
                code = closest_of_tied(x_ptr, codebook_ptr, scale_ptr, offset, stride_d, limit, K, D, BLOCK_K, BLOCK_D)
            distance = best
        tl.store(codes_ptr + row, code.to(tl.int64))
        tl.store(distance_ptr + row, distance.to(tl.float32))
