"""Which codes may be among a token's k nearest, by the coarse pass of the Triton search.

limit    the k-th highest G - E of the granules that the coarse pass kept: k codes reach it, as granules share none
collect  the product once more: every code whose score plus E is no lower goes into its token's list

The order inside a list is that of the atomics and means nothing: what comes after looks at the codes alone. A list that
overflows is counted on, and its token is then decided among all codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_coarse import granule_bounds, product, upper_of
from .triton_operands import GROUPS, SLACK

ONE_MORE = tl.constexpr(1 << 20)  # a count above the bits of a granule's codes, of which there are at most 16


@triton.jit
def reached_by(
    upper,  # [BLOCK_N, BLOCK_S] float32, G + E
    granule,  # [BLOCK_N, BLOCK_S] int32
    limits_ptr,  # [granules, 4] float32
    a,  # [BLOCK_N] float32, as are b and m
    b,
    m,
    kept,  # [BLOCK_N, BLOCK_S] bool
):
    """[BLOCK_N, BLOCK_S] float32, G - E, -inf where that says nothing; 1 where a granule holds NaN or Inf."""
    kept = kept & (upper > float("-inf"))
    limits = limits_ptr + granule.to(tl.int64) * 4
    p = tl.load(limits, mask=kept, other=0.0)
    q = tl.load(limits + 1, mask=kept, other=0.0)
    r = tl.load(limits + 2, mask=kept, other=0.0)
    reached = upper - (2.0 + 2.0**-10) * (a[:, None] * p + b[:, None] * q + m[:, None] * r + SLACK)
    return tl.where(tl.abs(reached) < float("inf"), reached, float("-inf")), (p == float("inf")).to(tl.int32)


@triton.jit
def ordered(
    value,  # float32 or, of what this gave, its bits: int32
):
    """int32 in the order of the float32 numbers; applied to such an int32, the bits of the number."""
    return value ^ ((value >> 31) & 0x7FFFFFFF)


@triton.jit
def count_above(
    reached_ptr,  # [N, slots] float32
    rows,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    least,  # [BLOCK_N] int32
    slots,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """[BLOCK_N] int32: how many of a token's are no lower than ``least``, in the order of ``ordered``."""
    count = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, slots, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)[None, :]
        inside = live[:, None] & (slot < slots)
        value = tl.load(reached_ptr + rows[:, None] * slots + slot, mask=inside, other=float("-inf"))
        above = inside & (ordered(value.to(tl.int32, bitcast=True)) >= least[:, None])
        count += tl.sum(above.to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=["N", "slots", "k"])
def limit_kernel(
    stats_ptr,  # [N, 4] float32
    limits_ptr,  # [granules, 4] float32
    code_ptr,  # [N, slots] int32
    upper_ptr,  # [N, slots] float32, overwritten
    limit_ptr,  # [N] float32 written: NaN where the token has no code; inf where every code ties, for cosine
    count_ptr,  # [N] int32 written: 0
    N,
    slots,
    k,
    COSINE: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The k-th highest G - E of each token, found bit by bit; -inf where fewer are known."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    a = tl.load(stats_ptr + rows * 4, mask=live, other=0.0)
    b = tl.load(stats_ptr + rows * 4 + 1, mask=live, other=0.0)
    m = tl.load(stats_ptr + rows * 4 + 2, mask=live, other=0.0)
    size = tl.load(stats_ptr + rows * 4 + 3, mask=live, other=0.0)
    bad = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, slots, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)[None, :]
        at = rows[:, None] * slots + slot
        inside = live[:, None] & (slot < slots)
        upper = tl.load(upper_ptr + at, mask=inside, other=float("-inf"))
        granule = tl.load(code_ptr + at, mask=inside, other=0) // GRANULE
        reached, wrong = reached_by(upper, granule, limits_ptr, a, b, m, inside)
        bad = tl.maximum(bad, tl.max(wrong, 1))
        tl.store(upper_ptr + at, reached, mask=inside)
    tl.debug_barrier()  # other threads read them
    lowest = tl.full([BLOCK_N], -(1 << 31), tl.int32)
    zero = tl.zeros([BLOCK_N], tl.int32)
    found = tl.where(count_above(upper_ptr, rows, live, zero, slots, BLOCK_N, BLOCK_S) >= k, zero, lowest)
    for place in range(0, 31):
        trial = found | (1 << (30 - place))
        found = tl.where(count_above(upper_ptr, rows, live, trial, slots, BLOCK_N, BLOCK_S) >= k, trial, found)
    limit = tl.where(found > lowest, ordered(found).to(tl.float32, bitcast=True), float("-inf"))
    if COSINE:
        limit = tl.where(size == 0, float("inf"), limit)
    limit = tl.where((a == a) & (bad == 0), limit, float("nan"))
    tl.store(limit_ptr + rows, limit, mask=live)
    tl.store(count_ptr + rows, zero, mask=live)


@triton.jit
def append(
    codes_ptr,  # [N, capacity] int32
    count_ptr,  # [N] int32
    rows,  # [BLOCK_N] int64
    hits,  # [BLOCK_N, GROUPS] int32: a bit for each code of the granule, above them how many
    first,  # [GROUPS] int32, the granule's first code
    capacity,
    GRANULE: tl.constexpr,
):
    """Puts the codes that are marked at the end of their tokens' lists."""
    number = hits // ONE_MORE
    at = count_ptr + rows[:, None] + 0 * number
    place = tl.atomic_add(at, number, mask=number > 0)
    for code in range(GRANULE):  # seldom run, and unrolled it would be most of the kernel's code
        marked = (hits >> code) & 1
        where = codes_ptr + rows[:, None] * capacity + place
        tl.store(where, (first + code)[None, :] + 0 * place, mask=(marked > 0) & (place < capacity))
        place += marked


@triton.jit(do_not_specialize=["N", "K", "capacity", "tiles", "tiles_per_split"])
def collect_kernel(
    tokens_ptr,  # [tokens, depth] float16
    stats_ptr,  # [N, 4] float32
    operand_ptr,  # [codes, depth] float16
    bias_ptr,  # [codes] float32
    limits_ptr,  # [granules, 4] float32
    limit_ptr,  # [N] float32
    codes_ptr,  # [N, capacity] int32 written
    count_ptr,  # [N] int32, 0; written: may be more than the capacity
    N,
    K,
    depth,
    capacity,
    tiles,
    tiles_per_split,
    BIAS: tl.constexpr,
    GRANULE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of tokens against one split of the codes."""
    BLOCK_K: tl.constexpr = GRANULE * GROUPS
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    a = tl.load(stats_ptr + rows * 4, mask=live, other=0.0)
    b = tl.load(stats_ptr + rows * 4 + 1, mask=live, other=0.0)
    weight = tl.load(stats_ptr + rows * 4 + 2, mask=live, other=0.0)
    limit = tl.load(limit_ptr + rows, mask=live, other=float("inf"))
    groups = tl.arange(0, GROUPS)
    column = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_D)
    inner = tl.arange(0, GRANULE)
    at_x = tokens_ptr + rows[:, None] * depth + dims[None, :]
    x = tl.load(at_x) if RESIDENT else at_x
    begin = tl.program_id(1) * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, tiles)):
        first_row = (tl.full([], 0, tl.int64) + tile) * BLOCK_K
        at_c = operand_ptr + first_row * depth + column[None, :] * depth + dims[:, None]
        score = product(x, at_x, at_c, bias_ptr + first_row + column, weight, depth, BIAS, RESIDENT, BLOCK_D)
        score = tl.reshape(score, [BLOCK_N, GRANULE, GROUPS])
        granule = tile * GROUPS + groups
        bound, unit = granule_bounds(limits_ptr, granule, a, b, weight)
        upper = upper_of(score, unit[None, None, :], bound[:, None, :])
        own = (granule * GRANULE)[None, None, :] + inner[None, :, None]
        hit = (upper >= limit[:, None, None]) & (own < K)
        hits = tl.sum(tl.where(hit, ((1 << inner) + ONE_MORE)[None, :, None], 0), 1)
        if tl.max(tl.max(hits, 1), 0) > 0:
            append(codes_ptr, count_ptr, rows, hits, granule * GRANULE, capacity, GRANULE)
