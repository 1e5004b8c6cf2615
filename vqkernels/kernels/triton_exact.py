"""The road of tokens that two codes tie for, or whose candidates the coarse pass could not all keep.

A float64 scan of every code that the coarse pass leaves possible, then exact arithmetic between what ties. A float64
sum of D squared differences is off by less than (D + 4) 2^-53 of itself, a float64 cosine by less than (2 D + 8) 2^-53:
one code inside that window of the best is the answer, among several the exact order decides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_arithmetic import compare_codes, cosine_of, row_dot
from .triton_operands import GROUPS

UNIT64 = tl.constexpr(2.0**-53)
TIE_COSINE = tl.constexpr(2.0**-90)
NO_CODE = tl.constexpr((1 << 31) - 1)


@triton.jit
def possible(
    state,  # see below
    codes,  # [BLOCK_K] int32
    GRANULE: tl.constexpr,
):
    """[BLOCK_K] bool: codes whose granule may reach ``lower``, by what the coarse pass kept of one token.

    A granule is either one of the two kept of its group, or no higher than the group's third.
    """
    upper_ptr, code_ptr, third_ptr, tiles_per_split, lower = state  # [splits, 2, GROUPS] twice, [splits, GROUPS]
    granule = codes // GRANULE
    split = granule // GROUPS // tiles_per_split
    at = split * (2 * GROUPS) + granule % GROUPS
    first = tl.load(code_ptr + at) // GRANULE == granule
    second = tl.load(code_ptr + at + GROUPS) // GRANULE == granule
    score = tl.load(third_ptr + split * GROUPS + granule % GROUPS)
    score = tl.where(second, tl.load(upper_ptr + at + GROUPS), score)
    score = tl.where(first, tl.load(upper_ptr + at), score)
    return score >= lower


@triton.jit
def tile_scores(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    unit_ptr,  # [K] float64, 1 / |c|
    state,
    offset,
    stride_d,
    codes,  # [BLOCK_K] int32
    K,
    D,
    COSINE: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_K] float64, small is near: |x - c|^2, or -|x| cos; inf past the last code and where it cannot be near."""
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    inside = (codes < K) & possible(state, tl.minimum(codes, K - 1), GRANULE)
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
        score *= tl.load(unit_ptr + codes, mask=inside, other=0.0)
    return tl.where(inside, score, float("inf"))


@triton.jit
def with_lowest(
    best,  # float64 scalar, as are the scores
    second,
    code,  # int32 scalar
    codes,  # [BLOCK_K] int32
    score,  # [BLOCK_K] float64
):
    """The least score so far, the least of any other code, and whose the first is, a tile of codes later."""
    low = tl.min(score, 0)
    first = tl.min(tl.where(score == low, codes, NO_CODE), 0)
    others = tl.min(tl.where(codes == first, float("inf"), score), 0)
    second = tl.minimum(tl.maximum(best, low), tl.minimum(second, others))
    code = tl.where(low < best, first, code)
    return tl.minimum(best, low), second, code


@triton.jit
def scan(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    unit_ptr,  # [K] float64, 1 / |c|
    state,
    offset,
    stride_d,
    K,
    D,
    COSINE: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The best float64 score, its code, and the best score of any other code."""
    best = tl.full([], float("inf"), tl.float64)
    second = tl.full([], float("inf"), tl.float64)
    code = tl.full([], 0, tl.int32)
    for start in range(0, K, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        score = tile_scores(
            x_ptr, codebook_ptr, unit_ptr, state, offset, stride_d, codes, K, D, COSINE, GRANULE, BLOCK_K, BLOCK_D
        )
        best, second, code = with_lowest(best, second, code, codes, score)
    return best, second, code


@triton.jit
def differ_from(
    codebook_ptr,  # [K, D]
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
def not_farther(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    offset,
    stride_d,
    codes,  # [BLOCK_K] int32
    tied,  # [BLOCK_K] bool
    other,  # int32 scalar, one of the codes or one before them
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_K] bool: the tied codes that no tied code is surely nearer than.

    |x - a|^2 - |x - b|^2 is a sum of 4 D float64 products without rounding, off by less than 4 D 2^-53 of their sizes.
    """
    gap = tl.zeros([BLOCK_K], tl.float64)
    size = tl.zeros([BLOCK_K], tl.float64)
    rows = codes.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + offset + dims.to(tl.int64) * stride_d, mask=dims < D, other=0.0).to(tl.float64)[None, :]
        b = tl.load(codebook_ptr + other.to(tl.int64) * D + dims, mask=dims < D, other=0.0).to(tl.float64)[None, :]
        inside = tied[:, None] & (dims < D)[None, :]
        a = tl.load(codebook_ptr + rows[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float64)
        differ = inside & (a != b)  # where they agree the products cancel
        gap += tl.sum(tl.where(differ, (a * a - b * b) - 2.0 * (x * a - x * b), 0.0), 1)
        size += tl.sum(tl.where(differ, a * a + b * b + 2.0 * tl.abs(x) * (tl.abs(a) + tl.abs(b)), 0.0), 1)
    error = size * (D + 2) * 2.0**-50
    return tied & (gap - error <= tl.min(tl.where(tied, gap + error, float("inf")), 0))


@triton.jit
def closest_of_tied(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    unit_ptr,  # [K] float64, 1 / |c|
    state,
    offset,
    stride_d,
    limit,  # float64 scalar
    K,
    D,
    GRANULE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The truly nearest among the codes whose score is within ``limit``, lowest index on equality."""
    winner = tl.full([], -1, tl.int32)
    for start in range(0, K, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        score = tile_scores(
            x_ptr, codebook_ptr, unit_ptr, state, offset, stride_d, codes, K, D, False, GRANULE, BLOCK_K, BLOCK_D
        )
        tied = score <= limit
        if winner >= 0:
            tied = tied & differ_from(codebook_ptr, codes, winner, K, D, BLOCK_K, BLOCK_D)
        code = tl.min(tl.where(tied, codes, NO_CODE), 0)
        if code < NO_CODE:
            tied = not_farther(x_ptr, codebook_ptr, offset, stride_d, codes, tied, code, D, BLOCK_K, BLOCK_D)
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
    codebook_ptr,  # [K, D]
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
    codebook_ptr,  # [K, D]
    unit_ptr,  # [K] float64, 1 / |c|
    state,
    offset,
    stride_d,
    limit,  # float64 scalar
    x_high,  # |x|^2 as a double-double
    x_low,
    K,
    D,
    GRANULE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Among the codes whose score is within ``limit``: the first whose cosine is within 2^-90 of the largest."""
    high = tl.full([], -2.0, tl.float64)
    low = tl.full([], 0.0, tl.float64)
    top = tl.full([], -1, tl.int32)
    winner = tl.full([], -1, tl.int32)
    for phase in range(2):  # the largest, then the first that ties with it
        for start in range(0, K, BLOCK_K):
            codes = start + tl.arange(0, BLOCK_K)
            score = tile_scores(
                x_ptr, codebook_ptr, unit_ptr, state, offset, stride_d, codes, K, D, True, GRANULE, BLOCK_K, BLOCK_D
            )
            tied = (score <= limit) & (winner < 0)
            if (phase == 0) & (top >= 0):
                tied = tied & differ_from(codebook_ptr, codes, top, K, D, BLOCK_K, BLOCK_D)
            code = tl.min(tl.where(tied, codes, NO_CODE), 0)
            while code < NO_CODE:
                c_high, c_low = exact_cosine(x_ptr, codebook_ptr, offset, stride_d, x_high, x_low, code, D, BLOCK_D)
                gain = (c_high - high) + (c_low - low)
                better = (phase == 0) & (gain > 0)
                winner = tl.where((phase == 1) & (winner < 0) & (gain >= -TIE_COSINE), code, winner)
                top = tl.where(better, code, top)
                low = tl.where(better, c_low, low)
                high = tl.where(better, c_high, high)
                tied = tied & (codes > code) & (winner < 0)
                tied = tied & differ_from(codebook_ptr, codes, code, K, D, BLOCK_K, BLOCK_D)
                code = tl.min(tl.where(tied, codes, NO_CODE), 0)
    return winner


@triton.jit
def decide(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    unit_ptr,  # [K] float64, 1 / |c|
    state,  # where this token's candidates are: see ``possible``
    offset,
    stride_d,
    K,
    D,
    COSINE: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The code of one token, int32, and its distance, float64."""
    best, second, code = scan(
        x_ptr, codebook_ptr, unit_ptr, state, offset, stride_d, K, D, COSINE, GRANULE, BLOCK_K, BLOCK_D
    )
    if COSINE:
        x_high, x_low = row_dot(x_ptr, offset, stride_d, x_ptr, offset, stride_d, D, BLOCK_D)
        x_norm = tl.sqrt(x_high)
        limit = best + x_norm * (2 * D + 8) * (2.1 * UNIT64)
        if second <= limit:
            code = most_parallel_of_tied(
                x_ptr, codebook_ptr, unit_ptr, state, offset, stride_d, limit, x_high, x_low, K, D,
                GRANULE, BLOCK_K, BLOCK_D,
            )  # fmt: skip
        distance = tl.maximum(1.0 + best / x_norm, 0.0)
    else:
        limit = best + best * (D + 4) * (2.1 * UNIT64)
        if second <= limit:
            code = closest_of_tied(
                x_ptr, codebook_ptr, unit_ptr, state, offset, stride_d, limit, K, D, GRANULE, BLOCK_K, BLOCK_D
            )
        distance = best
    return code, distance
