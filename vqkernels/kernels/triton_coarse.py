"""The coarse pass in Triton: one fp16 product of tokens and codes on the tensor cores, its maximum kept on the way.

    score     T_nk = d_n . c_k - |c_k|^2 / 2,  d = x - mu, c = code - mu  (cosine: mu = 0, |c| = 1, first term only)
    granule   GRANULE codes in a row, times a power of two of their own; its best score G is all that is looked at
    bound     |G - T| <= E = a p + b q + m r, from norms of the token's (a, b, m) and the granule's (p, q, r) roundings
    state     of every 8th granule, one *group*: the two highest G + E with their codes, and the third highest

A true nearest code lies in a granule whose G + E is no lower than the highest G - E: nothing else need be looked at.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_operands import GROUPS, SLACK


@triton.jit
def insert(
    score,  # [BLOCK_N, GROUPS] float32: what comes, with its code and the bound of what else its granule holds
    code,
    inner,
    first,  # the state: highest and second highest score with their codes and inner bounds, the third highest score
    first_code,
    first_inner,
    second,
    second_code,
    second_inner,
    third,
):
    """The state with one more granule of every group."""
    over_first = score > first
    over_second = score > second
    third = tl.maximum(third, tl.minimum(second, score))
    second = tl.maximum(second, tl.minimum(first, score))
    first = tl.maximum(first, score)
    second_code = tl.where(over_first, first_code, tl.where(over_second, code, second_code))
    second_inner = tl.where(over_first, first_inner, tl.where(over_second, inner, second_inner))
    first_code = tl.where(over_first, code, first_code)
    first_inner = tl.where(over_first, inner, first_inner)
    return first, first_code, first_inner, second, second_code, second_inner, third


@triton.jit
def product(
    x,  # [BLOCK_N, BLOCK_D] float16 with RESIDENT, else not looked at
    at_x,  # [BLOCK_N, BLOCK_D] pointers
    at_c,  # [BLOCK_D, BLOCK_K] pointers
    at_bias,  # [BLOCK_K] pointers
    weight,  # [BLOCK_N] float32
    depth,
    BIAS: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_N, BLOCK_K] float32 scores of a tile of codes, in the unit of each code's granule."""
    if RESIDENT:
        score = tl.dot(x, tl.load(at_c))
    else:
        score = tl.zeros([at_x.shape[0], at_c.shape[1]], tl.float32)
        for start in range(0, depth, BLOCK_D):
            score = tl.dot(tl.load(at_x + start), tl.load(at_c + start), score)
    if BIAS == 2:
        score = score - weight[:, None] * tl.load(at_bias)[None, :]
    return score


@triton.jit
def granule_bounds(
    limits_ptr,  # [granules, 4] float32
    granule,  # [GROUPS] int32
    a,  # [BLOCK_N] float32, as are b and weight
    b,
    weight,
):
    """[BLOCK_N, GROUPS] float32, E of each; and [GROUPS] the scale that brings a granule's scores to the common one."""
    limits = limits_ptr + granule.to(tl.int64) * 4
    p = tl.load(limits)
    q = tl.load(limits + 1)
    r = tl.load(limits + 2)
    unit = tl.load(limits + 3)
    return a[:, None] * p[None, :] + b[:, None] * q[None, :] + weight[:, None] * r[None, :] + SLACK, unit


@triton.jit
def upper_of(
    score,  # [..., GROUPS] float32
    unit,  # those of granule_bounds, of shapes that fit
    bound,
):
    """What no true score is above. inf past the reach of fp16, where the score says nothing and may be NaN."""
    return tl.where(bound < float("inf"), score * unit + bound, float("inf"))


@triton.jit(do_not_specialize=["N", "tiles", "tiles_per_split"])
def coarse_kernel(
    tokens_ptr,  # [tokens, depth] float16
    stats_ptr,  # [N, 4] float32
    operand_ptr,  # [codes, depth] float16
    bias_ptr,  # [codes] float32
    limits_ptr,  # [granules, 4] float32
    upper_ptr,  # [N, splits, 2, GROUPS] float32
    code_ptr,  # [N, splits, 2, GROUPS] int32
    inner_ptr,  # [N, splits, 2, GROUPS] float32
    third_ptr,  # [N, splits, GROUPS] float32
    N,
    depth,
    tiles,
    tiles_per_split,
    BIAS: tl.constexpr,
    PACK: tl.constexpr,
    GRANULE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of tokens against one split of the codes. PACK: the place of the best in its granule goes into the lowest
    bits of the scores, and the granule's runner-up is kept too; else a granule is scored again as a whole."""
    BLOCK_K: tl.constexpr = GRANULE * GROUPS
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    a = tl.load(stats_ptr + rows * 4, mask=live, other=0.0)
    b = tl.load(stats_ptr + rows * 4 + 1, mask=live, other=0.0)
    weight = tl.load(stats_ptr + rows * 4 + 2, mask=live, other=0.0)
    first = tl.full([BLOCK_N, GROUPS], float("-inf"), tl.float32)
    second = tl.full([BLOCK_N, GROUPS], float("-inf"), tl.float32)
    third = tl.full([BLOCK_N, GROUPS], float("-inf"), tl.float32)
    first_inner = tl.full([BLOCK_N, GROUPS], float("-inf"), tl.float32)
    second_inner = tl.full([BLOCK_N, GROUPS], float("-inf"), tl.float32)
    first_code = tl.zeros([BLOCK_N, GROUPS], tl.int32)
    second_code = tl.zeros([BLOCK_N, GROUPS], tl.int32)
    groups = tl.arange(0, GROUPS)
    column = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_D)
    at_x = tokens_ptr + rows[:, None] * depth + dims[None, :]
    x = tl.load(at_x) if RESIDENT else at_x
    begin = tl.program_id(1) * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, tiles)):
        first_row = (tl.full([], 0, tl.int64) + tile) * BLOCK_K
        at_c = operand_ptr + first_row * depth + column[None, :] * depth + dims[:, None]
        score = product(x, at_x, at_c, bias_ptr + first_row + column, weight, depth, BIAS, RESIDENT, BLOCK_D)
        score = tl.reshape(score, [BLOCK_N, GRANULE, GROUPS])
        granule = tile * GROUPS + groups
        code = (granule * GRANULE)[None, :] + tl.zeros([BLOCK_N, GROUPS], tl.int32)
        if PACK:
            bits = (score.to(tl.int32, bitcast=True) & -GRANULE) | tl.arange(0, GRANULE)[None, :, None]
            score = bits.to(tl.float32, bitcast=True)
        best = tl.max(score, 1)
        runner = best
        if PACK:
            runner = tl.max(tl.where(score == best[:, None, :], float("-inf"), score), 1)
            code += best.to(tl.int32, bitcast=True) & (GRANULE - 1)
        bound, unit = granule_bounds(limits_ptr, granule, a, b, weight)
        first, first_code, first_inner, second, second_code, second_inner, third = insert(
            upper_of(best, unit[None, :], bound), code, upper_of(runner, unit[None, :], bound),
            first, first_code, first_inner, second, second_code, second_inner, third,
        )  # fmt: skip
    part = (rows * tl.num_programs(1) + tl.program_id(1))[:, None]
    out = part * (2 * GROUPS) + groups[None, :]
    inside = live[:, None] & (groups >= 0)[None, :]
    tl.store(upper_ptr + out, first, mask=inside)
    tl.store(upper_ptr + out + GROUPS, second, mask=inside)
    tl.store(code_ptr + out, first_code, mask=inside)
    tl.store(code_ptr + out + GROUPS, second_code, mask=inside)
    if PACK:
        tl.store(inner_ptr + out, first_inner, mask=inside)
        tl.store(inner_ptr + out + GROUPS, second_inner, mask=inside)
    tl.store(third_ptr + part * GROUPS + groups[None, :], third, mask=inside)
