"""Gradients of the streaming softmax in Triton: what p_nk changes by is found again, never stored as [N, K].

    f_nk = -dentropy_n (l_nk - lse_n) + weight_n dcode_sums_k + <direction_n, c_k>,   r_n = sum_k p_nk f_nk
    dl_nk = p_nk (f_nk - r_n + dlse_n)
    dx_n = scale sum_k dl_nk c_k,   dcodebook_k = scale sum_n dl_nk x_n,   dbias_k = sum_n dl_nk

    mean     r, codes streaming past blocks of tokens; nothing to do for a block where f is zero (cross-entropy)
    token    dx, likewise; one program a chunk of its dims
    code     dcodebook and dbias, tokens streaming past blocks of codes in their order

One pass could sum p f c and p c side by side and take r times the one from the other: as many products, twice the
registers, and a difference of large numbers where the logits of a token are nearly equal. So r comes first.

What limits them, by arithmetic, an H100's rates a multiprocessor and clock; not measured on a GPU yet. A pair (n, k)
takes 3 D multiply-adds of 1068 in tf32 for every product: mean 1, token and code 2 each, each one more with
``direction``; one exponential of 16 a kernel, and about 10 float32 operations of 128. The exponentials and the tensor
cores are level at D = 8 to 16; past that the tensor cores are the limit. Past D = 128 the logits are found again for
each chunk of 128 dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registry import register
from .triton_common import on_device, row_offsets, store_tile
from .triton_configs import Gpu
from .triton_nearest import device_of
from .triton_softmax_tiles import (
    PRECISION,
    STAGES,
    add,
    as_rows,
    gradient_config,
    load_bias,
    load_lse,
    load_rows,
    products,
    score_config,
    softmax_unsupported,
    split_of,
    split_row,
)


@triton.jit
def slopes(
    shifted,  # [., .] float32, l - lse
    along,  # [., .] float32, <direction, c>; used where DIRECTION
    dentropy,  # float32, broadcast over the tokens
    weight,  # float32, over the tokens; used where SUMS
    dcode_sums,  # float32, over the codes
    SUMS: tl.constexpr,
    DIRECTION: tl.constexpr,
):
    """f of every pair."""
    f = -dentropy * shifted
    if SUMS:
        f += weight * dcode_sums
    if DIRECTION:
        f += along
    return f


@triton.jit(do_not_specialize=["N", "K", "codes_per_split"])
def mean_kernel(
    x_ptr,  # [N, D]
    codebook_ptr,  # [K, D]
    bias_ptr,  # [K] or None
    lse_ptr,  # [N]
    dentropy_ptr,  # [N]
    weight_ptr,  # [N]
    dcode_sums_ptr,  # [K] or None
    direction_ptr,  # [N, D] or None
    mean_ptr,  # [splits, N]
    scale,
    N,
    K,
    D,
    codes_per_split,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """r of a block of tokens, over one split of the codes."""
    SUMS: tl.constexpr = dcode_sums_ptr is not None
    DIRECTION: tl.constexpr = direction_ptr is not None
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    lse, finite = load_lse(lse_ptr, rows, N)
    dentropy = tl.load(dentropy_ptr + rows, mask=finite, other=0.0)
    weight = tl.load(weight_ptr + rows, mask=finite, other=0.0)
    x = load_rows(x_ptr, rows, finite, dims, D)
    direction = x
    if DIRECTION:
        direction = load_rows(direction_ptr, rows, finite, dims, D)
    total = tl.zeros([BLOCK_N], tl.float32)
    error = tl.zeros([BLOCK_N], tl.float32)
    begin = tl.program_id(1) * codes_per_split
    end = tl.minimum(begin + codes_per_split, K)
    if not SUMS and not DIRECTION:
        end = tl.where(tl.max((dentropy != 0).to(tl.int32), 0) > 0, end, begin)
    for first in range(begin, end, BLOCK_K):
        codes = first + tl.arange(0, BLOCK_K)
        inside = codes < K
        c = load_rows(codebook_ptr, codes, inside, dims, D)
        score = products(x, c, x_ptr, rows, finite, codebook_ptr, codes, inside, D, RESIDENT, BLOCK_N, BLOCK_K, BLOCK_D)
        along = score
        if DIRECTION:
            along = products(
                direction, c, direction_ptr, rows, finite, codebook_ptr, codes, inside, D,
                RESIDENT, BLOCK_N, BLOCK_K, BLOCK_D,
            )  # fmt: skip
        dcode_sums = tl.zeros([BLOCK_K], tl.float32)
        if SUMS:
            dcode_sums = tl.load(dcode_sums_ptr + codes, mask=inside, other=0.0)
        shifted = score * scale + load_bias(bias_ptr, codes, K)[None, :] - lse[:, None]
        p = tl.exp(shifted)
        f = slopes(shifted, along, dentropy[:, None], weight[:, None], dcode_sums[None, :], SUMS, DIRECTION)
        total, error = add(total, error, tl.sum(tl.where(p > 0, p * f, 0.0), 1))
    tl.store(mean_ptr + split_row(tl.program_id(1), rows, N), total, mask=rows < N)


@triton.jit(do_not_specialize=["N", "K", "codes_per_split", "tokens_per_batch", "stride_b"])
def token_kernel(
    x_ptr,  # [N, D]
    codebook_ptr,  # [K, D]
    bias_ptr,  # [K] or None
    lse_ptr,  # [N]
    dentropy_ptr,  # [N]
    weight_ptr,  # [N]
    shift_ptr,  # [N], dlse - r
    dcode_sums_ptr,  # [K] or None
    direction_ptr,  # [N, D] or None
    dx_ptr,  # [B, T, D], or [splits, N, D]
    scale,
    N,
    K,
    D,
    codes_per_split,
    tokens_per_batch,
    stride_b,
    stride_t,
    stride_d,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dx of a block of tokens and a chunk of BLOCK_O dims, over one split of the codes; NaN where lse is not finite."""
    SUMS: tl.constexpr = dcode_sums_ptr is not None
    DIRECTION: tl.constexpr = direction_ptr is not None
    chunks = tl.cdiv(D, BLOCK_O)
    rows = tl.program_id(0) // chunks * BLOCK_N + tl.arange(0, BLOCK_N)
    out_dims = tl.program_id(0) % chunks * BLOCK_O + tl.arange(0, BLOCK_O)
    dims = tl.arange(0, BLOCK_D)
    lse, finite = load_lse(lse_ptr, rows, N)
    dentropy = tl.load(dentropy_ptr + rows, mask=finite, other=0.0)
    weight = tl.load(weight_ptr + rows, mask=finite, other=0.0)
    shift = tl.load(shift_ptr + rows, mask=finite, other=0.0)
    x = load_rows(x_ptr, rows, finite, dims, D)
    direction = x
    if DIRECTION:
        direction = load_rows(direction_ptr, rows, finite, dims, D)
    dx = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    begin = tl.program_id(1) * codes_per_split
    for first in range(begin, tl.minimum(begin + codes_per_split, K), BLOCK_K):
        codes = first + tl.arange(0, BLOCK_K)
        inside = codes < K
        c = load_rows(codebook_ptr, codes, inside, dims, D)
        score = products(x, c, x_ptr, rows, finite, codebook_ptr, codes, inside, D, RESIDENT, BLOCK_N, BLOCK_K, BLOCK_D)
        along = score
        if DIRECTION:
            along = products(
                direction, c, direction_ptr, rows, finite, codebook_ptr, codes, inside, D,
                RESIDENT, BLOCK_N, BLOCK_K, BLOCK_D,
            )  # fmt: skip
        dcode_sums = tl.zeros([BLOCK_K], tl.float32)
        if SUMS:
            dcode_sums = tl.load(dcode_sums_ptr + codes, mask=inside, other=0.0)
        shifted = score * scale + load_bias(bias_ptr, codes, K)[None, :] - lse[:, None]
        p = tl.exp(shifted)
        f = slopes(shifted, along, dentropy[:, None], weight[:, None], dcode_sums[None, :], SUMS, DIRECTION)
        dl = tl.where(p > 0, p * (f + shift[:, None]), 0.0)
        if not RESIDENT:
            c = load_rows(codebook_ptr, codes, inside, out_dims, D)
        dx += tl.dot(dl, c, input_precision=PRECISION) * scale  # not a sum inside tensor cores, which cut off
    dx = tl.where(finite[:, None], dx, float("nan"))
    at = split_row(tl.program_id(1), tl.zeros([BLOCK_N], tl.int32), N) * D  # zero where there is one split
    at += row_offsets(rows, tokens_per_batch, stride_b, stride_t)
    store_tile(dx_ptr, at, rows < N, out_dims, D, stride_d, dx)


@triton.jit(do_not_specialize=["N", "K", "tokens_per_split"])
def code_kernel(
    x_ptr,  # [N, D]
    codebook_ptr,  # [K, D]
    bias_ptr,  # [K] or None
    lse_ptr,  # [N]
    dentropy_ptr,  # [N]
    weight_ptr,  # [N]
    shift_ptr,  # [N], dlse - r
    dcode_sums_ptr,  # [K] or None
    direction_ptr,  # [N, D] or None
    dcodebook_ptr,  # [splits, K, D]
    dbias_ptr,  # [splits, K]
    scale,
    N,
    K,
    D,
    tokens_per_split,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dcodebook of a block of codes and a chunk of BLOCK_O dims, and dbias, over one split of the tokens."""
    SUMS: tl.constexpr = dcode_sums_ptr is not None
    DIRECTION: tl.constexpr = direction_ptr is not None
    chunks = tl.cdiv(D, BLOCK_O)
    chunk = tl.program_id(0) % chunks
    codes = tl.program_id(0) // chunks * BLOCK_K + tl.arange(0, BLOCK_K)
    out_dims = chunk * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = codes < K
    dims = tl.arange(0, BLOCK_D)
    c = load_rows(codebook_ptr, codes, inside, dims, D)
    bias = load_bias(bias_ptr, codes, K)
    dcode_sums = tl.zeros([BLOCK_K], tl.float32)
    if SUMS:
        dcode_sums = tl.load(dcode_sums_ptr + codes, mask=inside, other=0.0)
    dc = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    dbias = tl.zeros([BLOCK_K], tl.float32)
    error = tl.zeros([BLOCK_K], tl.float32)
    begin = tl.program_id(1) * tokens_per_split
    for first in range(begin, tl.minimum(begin + tokens_per_split, N), BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        lse, finite = load_lse(lse_ptr, rows, N)
        dentropy = tl.load(dentropy_ptr + rows, mask=finite, other=0.0)
        weight = tl.load(weight_ptr + rows, mask=finite, other=0.0)
        shift = tl.load(shift_ptr + rows, mask=finite, other=0.0)
        x = load_rows(x_ptr, rows, finite, dims, D)
        score = products(c, x, codebook_ptr, codes, inside, x_ptr, rows, finite, D, RESIDENT, BLOCK_K, BLOCK_N, BLOCK_D)
        along = score
        if DIRECTION:
            direction = load_rows(direction_ptr, rows, finite, dims, D)
            along = products(
                c, direction, codebook_ptr, codes, inside, direction_ptr, rows, finite, D,
                RESIDENT, BLOCK_K, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        shifted = score * scale + bias[:, None] - lse[None, :]
        p = tl.exp(shifted)
        f = slopes(shifted, along, dentropy[None, :], weight[None, :], dcode_sums[:, None], SUMS, DIRECTION)
        dl = tl.where(p > 0, p * (f + shift[None, :]), 0.0)
        dbias, error = add(dbias, error, tl.sum(dl, 1))
        if not RESIDENT:
            x = load_rows(x_ptr, rows, finite, out_dims, D)
        dc += tl.dot(dl, x, input_precision=PRECISION) * scale
    at = split_row(tl.program_id(1), codes, K)
    store_tile(dcodebook_ptr, at * D, inside, out_dims, D, 1, dc)
    tl.store(dbias_ptr + at, dbias, mask=inside & (chunk == 0))


@dataclass(frozen=True)
class Problem:
    """What every kernel of the gradient reads, contiguous."""

    x: Tensor  # [N, D]
    codebook: Tensor  # [K, D]
    bias: Tensor | None  # [K]
    scale: float
    lse: Tensor  # [N]
    dentropy: Tensor  # [N]
    weight: Tensor  # [N]
    dcode_sums: Tensor | None  # [K]
    direction: Tensor | None  # [N, D]
    gpu: Gpu


def mean_slopes(
    problem: Problem,
) -> Tensor:  # [N]
    """r of each token."""
    p, (n, dim), k = problem, problem.x.shape, problem.codebook.shape[0]
    config = score_config(dim, p.gpu)
    blocks = triton.cdiv(n, config.keep)
    split = split_of(p.x, blocks, k, config)
    mean = p.x.new_empty(split.count, n)
    mean_kernel[(blocks, split.count)](
        p.x, p.codebook, p.bias, p.lse, p.dentropy, p.weight, p.dcode_sums, p.direction, mean,
        p.scale, n, k, dim, split.length,
        RESIDENT=config.resident, BLOCK_N=config.keep, BLOCK_K=config.stream, BLOCK_D=config.block_d,
        num_warps=config.num_warps, num_stages=STAGES,
    )  # fmt: skip
    return mean.sum(0)


def token_gradient(
    problem: Problem,
    shift: Tensor,  # [N], dlse - r
    dx: Tensor,  # [B, T, D], written
) -> None:
    """Straight into dx, or by way of the splits' parts."""
    p, (n, dim), k = problem, problem.x.shape, problem.codebook.shape[0]
    config = gradient_config(dim, p.gpu)
    blocks = triton.cdiv(n, config.keep) * triton.cdiv(dim, config.chunk)
    split = split_of(p.x, blocks, k, config)
    out = dx if split.count == 1 else p.x.new_empty(split.count, n, dim)
    where = (dx.shape[1], *dx.stride()) if split.count == 1 else (n, 0, dim, 1)
    token_kernel[(blocks, split.count)](
        p.x, p.codebook, p.bias, p.lse, p.dentropy, p.weight, shift, p.dcode_sums, p.direction, out,
        p.scale, n, k, dim, split.length, *where,
        RESIDENT=config.resident, BLOCK_N=config.keep, BLOCK_K=config.stream, BLOCK_D=config.block_d,
        BLOCK_O=config.chunk, num_warps=config.num_warps, num_stages=STAGES,
    )  # fmt: skip
    if split.count > 1:
        dx.copy_(out.sum(0).view(dx.shape))


def code_gradient(
    problem: Problem,
    shift: Tensor,  # [N], dlse - r
) -> tuple[Tensor, Tensor]:  # dcodebook [K, D], dbias [K]
    """Parts of a small codebook's splits are joined in order; they take no more memory than the programs' registers."""
    p, (n, dim), k = problem, problem.x.shape, problem.codebook.shape[0]
    config = gradient_config(dim, p.gpu)
    blocks = triton.cdiv(k, config.keep) * triton.cdiv(dim, config.chunk)
    split = split_of(p.x, blocks, n, config)
    dcodebook, dbias = p.x.new_empty(split.count, k, dim), p.x.new_empty(split.count, k)
    code_kernel[(blocks, split.count)](
        p.x, p.codebook, p.bias, p.lse, p.dentropy, p.weight, shift, p.dcode_sums, p.direction, dcodebook, dbias,
        p.scale, n, k, dim, split.length,
        RESIDENT=config.resident, BLOCK_N=config.stream, BLOCK_K=config.keep, BLOCK_D=config.block_d,
        BLOCK_O=config.chunk, num_warps=config.num_warps, num_stages=STAGES,
    )  # fmt: skip
    return (dcodebook[0], dbias[0]) if split.count == 1 else (dcodebook.sum(0), dbias.sum(0))


def softmax_backward(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
    lse: Tensor,  # [B, T]
    dlse: Tensor,  # [B, T]
    dentropy: Tensor,  # [B, T]
    weight: Tensor,  # [B, T]
    dcode_sums: Tensor | None,  # [K]
    direction: Tensor | None,  # [B, T, D]
    need_codebook: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # dx [B, T, D] laid out like x, dcodebook [K, D], dbias [K]
    """Gradients of the logits' owners; the last two are empty unless asked for. Tokens whose lse is not finite: NaN."""
    (k, dim), dx = codebook.shape, torch.empty_like(x)
    if lse.numel() == 0:
        size = k if need_codebook else 0
        return dx, x.new_zeros(size, dim), x.new_zeros(size)
    problem = Problem(
        as_rows(x), codebook, bias, scale, flat(lse), flat(dentropy), flat(weight),
        dcode_sums, None if direction is None else as_rows(direction), device_of(x),
    )  # fmt: skip
    with on_device(x):
        shift = flat(dlse) - mean_slopes(problem)
        token_gradient(problem, shift, dx)
        if not need_codebook:
            return dx, x.new_empty(0, dim), x.new_empty(0)
        return dx, *code_gradient(problem, shift)


def flat(
    per_token: Tensor,  # [B, T]
) -> Tensor:  # [N] contiguous
    """One number a token, token after token."""
    return per_token.reshape(-1).contiguous()


register("softmax_backward", "triton", softmax_backward, supports=softmax_unsupported)
