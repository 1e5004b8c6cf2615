"""From the coarse pass's state to codes and distances: which granules may hold the nearest code, scored in float64.

lower    the highest G - E of a token: whatever G + E is below it is out
rerank   the granules that remain, one a round, all tokens of a program at once: most tokens need one round
exact    tokens whose group kept too few, or that two codes tie for in float64: one by one, see triton_exact
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import load_tile, row_offsets
from .triton_exact import NO_CODE, UNIT64, decide
from .triton_operands import GROUPS, SLACK

NOTHING = tl.constexpr(-(1 << 63))  # a key below that of every candidate


@triton.jit
def lower_bound(
    upper_ptr,  # [N, slots] float32
    code_ptr,  # [N, slots] int32
    limits_ptr,  # [granules, 4] float32
    rows,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    a,  # [BLOCK_N] float32, as are b and m
    b,
    m,
    slots,
    GRANULE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """[BLOCK_N] float32, the highest G - E of the granules kept; 1 where one of them holds NaN or Inf."""
    lower = tl.full([BLOCK_N], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, slots, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)[None, :]
        kept = live[:, None] & (slot < slots)
        upper = tl.load(upper_ptr + rows[:, None] * slots + slot, mask=kept, other=float("-inf"))
        granule = tl.load(code_ptr + rows[:, None] * slots + slot, mask=kept, other=0) // GRANULE
        kept = upper > float("-inf")
        limits = limits_ptr + granule.to(tl.int64) * 4
        p = tl.load(limits, mask=kept, other=0.0)
        q = tl.load(limits + 1, mask=kept, other=0.0)
        r = tl.load(limits + 2, mask=kept, other=0.0)
        bound = a[:, None] * p + b[:, None] * q + m[:, None] * r + SLACK
        reached = upper - (2.0 + 2.0**-10) * bound
        lower = tl.maximum(lower, tl.max(tl.where(tl.abs(reached) < float("inf"), reached, float("-inf")), 1))
        bad = tl.maximum(bad, tl.max((p == float("inf")).to(tl.int32), 1))
    return lower, bad


@triton.jit
def reaches(
    third_ptr,  # [N, slots] float32
    rows,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    lower,  # [BLOCK_N] float32
    slots,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """[BLOCK_N] int32, 1 where some group's third highest is no lower than ``lower``."""
    reached = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, slots, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)[None, :]
        kept = live[:, None] & (slot < slots)
        third = tl.load(third_ptr + rows[:, None] * slots + slot, mask=kept, other=float("-inf"))
        reached = tl.maximum(reached, tl.max((kept & (third >= lower[:, None])).to(tl.int32), 1))
    return reached


@triton.jit
def next_candidate(
    upper_ptr,  # [N, slots] float32
    code_ptr,  # [N, slots] int32
    inner_ptr,  # [N, slots] float32
    rows,  # [BLOCK_N] int64
    active,  # [BLOCK_N] bool
    lower,  # [BLOCK_N] float32
    last,  # [BLOCK_N] int64, the candidate taken before
    slots,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """[BLOCK_N] int64 keys, (score, code) in order: the highest that is below ``last``; NOTHING where none is left.

    REST: only granules whose runner-up, too, is no lower than ``lower``.
    """
    best = tl.full([BLOCK_N], NOTHING, tl.int64)
    for start in range(0, slots, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)[None, :]
        kept = active[:, None] & (slot < slots)
        at = rows[:, None] * slots + slot
        upper = tl.load(upper_ptr + at, mask=kept, other=float("-inf"))
        code = tl.load(code_ptr + at, mask=kept, other=0)
        if REST:
            kept = kept & (tl.load(inner_ptr + at, mask=kept, other=float("-inf")) >= lower[:, None])
        kept = kept & (upper >= lower[:, None]) & (upper > float("-inf"))
        bits = upper.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (ordered.to(tl.int64) << 32) | code.to(tl.int64)
        best = tl.maximum(best, tl.max(tl.where(kept & (key < last[:, None]), key, NOTHING), 1))
    return best


@triton.jit
def score_codes(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    unit_ptr,  # [K] float64, 1 / |c|
    offsets,  # [PAIRS] int64
    codes,  # [PAIRS] int32
    inside,  # [PAIRS] bool
    stride_d,
    D,
    COSINE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[PAIRS] float64, small is near: |x - c|^2, or -|x| cos; inf outside. And |x|^2 for cosine."""
    total = tl.zeros([PAIRS], tl.float64)
    square = tl.zeros([PAIRS], tl.float64)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, offsets, inside, dims, D, stride_d).to(tl.float64)
        c = load_tile(codebook_ptr, codes.to(tl.int64) * D, inside, dims, D, 1).to(tl.float64)
        if COSINE:
            total -= tl.sum(x * c, 1)
            square += tl.sum(x * x, 1)
        else:
            total += tl.sum((x - c) * (x - c), 1)
    if COSINE:
        total *= tl.load(unit_ptr + codes, mask=inside, other=0.0)
    return tl.where(inside, total, float("inf")), square


@triton.jit
def rerank(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    unit_ptr,  # [K] float64, 1 / |c|
    upper_ptr,  # [N, slots] float32
    code_ptr,  # [N, slots] int32
    inner_ptr,  # [N, slots] float32
    rows,  # [BLOCK_N] int64
    active,  # [BLOCK_N] bool
    lower,  # [BLOCK_N] float32
    offsets,  # [BLOCK_N] int64
    stride_d,
    K,
    D,
    slots,
    found,  # (best float64 score, best of any other code, the best's code, |x|^2): [BLOCK_N] each
    COSINE: tl.constexpr,
    REST: tl.constexpr,
    GRANULE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``found`` over more candidates: WIDTH codes from the kept one on; REST: what else is in its granule."""
    best, second, winner, square = found
    PAIRS: tl.constexpr = BLOCK_N * WIDTH
    last = tl.full([BLOCK_N], (1 << 63) - 1, tl.int64)
    key = next_candidate(upper_ptr, code_ptr, inner_ptr, rows, active, lower, last, slots, REST, BLOCK_N, BLOCK_S)
    while tl.max(key, 0) > NOTHING:
        kept = (key & 0x7FFFFFFF).to(tl.int32)[:, None]
        codes = (kept // GRANULE * GRANULE if REST else kept) + tl.arange(0, WIDTH)[None, :]
        inside = (key > NOTHING)[:, None] & (codes < K)
        if REST:
            inside = inside & (codes != kept)
        start = tl.reshape(offsets[:, None] + 0 * codes.to(tl.int64), [PAIRS])
        score, square_of_pair = score_codes(
            x_ptr, codebook_ptr, unit_ptr, start, tl.reshape(codes, [PAIRS]), tl.reshape(inside, [PAIRS]),
            stride_d, D, COSINE, PAIRS, BLOCK_D,
        )  # fmt: skip
        score = tl.reshape(score, [BLOCK_N, WIDTH])
        square = tl.maximum(square, tl.max(tl.reshape(square_of_pair, [BLOCK_N, WIDTH]), 1))
        low = tl.min(score, 1)
        code = tl.min(tl.where(score == low[:, None], codes, NO_CODE), 1)
        others = tl.min(tl.where(codes == code[:, None], float("inf"), score), 1)
        second = tl.minimum(tl.maximum(best, low), tl.minimum(second, others))
        winner = tl.where(low < best, code, winner)
        best = tl.minimum(best, low)
        key = next_candidate(upper_ptr, code_ptr, inner_ptr, rows, active, lower, key, slots, REST, BLOCK_N, BLOCK_S)
    return best, second, winner, square


@triton.jit(do_not_specialize=["tokens_per_batch", "stride_b", "N", "K", "splits", "tiles_per_split"])
def finish_kernel(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    unit_ptr,  # [K] float64, 1 / |c|
    limits_ptr,  # [granules, 4] float32
    stats_ptr,  # [N, 4] float32
    upper_ptr,  # [N, splits, 2, GROUPS] float32
    code_ptr,  # [N, splits, 2, GROUPS] int32
    inner_ptr,  # [N, splits, 2, GROUPS] float32
    third_ptr,  # [N, splits, GROUPS] float32
    codes_ptr,  # [N] int64
    distance_ptr,  # [N] float32
    tokens_per_batch,
    stride_b,
    stride_t,
    stride_d,
    N,
    K,
    D,
    splits,
    tiles_per_split,
    COSINE: tl.constexpr,
    PACK: tl.constexpr,
    GRANULE: tl.constexpr,
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
    a = tl.load(stats_ptr + rows * 4, mask=live, other=0.0)
    b = tl.load(stats_ptr + rows * 4 + 1, mask=live, other=0.0)
    m = tl.load(stats_ptr + rows * 4 + 2, mask=live, other=0.0)
    zero = tl.load(stats_ptr + rows * 4 + 3, mask=live, other=0.0) == 0
    slots = splits * (2 * GROUPS)
    lower, bad = lower_bound(upper_ptr, code_ptr, limits_ptr, rows, live, a, b, m, slots, GRANULE, BLOCK_N, BLOCK_S)
    third = splits * GROUPS
    undecided = reaches(third_ptr, rows, live, lower, third, BLOCK_N, BLOCK_S) > 0
    valid = live & (a == a) & (bad == 0)
    if COSINE:
        undecided = undecided & (zero == 0)
    active = valid & (undecided == 0)
    if COSINE:
        active = active & (zero == 0)
    WIDTH: tl.constexpr = 1 if PACK else GRANULE
    high = tl.full([BLOCK_N], float("inf"), tl.float64)
    found = rerank(
        x_ptr, codebook_ptr, unit_ptr, upper_ptr, code_ptr, inner_ptr, rows, active, lower, offsets, stride_d, K, D,
        slots, (high, high, tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_N], tl.float64)),
        COSINE, False, GRANULE, WIDTH, BLOCK_N, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    if PACK:
        found = rerank(
            x_ptr, codebook_ptr, unit_ptr, upper_ptr, code_ptr, inner_ptr, rows, active, lower, offsets, stride_d, K, D,
            slots, found, COSINE, True, GRANULE, GRANULE, BLOCK_N, BLOCK_S, BLOCK_D // 8,
        )  # fmt: skip
    best, second, code, square = found
    if COSINE:
        norm = tl.sqrt(square)
        limit = best + norm * (2 * D + 8) * (2.1 * UNIT64)
        distance = tl.maximum(1.0 + tl.where(active, best / tl.where(active, norm, 1.0), 0.0), 0.0)
    else:
        limit = best + best * (D + 4) * (2.1 * UNIT64)
        distance = best
    undecided = undecided | (active & (second <= limit))
    done = live & ((undecided & valid) == 0)
    tl.store(codes_ptr + rows, tl.where(valid, code.to(tl.int64), -1), mask=done)
    tl.store(distance_ptr + rows, tl.where(valid, distance, float("nan")).to(tl.float32), mask=done)
    index = tl.arange(0, BLOCK_N)
    pending = tl.where(undecided & valid, index, BLOCK_N)
    one = tl.min(pending, 0)
    while one < BLOCK_N:
        row = tl.program_id(0).to(tl.int64) * BLOCK_N + one
        start = row_offsets(row, tokens_per_batch, stride_b, stride_t)
        reach = tl.max(tl.where(index == one, lower, float("-inf")), 0)
        state = (upper_ptr + row * slots, code_ptr + row * slots, third_ptr + row * third, tiles_per_split, reach)
        exact_code, exact_distance = decide(
            x_ptr, codebook_ptr, unit_ptr, state, start, stride_d, K, D, COSINE, GRANULE, EXACT_K, EXACT_D
        )
        tl.store(codes_ptr + row, exact_code.to(tl.int64))
        tl.store(distance_ptr + row, exact_distance.to(tl.float32))
        pending = tl.where(index == one, BLOCK_N, pending)
        one = tl.min(pending, 0)
