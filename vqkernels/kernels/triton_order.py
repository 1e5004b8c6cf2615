"""A token's shortlist in order: the k nearest of it, decided as ``nearest`` decides.

rank    float64 scores of the list, and the least that is left, k + 1 times, all tokens of a program at once
exact   tokens that two neighbours in that order tie for, or whose list overflowed: one by one, every place by its
        definition, the nearest of the codes that hold no place yet; the real order where float64 scores tie
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_arithmetic import compare_codes, row_dot
from .triton_common import row_offsets
from .triton_exact import NO_CODE, TIE_COSINE, UNIT64, differ_from, exact_cosine, not_farther, with_lowest
from .triton_finish import score_codes

PLACES = tl.constexpr(16)  # of those taken, looked at in one step


@triton.jit
def tie_limit(
    value,  # float64, any shape
    norm,  # likewise, |x|; cosine only
    D,
    COSINE: tl.constexpr,
):
    """What is above it is farther, over the real numbers, than the code of this float64 score."""
    if COSINE:
        limit = value + norm * (2 * D + 8) * (2.1 * UNIT64)
    else:
        limit = value + value * (D + 4) * (2.1 * UNIT64)
    return limit


@triton.jit
def distance_of(
    value,  # float64, any shape
    norm,  # likewise, |x|; cosine only
    COSINE: tl.constexpr,
):
    """The distance of a score, float64."""
    if COSINE:
        distance = tl.maximum(1.0 + value / tl.where(norm > 0, norm, 1.0), 0.0)
    else:
        distance = value
    return distance


# ------------------------------------------------------------------------------------- one token, exactly


@triton.jit
def left_over(
    token,  # (x_ptr, its offset, stride_d, codebook_ptr, unit_ptr): of one token
    places,  # (list_ptr [number] int32, 1 where that holds the codes, else they are 0 .. K - 1; number; taken_ptr [k])
    start,
    taken,  # how many places have a code
    D,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_K candidates, int32, and their float64 scores; inf past the end and where a code has its place."""
    x_ptr, offset, stride_d, codebook_ptr, unit_ptr = token
    list_ptr, listed, number, taken_ptr = places
    position = start + tl.arange(0, BLOCK_K)
    inside = position < number
    codes = tl.load(list_ptr + position, mask=inside & (listed > 0), other=0)
    codes = tl.where(listed > 0, codes, position)
    for first in range(0, taken, PLACES):
        place = first + tl.arange(0, PLACES)
        other = tl.load(taken_ptr + place, mask=place < taken, other=-1).to(tl.int32)
        inside = inside & (tl.max((codes[:, None] == other[None, :]).to(tl.int32), 1) == 0)
    offsets = offset + tl.zeros([BLOCK_K], tl.int64)
    score, _ = score_codes(x_ptr, codebook_ptr, unit_ptr, offsets, codes, inside, stride_d, D, COSINE, BLOCK_K, BLOCK_D)
    return codes, score


@triton.jit
def scan_left(
    token,  # see left_over, as are the others
    places,
    taken,
    D,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The least score that is left, its code, and the least of any other."""
    best = tl.full([], float("inf"), tl.float64)
    second = tl.full([], float("inf"), tl.float64)
    code = tl.full([], 0, tl.int32)
    for start in range(0, places[2], BLOCK_K):
        codes, score = left_over(token, places, start, taken, D, COSINE, BLOCK_K, BLOCK_D)
        best, second, code = with_lowest(best, second, code, codes, score)
    return best, second, code


@triton.jit
def closest_left(
    token,  # see left_over, as are the others
    places,
    taken,
    limit,  # float64 scalar
    before,  # the code of the place before, int32; -1 where there is none
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The truly nearest of what is left and scores within ``limit``, the lowest index on equality.

    Nothing left is nearer than ``before``: beside one as near as that only the index counts.
    """
    x_ptr, offset, stride_d, codebook_ptr, _ = token
    winner = tl.full([], -1, tl.int32)
    settled = tl.full([], 0, tl.int32)
    for start in range(0, places[2], BLOCK_K):
        codes, score = left_over(token, places, start, taken, D, False, BLOCK_K, BLOCK_D)
        tied = (score <= limit) & ((codes < winner) | (settled == 0))
        code = tl.min(tl.where(tied, codes, NO_CODE), 0)
        if code < NO_CODE:
            tied = not_farther(x_ptr, codebook_ptr, offset, stride_d, codes, tied, code, D, BLOCK_K, BLOCK_D)
            code = tl.min(tl.where(tied, codes, NO_CODE), 0)
        while code < NO_CODE:
            sign = tl.full([], -1, tl.int64)
            if winner >= 0:
                sign = compare_codes(x_ptr, offset, stride_d, codebook_ptr, code, winner, D, BLOCK_D)
            leads = (sign < 0) | ((sign == 0) & (code < winner))
            winner = tl.where(leads, code, winner)
            if before >= 0:
                equal = compare_codes(x_ptr, offset, stride_d, codebook_ptr, winner, before, D, BLOCK_D) == 0
                settled = equal.to(tl.int32)
            tied = tied & (codes > code) & ((codes < winner) | (settled == 0))
            tied = tied & differ_from(codebook_ptr, codes, code, K, D, BLOCK_K, BLOCK_D)
            code = tl.min(tl.where(tied, codes, NO_CODE), 0)
    return winner


@triton.jit
def most_parallel_left(
    token,  # see left_over, as are the others
    places,
    taken,
    limit,  # float64 scalar
    x_high,  # |x|^2 as a double-double
    x_low,
    top_high,  # a cosine as a double-double: no code that is left has a larger one
    top_low,
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The lowest index whose cosine is within 2^-90 of the largest of what is left and scores within ``limit``; and
    that largest cosine."""
    x_ptr, offset, stride_d, codebook_ptr, _ = token
    high = tl.full([], -2.0, tl.float64)
    low = tl.full([], 0.0, tl.float64)
    winner = tl.full([], NO_CODE, tl.int32)
    for phase in tl.static_range(2):  # the largest, then the first that ties with it
        for start in range(0, places[2], BLOCK_K):
            codes, score = left_over(token, places, start, taken, D, True, BLOCK_K, BLOCK_D)
            tied = (score <= limit) & (codes < winner)
            code = tl.min(tl.where(tied, codes, NO_CODE), 0)
            while code < NO_CODE:
                c_high, c_low = exact_cosine(x_ptr, codebook_ptr, offset, stride_d, x_high, x_low, code, D, BLOCK_D)
                gain = (c_high - high) + (c_low - low)
                if phase == 0:
                    low = tl.where(gain > 0, c_low, low)
                    high = tl.where(gain > 0, c_high, high)
                    below_top = tl.where((high - top_high) + (low - top_low) < 0, 1, 0)
                    tied = tied & (below_top > 0)
                else:
                    winner = tl.where((gain >= -TIE_COSINE) & (code < winner), code, winner)
                tied = tied & (codes > code) & (codes < winner)
                tied = tied & differ_from(codebook_ptr, codes, code, K, D, BLOCK_K, BLOCK_D)
                code = tl.min(tl.where(tied, codes, NO_CODE), 0)
    return winner, high, low


@triton.jit
def order_one(
    token,  # see left_over, as is places
    places,
    distance_ptr,  # [k] float32 written
    k,
    K,
    D,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Codes (into ``places``) and distances of one token."""
    x_ptr, offset, stride_d, _, _ = token
    taken_ptr = places[3]
    x_high = tl.full([], 0.0, tl.float64)
    x_low = tl.full([], 0.0, tl.float64)
    if COSINE:
        x_high, x_low = row_dot(x_ptr, offset, stride_d, x_ptr, offset, stride_d, D, BLOCK_D)
    norm = tl.sqrt(x_high)
    largest = tl.full([], float("-inf"), tl.float64)
    top_high = tl.full([], 2.0, tl.float64)
    top_low = tl.full([], 0.0, tl.float64)
    code = tl.full([], -1, tl.int32)
    for place in range(0, k):
        tl.debug_barrier()  # the code of the place before is read by all threads
        before = code
        best, second, code = scan_left(token, places, place, D, COSINE, BLOCK_K, BLOCK_D)
        limit = tie_limit(best, norm, D, COSINE)
        if second <= limit:
            if COSINE:
                code, top_high, top_low = most_parallel_left(
                    token, places, place, limit, x_high, x_low, top_high, top_low, K, D, BLOCK_K, BLOCK_D
                )
            else:
                code = closest_left(token, places, place, limit, before, K, D, BLOCK_K, BLOCK_D)
        largest = tl.maximum(largest, best)  # float64 scores of ties may come out of order
        tl.store(taken_ptr + place, code.to(tl.int64))
        tl.store(distance_ptr + place, distance_of(largest, norm, COSINE).to(tl.float32))


# ------------------------------------------------------------------------------------- all tokens of a program


@triton.jit
def score_lists(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    unit_ptr,  # [K] float64, 1 / |c|
    list_ptr,  # [N, capacity] int32
    score_ptr,  # [N, capacity] float64 written
    rows,  # [BLOCK_N] int64
    offsets,  # [BLOCK_N] int64
    count,  # [BLOCK_N] int32
    stride_d,
    D,
    capacity,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_N] float64 |x|^2, for cosine; and float64 scores of the listed codes."""
    PAIRS: tl.constexpr = BLOCK_N * BLOCK_S
    square = tl.zeros([BLOCK_N], tl.float64)
    for start in range(0, tl.max(count, 0), BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)[None, :]
        inside = slot < count[:, None]
        at = rows[:, None] * capacity + slot
        codes = tl.load(list_ptr + at, mask=inside, other=0)
        begin = tl.reshape(offsets[:, None] + 0 * codes.to(tl.int64), [PAIRS])
        score, square_of_pair = score_codes(
            x_ptr, codebook_ptr, unit_ptr, begin, tl.reshape(codes, [PAIRS]), tl.reshape(inside, [PAIRS]),
            stride_d, D, COSINE, PAIRS, BLOCK_D,
        )  # fmt: skip
        square = tl.maximum(square, tl.max(tl.reshape(square_of_pair, [BLOCK_N, BLOCK_S]), 1))
        tl.store(score_ptr + at, tl.reshape(score, [BLOCK_N, BLOCK_S]), mask=inside)
    return square


@triton.jit
def next_of_lists(
    list_ptr,  # [N, capacity] int32
    score_ptr,  # [N, capacity] float64
    rows,  # [BLOCK_N] int64
    count,  # [BLOCK_N] int32
    last,  # [BLOCK_N] float64, the score of the one before
    last_code,  # [BLOCK_N] int32
    capacity,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """[BLOCK_N]: the least score that comes after ``last``, and its code; inf where there is none."""
    best = tl.full([BLOCK_N], float("inf"), tl.float64)
    best_code = tl.full([BLOCK_N], NO_CODE, tl.int32)
    for start in range(0, tl.max(count, 0), BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)[None, :]
        inside = slot < count[:, None]
        at = rows[:, None] * capacity + slot
        score = tl.load(score_ptr + at, mask=inside, other=float("inf"))
        codes = tl.load(list_ptr + at, mask=inside, other=NO_CODE)
        after = (score > last[:, None]) | ((score == last[:, None]) & (codes > last_code[:, None]))
        score = tl.where(inside & after, score, float("inf"))
        low = tl.min(score, 1)
        code = tl.min(tl.where(inside & after & (score == low[:, None]), codes, NO_CODE), 1)
        best_code = tl.where(low < best, code, tl.where(low == best, tl.minimum(code, best_code), best_code))
        best = tl.minimum(best, low)
    return best, best_code


@triton.jit(do_not_specialize=["tokens_per_batch", "stride_b", "N", "K", "capacity", "k"])
def order_kernel(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    unit_ptr,  # [K] float64, 1 / |c|
    limit_ptr,  # [N] float32, see limit_kernel
    count_ptr,  # [N] int32
    list_ptr,  # [N, capacity] int32
    score_ptr,  # [N, capacity] float64 written
    codes_ptr,  # [N, k] int64 written
    distance_ptr,  # [N, k] float32 written
    tokens_per_batch,
    stride_b,
    stride_t,
    stride_d,
    N,
    K,
    D,
    capacity,
    k,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_D: tl.constexpr,
):
    """Codes and distances of a tile of tokens."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    offsets = row_offsets(rows, tokens_per_batch, stride_b, stride_t)
    limit = tl.load(limit_ptr + rows, mask=live, other=float("nan"))
    number = tl.load(count_ptr + rows, mask=live, other=0)
    valid = limit == limit
    none = valid & (limit == float("inf"))  # no direction: every code ties
    count = tl.where(number <= capacity, number, 0)
    square = score_lists(
        x_ptr, codebook_ptr, unit_ptr, list_ptr, score_ptr, rows, offsets, count, stride_d, D, capacity,
        COSINE, BLOCK_N, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    norm = tl.sqrt(square)
    tl.debug_barrier()  # other threads read the scores
    last = tl.full([BLOCK_N], float("-inf"), tl.float64)
    last_code = tl.full([BLOCK_N], -1, tl.int32)
    tied = (number > capacity).to(tl.int32)
    for place in range(0, k + 1):
        reach = tie_limit(last, norm, D, COSINE)
        last, last_code = next_of_lists(list_ptr, score_ptr, rows, count, last, last_code, capacity, BLOCK_N, BLOCK_S)
        tied = tl.maximum(tied, ((count > 0) & (last <= reach)).to(tl.int32))
        code = tl.where(none, place, last_code)
        distance = tl.where(none, 1.0, distance_of(last, norm, COSINE))
        inside = live & (place < k)
        tl.store(codes_ptr + rows * k + place, tl.where(valid, code.to(tl.int64), -1), mask=inside)
        tl.store(distance_ptr + rows * k + place, tl.where(valid, distance, float("nan")).to(tl.float32), mask=inside)
    tl.debug_barrier()  # what follows overwrites some of these
    index = tl.arange(0, BLOCK_N)
    pending = tl.where(live & valid & (tied > 0), index, BLOCK_N)
    one = tl.min(pending, 0)
    while one < BLOCK_N:
        row = tl.program_id(0).to(tl.int64) * BLOCK_N + one
        start = row_offsets(row, tokens_per_batch, stride_b, stride_t)
        held = tl.max(tl.where(index == one, number, 0), 0)
        listed = (held <= capacity).to(tl.int32)
        token = (x_ptr, start, stride_d, codebook_ptr, unit_ptr)
        places = (list_ptr + row * capacity, listed, tl.where(listed > 0, held, K), codes_ptr + row * k)
        order_one(token, places, distance_ptr + row * k, k, K, D, COSINE, EXACT_K, EXACT_D)
        pending = tl.where(index == one, BLOCK_N, pending)
        one = tl.min(pending, 0)
