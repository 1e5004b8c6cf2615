"""Streaming softmax over the codebook in Triton: log-sum-exp and entropy, sums for each code, sampling.

    l_nk = scale <x_n, c_k> + bias_k,   p_n = softmax_k(l_n),   never an [N, K] array

A program keeps a block of tokens (or codes) and lets the codes (or tokens) pass tile by tile. Where there are too few
blocks for the device, parts of what passes go to programs of their own and their results are joined in order: no
atomics, the same bits in every run on a device.

What limits them, by arithmetic, an H100's rates a multiprocessor and clock; not measured on a GPU yet. A pair (n, k)
takes 3 D multiply-adds of 1068 in tf32, one exponential of 16, and about 7 (forward), 4 (sums), 5 (each of sampling's
two passes) float32 operations of 128. At D = 16 each pass takes 0.05 to 0.06 clocks; from D = 32 on the tensor cores
are the limit. A tile of 64 codes is 256 D bytes from L2, 5 D clocks at 50 bytes a clock, beside 64 x 64 x 3 D / 1068 =
11.5 D of products: memory is no limit while blocks of tokens that run at once pass the same codes, which the grid's
order makes likely.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registry import register
from .triton_common import on_device
from .triton_nearest import device_of
from .triton_softmax_tiles import (
    STAGES,
    add,
    as_rows,
    load_bias,
    load_lse,
    load_rows,
    products,
    sample_config,
    score_config,
    softmax_unsupported,
    split_of,
    split_row,
)

LOWEST = tl.constexpr(-1e30)  # the first maximum; not -inf, so that its difference to any logit is a number
NO_CODE = tl.constexpr(0x7FFFFFFF)
MERGE_ROWS = 128


# ------------------------------------------------------------------------------------- log-sum-exp and entropy


@triton.jit
def finish_forward(
    top,  # [R] float32, the maximum m
    total,  # [R] float32, s = sum exp(l - m)
    error,  # [R] float32, what s lacks
    moment,  # [R] float32, sum exp(l - m) (l - m)
):
    """lse = m + log s and the entropy log s - moment / s, both NaN where s is zero or no number.

    Where one code has all the weight, s is 1 and little: that little is in the error, which log s takes to first order.
    """
    log = tl.log(total) + error / total
    usual = (total > 0) & (total < float("inf"))
    entropy = tl.maximum(log - moment / total, 0.0)
    return tl.where(usual, top + log, float("nan")), tl.where(usual, entropy, float("nan"))


@triton.jit(do_not_specialize=["N", "K", "codes_per_split"])
def forward_kernel(
    x_ptr,  # [N, D]
    codebook_ptr,  # [K, D]
    bias_ptr,  # [K] or None
    lse_ptr,  # [N]
    entropy_ptr,  # [N]
    part_ptr,  # [splits, N, 4], written instead where SPLIT: m, s, its error and the moment
    scale,
    N,
    K,
    D,
    codes_per_split,
    SPLIT: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of tokens against one split of the codes: running maximum, sum and first moment of exp(l - maximum)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    dims = tl.arange(0, BLOCK_D)
    x = load_rows(x_ptr, rows, live, dims, D)
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    total_error = tl.zeros([BLOCK_N], tl.float32)
    moment = tl.zeros([BLOCK_N], tl.float32)
    moment_error = tl.zeros([BLOCK_N], tl.float32)
    begin = tl.program_id(1) * codes_per_split
    for first in range(begin, tl.minimum(begin + codes_per_split, K), BLOCK_K):
        codes = first + tl.arange(0, BLOCK_K)
        inside = codes < K
        c = load_rows(codebook_ptr, codes, inside, dims, D)
        score = products(
            x, c, x_ptr, rows, live, codebook_ptr, codes, inside, D, RESIDENT, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION
        )
        score = score * scale + load_bias(bias_ptr, codes, K)[None, :]
        higher = tl.maximum(top, tl.max(score, 1))
        lift = top - higher
        shrink = tl.exp(lift)
        score = score - higher[:, None]
        p = tl.exp(score)
        weighted = tl.sum(tl.where(p > 0, p * score, 0.0), 1)  # where p is zero the logit may be -inf
        moment, moment_error = add((moment + lift * total) * shrink, moment_error * shrink, weighted)
        total, total_error = add(total * shrink, total_error * shrink, tl.sum(p, 1))
        top = higher
    if SPLIT:
        part = part_ptr + split_row(tl.program_id(1), rows, N) * 4
        tl.store(part, top, mask=live)
        tl.store(part + 1, total, mask=live)
        tl.store(part + 2, total_error, mask=live)
        tl.store(part + 3, moment, mask=live)
    else:
        lse, entropy = finish_forward(top, total, total_error, moment)
        tl.store(lse_ptr + rows, lse, mask=live)
        tl.store(entropy_ptr + rows, entropy, mask=live)


@triton.jit(do_not_specialize=["N", "splits"])
def merge_kernel(
    part_ptr,  # [splits, N, 4]
    lse_ptr,  # [N]
    entropy_ptr,  # [N]
    N,
    splits,
    BLOCK_N: tl.constexpr,
):
    """Joins the splits of each token in order, relative to the highest maximum."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(part_ptr + split_row(split, rows, N) * 4, mask=live, other=0.0))
    total = tl.zeros([BLOCK_N], tl.float32)
    total_error = tl.zeros([BLOCK_N], tl.float32)
    moment = tl.zeros([BLOCK_N], tl.float32)
    for split in range(splits):
        part = part_ptr + split_row(split, rows, N) * 4
        lift = tl.load(part, mask=live, other=0.0) - top
        shrink = tl.exp(lift)
        some = tl.load(part + 1, mask=live, other=1.0) * shrink
        error = tl.load(part + 2, mask=live, other=0.0) * shrink
        moment += tl.load(part + 3, mask=live, other=0.0) * shrink + tl.where(some > 0, some * lift, 0.0)
        total, total_error = add(total, total_error + error, some)
    lse, entropy = finish_forward(top, total, total_error, moment)
    tl.store(lse_ptr + rows, lse, mask=live)
    tl.store(entropy_ptr + rows, entropy, mask=live)


def softmax_forward(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
) -> tuple[Tensor, Tensor]:  # lse [B, T], entropy [B, T]
    """log sum_k exp l_k and -sum_k p_k log p_k of each token, in one pass over the codes (Milakov, Gimelshein 2018)."""
    tokens, (k, dim) = as_rows(x), codebook.shape
    n, config = tokens.shape[0], score_config(dim, device_of(x))
    lse, entropy = x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
    if n > 0:
        blocks = triton.cdiv(n, config.keep)
        split = split_of(x, blocks, k, config)
        parts = x.new_empty(split.count, n, 4) if split.count > 1 else lse
        with on_device(x):
            forward_kernel[(blocks, split.count)](
                tokens, codebook, bias, lse, entropy, parts, scale, n, k, dim, split.length,
                SPLIT=split.count > 1, RESIDENT=config.resident, BLOCK_N=config.keep, BLOCK_K=config.stream,
                BLOCK_D=config.block_d, PRECISION=config.precision, num_warps=config.num_warps, num_stages=STAGES,
            )  # fmt: skip
            if split.count > 1:
                merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](parts, lse, entropy, n, split.count, BLOCK_N=MERGE_ROWS)
    return lse, entropy


# ------------------------------------------------------------------------------------- sums over the tokens


@triton.jit(do_not_specialize=["N", "K", "tokens_per_split"])
def code_sums_kernel(
    x_ptr,  # [N, D]
    codebook_ptr,  # [K, D]
    bias_ptr,  # [K] or None
    lse_ptr,  # [N]
    weight_ptr,  # [N]
    sums_ptr,  # [splits, K]
    scale,
    N,
    K,
    D,
    tokens_per_split,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of codes against one split of the tokens, in their order."""
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = codes < K
    dims = tl.arange(0, BLOCK_D)
    c = load_rows(codebook_ptr, codes, inside, dims, D)
    bias = load_bias(bias_ptr, codes, K)
    total = tl.zeros([BLOCK_K], tl.float32)
    error = tl.zeros([BLOCK_K], tl.float32)
    begin = tl.program_id(1) * tokens_per_split
    for first in range(begin, tl.minimum(begin + tokens_per_split, N), BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        lse, finite = load_lse(lse_ptr, rows, N)
        weight = tl.load(weight_ptr + rows, mask=finite, other=0.0)
        x = load_rows(x_ptr, rows, finite, dims, D)
        score = products(
            c, x, codebook_ptr, codes, inside, x_ptr, rows, finite, D, RESIDENT, BLOCK_K, BLOCK_N, BLOCK_D, PRECISION
        )
        p = tl.exp(score * scale + bias[:, None] - lse[None, :])
        total, error = add(total, error, tl.sum(tl.where(p > 0, p * weight[None, :], 0.0), 1))
    tl.store(sums_ptr + split_row(tl.program_id(1), codes, K), total, mask=inside)


def softmax_code_sums(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
    lse: Tensor,  # [B, T]
    weight: Tensor,  # [B, T]
) -> Tensor:  # [K]
    """sum_n weight_n p_nk of each code; tokens whose lse is not finite have no weight."""
    tokens, (k, dim) = as_rows(x), codebook.shape
    n, config = tokens.shape[0], score_config(dim, device_of(x))
    if n == 0:
        return x.new_zeros(k)
    blocks = triton.cdiv(k, config.keep)
    split = split_of(x, blocks, n, config)
    sums = x.new_empty(split.count, k)
    with on_device(x):
        code_sums_kernel[(blocks, split.count)](
            tokens, codebook, bias, lse.contiguous(), weight.contiguous(), sums, scale, n, k, dim, split.length,
            RESIDENT=config.resident, BLOCK_N=config.stream, BLOCK_K=config.keep, BLOCK_D=config.block_d,
            PRECISION=config.precision, num_warps=config.num_warps, num_stages=STAGES,
        )  # fmt: skip
    return sums.sum(0)


# ------------------------------------------------------------------------------------- sampling


@triton.jit
def crossing(
    p,  # [BLOCK_N, BLOCK_K] float32
    codes,  # [BLOCK_K] int32
    left,  # [BLOCK_N] float32, what the sum has to exceed
):
    """[BLOCK_N] int32: the first code at which the sum exceeds ``left``, else the last that adds to it, or -1.

    Never a code of probability zero.
    """
    over = (tl.cumsum(p, 1) > left[:, None]) & (p > 0)
    first = tl.min(tl.where(over, codes[None, :], NO_CODE), 1)
    last = tl.max(tl.where(p > 0, codes[None, :], -1), 1)
    return tl.minimum(first, last)


@triton.jit
def place(
    part_ptr,  # [splits, N, 2]: the maximum m of each split, and sum exp(l - m)
    rows,  # [BLOCK_N] int32
    finite,  # [BLOCK_N] bool
    uniform,  # [BLOCK_N] float32
    split,
    N,
    BLOCK_N: tl.constexpr,
):
    """Each token's maximum; what the sum of exp(l - maximum) over this split has to exceed; whether that is here.

    Of the whole sum, not of one: it has the rounding of the logits, and 1 would lie past its end. The splits, added in
    order, say the same in every program: each token is some one program's.
    """
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    for other in range(tl.num_programs(1)):
        top = tl.maximum(top, tl.load(part_ptr + split_row(other, rows, N) * 2, mask=finite, other=0.0))
    whole = tl.zeros([BLOCK_N], tl.float32)
    before = tl.zeros([BLOCK_N], tl.float32)
    after = tl.zeros([BLOCK_N], tl.float32)
    for other in range(tl.num_programs(1)):
        part = part_ptr + split_row(other, rows, N) * 2
        shrink = tl.exp(tl.load(part, mask=finite, other=0.0) - top)
        before = tl.where(other == split, whole, before)
        whole += tl.load(part + 1, mask=finite, other=0.0) * shrink
        after = tl.where(other == split, whole, after)
    target = tl.minimum(uniform * whole, whole * (1 - 2.0**-23))  # below the whole, also where rounding says it is not
    return top, target - before, finite & (before <= target) & (target < after)


@triton.jit(do_not_specialize=["N", "K", "codes_per_split"])
def sample_kernel(
    x_ptr,  # [N, D]
    codebook_ptr,  # [K, D]
    bias_ptr,  # [K] or None
    lse_ptr,  # [N]
    uniform_ptr,  # [N]
    part_ptr,  # [splits, N, 2]: the maximum of each split, and its sum of exp(l - maximum)
    codes_ptr,  # [N] int64
    scale,
    N,
    K,
    D,
    codes_per_split,
    MASS: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """MASS: the part of one split of the codes. Else the code of those tokens of the block whose split this is."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    begin = split * codes_per_split
    end = tl.minimum(begin + codes_per_split, K)
    dims = tl.arange(0, BLOCK_D)
    _, finite = load_lse(lse_ptr, rows, N)
    if MASS:
        top = tl.full([BLOCK_N], LOWEST, tl.float32)
    else:
        uniform = tl.load(uniform_ptr + rows, mask=finite, other=0.0)
        top, left, mine = place(part_ptr, rows, finite, uniform, split, N, BLOCK_N)
        code = tl.full([BLOCK_N], -1, tl.int32)
        end = tl.where(tl.max(mine.to(tl.int32), 0) > 0, end, begin)  # no token of this block lands here
    x = load_rows(x_ptr, rows, finite, dims, D)
    total = tl.zeros([BLOCK_N], tl.float32)
    error = tl.zeros([BLOCK_N], tl.float32)
    for first in range(begin, end, BLOCK_K):
        codes = first + tl.arange(0, BLOCK_K)
        inside = codes < K
        c = load_rows(codebook_ptr, codes, inside, dims, D)
        score = products(
            x, c, x_ptr, rows, finite, codebook_ptr, codes, inside, D, RESIDENT, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION
        )
        score = score * scale + load_bias(bias_ptr, codes, K)[None, :]
        if MASS:
            higher = tl.maximum(top, tl.max(score, 1))
            shrink = tl.exp(top - higher)
            total, error, top = total * shrink, error * shrink, higher
        p = tl.exp(score - top[:, None])
        new, error = add(total, error, tl.sum(p, 1))
        if not MASS:
            # from half way on, so that there is a code where rounding leaves the whole split's sum below ``left``
            near = mine & (total <= left) & (2 * new >= left)
            if tl.max(near.to(tl.int32), 0) > 0:
                found = crossing(p, codes, left - total)
                code = tl.where(near & (found >= 0), found, code)
        total = new
    if MASS:
        part = part_ptr + split_row(split, rows, N) * 2
        tl.store(part, top, mask=finite)
        tl.store(part + 1, total, mask=finite)
    else:
        tl.store(codes_ptr + rows, code.to(tl.int64), mask=mine)


def softmax_sample(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
    lse: Tensor,  # [B, T]
    uniform: Tensor,  # [B, T]
) -> Tensor:  # int64 [B, T]
    """The first code at which the running sum of p exceeds ``uniform``, at most the last with any; -1 where lse is not
    finite. Nothing else of lse is used: its rounding, 5e-4 at 10^4, would be that of every p.

    Two passes over the codes, as the draw needs their whole sum.
    """
    tokens, (k, dim) = as_rows(x), codebook.shape
    n, config = tokens.shape[0], sample_config(dim, device_of(x))
    codes = torch.full(x.shape[:2], -1, dtype=torch.int64, device=x.device)
    if n > 0:
        blocks = triton.cdiv(n, config.keep)
        split = split_of(x, blocks, k, config)
        lse, uniform, parts = lse.contiguous(), uniform.contiguous(), x.new_empty(split.count, n, 2)
        with on_device(x):
            for only_mass in (True, False):
                sample_kernel[(blocks, split.count)](
                    tokens, codebook, bias, lse, uniform, parts, codes, scale, n, k, dim, split.length,
                    MASS=only_mass, RESIDENT=config.resident, BLOCK_N=config.keep, BLOCK_K=config.stream,
                    BLOCK_D=config.block_d, PRECISION=config.precision, num_warps=config.num_warps, num_stages=STAGES,
                )  # fmt: skip
    return codes


for _op in (softmax_forward, softmax_code_sums, softmax_sample):
    register(_op.__name__, "triton", _op, supports=softmax_unsupported)
