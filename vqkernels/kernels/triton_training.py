"""Lookup of the chosen codes and the gradient for the tokens in Triton: tiles of tokens by chunks of D."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registry import register
from .triton_common import load_tile, on_device, readable, row_offsets, store_tile, tile_for, unsupported


@triton.jit(do_not_specialize=["tokens_per_batch", "x_stride_b", "out_stride_b", "N", "K"])
def gather_kernel(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    codes_ptr,  # [N] int64
    quantized_ptr,  # [B, T, D]
    error_ptr,  # [N] float32
    tokens_per_batch,
    x_stride_b,
    x_stride_t,
    x_stride_d,
    out_stride_b,
    out_stride_t,
    out_stride_d,
    N,
    K,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of the codebook and their squared errors; NaN for codes outside it."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    x_offsets = row_offsets(rows, tokens_per_batch, x_stride_b, x_stride_t)
    out_offsets = row_offsets(rows, tokens_per_batch, out_stride_b, out_stride_t)
    code = tl.load(codes_ptr + rows, mask=live, other=-1)
    known = live & (code >= 0) & (code < K)
    error = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, x_offsets, live, dims, D, x_stride_d)
        q = load_tile(codebook_ptr, code * D, known, dims, D, 1)
        error += tl.sum((x - q) * (x - q), 1)
        store_tile(quantized_ptr, out_offsets, live, dims, D, out_stride_d, tl.where(known[:, None], q, float("nan")))
    tl.store(error_ptr + rows, tl.where(known, error, float("nan")), mask=live)


def gather(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    codes: Tensor,  # [B, T]
) -> tuple[Tensor, Tensor]:  # quantized [B, T, D] laid out like x, error float32 [B, T]
    """Codebook rows and the squared error of each; code -1 gives NaN."""
    dtype, x, codebook = x.dtype, readable(x), readable(codebook)
    quantized = torch.empty_like(x)
    error = torch.empty(codes.shape, dtype=torch.float32, device=x.device)
    n, (k, dim) = codes.numel(), codebook.shape
    if n > 0:
        tile = tile_for(dim)
        with on_device(x):
            gather_kernel[(triton.cdiv(n, tile.rows),)](
                x, codebook.contiguous(), codes.contiguous(), quantized, error,
                x.shape[1], *x.stride(), *quantized.stride(), n, k, dim,
                BLOCK_N=tile.rows, BLOCK_D=tile.dims, num_warps=tile.num_warps,
            )  # fmt: skip
    return quantized.to(dtype), error


@triton.jit
def rotation_sums(
    x_ptr,  # [B, T, D]
    q_ptr,  # [B, T, D]
    g_ptr,  # [B, T, D]
    x_offsets,  # [BLOCK_N] int64
    q_offsets,  # [BLOCK_N] int64
    g_offsets,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    x_stride_d,
    q_stride_d,
    g_stride_d,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """|e|, |q|, |u + v|^2, g.(u + v) and g.v of each token, u and v the directions of e and q.

    Squares are summed in float64, where none of a float32 over- or underflows.
    """
    e_square = tl.zeros([BLOCK_N], tl.float64)
    q_square = tl.zeros([BLOCK_N], tl.float64)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        e = load_tile(x_ptr, x_offsets, live, dims, D, x_stride_d).to(tl.float64)
        q = load_tile(q_ptr, q_offsets, live, dims, D, q_stride_d).to(tl.float64)
        e_square += tl.sum(e * e, 1)
        q_square += tl.sum(q * q, 1)
    e_norm = tl.sqrt(e_square).to(tl.float32)
    q_norm = tl.sqrt(q_square).to(tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    along_middle = tl.zeros([BLOCK_N], tl.float32)
    along_v = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        u = load_tile(x_ptr, x_offsets, live, dims, D, x_stride_d) / e_norm[:, None]
        v = load_tile(q_ptr, q_offsets, live, dims, D, q_stride_d) / q_norm[:, None]
        g = load_tile(g_ptr, g_offsets, live, dims, D, g_stride_d)
        square += tl.sum((u + v) * (u + v), 1)
        along_middle += tl.sum(g * (u + v), 1)
        along_v += tl.sum(g * v, 1)
    return e_norm, q_norm, square, along_middle, along_v


@triton.jit(do_not_specialize=["tokens_per_batch", "x_stride_b", "g_stride_b", "out_stride_b", "N"])
def backward_kernel(
    x_ptr,  # [B, T, D]
    quantized_ptr,  # [B, T, D] laid out like dx
    codes_ptr,  # [N] int64
    dquantized_ptr,  # [B, T, D], not looked at without HAS_GRADIENT
    derror_ptr,  # [N] float32, not looked at without HAS_ERROR
    mask_ptr,  # [N] bool, not looked at without HAS_MASK
    dx_ptr,  # [B, T, D]
    tokens_per_batch,
    x_stride_b,
    x_stride_t,
    x_stride_d,
    g_stride_b,
    g_stride_t,
    g_stride_d,
    out_stride_b,
    out_stride_t,
    out_stride_d,
    N,
    D,
    ROTATION: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_ERROR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx = g + 2 derror (x - q), or with the rotation trick lam (g - 2 (g.w) w + 2 (g.v) u) + 2 derror (x - q).

    Zero where a token is masked; ``ROTATION`` only with ``HAS_GRADIENT``.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    x_at = row_offsets(rows, tokens_per_batch, x_stride_b, x_stride_t)
    g_at = row_offsets(rows, tokens_per_batch, g_stride_b, g_stride_t)
    out_at = row_offsets(rows, tokens_per_batch, out_stride_b, out_stride_t)
    known = tl.load(codes_ptr + rows, mask=live, other=-1) >= 0
    real = live
    if HAS_MASK:
        real = live & (tl.load(mask_ptr + rows, mask=live, other=0) != 0)
    pull = tl.zeros([BLOCK_N], tl.float32)
    if HAS_ERROR:
        pull = 2.0 * tl.load(derror_ptr + rows, mask=live, other=0.0)
    if ROTATION:
        e_norm, q_norm, square, along_middle, along_v = rotation_sums(
            x_ptr, quantized_ptr, dquantized_ptr, x_at, out_at, g_at, live,
            x_stride_d, out_stride_d, g_stride_d, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        turns = (e_norm > 0) & (q_norm > 0)
        reflect = tl.where(square < 1e-12, 0.0, 2.0 * along_middle / square)  # u = -v has no middle
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, x_at, live, dims, D, x_stride_d)
        q = load_tile(quantized_ptr, out_at, live, dims, D, out_stride_d)
        g = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if HAS_GRADIENT:
            g = load_tile(dquantized_ptr, g_at, live, dims, D, g_stride_d)
        through = g
        if ROTATION:
            u = x / e_norm[:, None]
            v = q / q_norm[:, None]
            turned = (q_norm / e_norm)[:, None] * (g - reflect[:, None] * (u + v) + 2.0 * along_v[:, None] * u)
            through = tl.where(turns[:, None], turned, g)
        dx = tl.where(known[:, None], through + pull[:, None] * (x - q), g)
        if HAS_MASK:
            dx = tl.where(real[:, None], dx, 0.0)
        store_tile(dx_ptr, out_at, live, dims, D, out_stride_d, dx)


def quantize_backward(
    x: Tensor,  # [B, T, D]
    quantized: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    dquantized: Tensor | None,  # [B, T, D]
    derror: Tensor | None,  # float32 [B, T]
    rotation: bool,
    mask: Tensor | None = None,  # bool [B, T]
) -> Tensor:  # dx [B, T, D] laid out like x
    """Gradient for the tokens (rotation trick: Fifty et al. 2024, sec. 4.2); code -1 passes ``dquantized`` through."""
    dtype, x, quantized = x.dtype, readable(x), readable(quantized)
    gradient = x if dquantized is None else readable(dquantized)  # any pointer where there is none
    error = codes if derror is None else derror.contiguous()
    dx = torch.empty_like(x)
    if quantized.stride() != dx.stride():  # never the case for what gather returned
        quantized = torch.empty_like(dx).copy_(quantized)
    n, dim = codes.numel(), x.shape[2]
    if n > 0:
        tile = tile_for(dim)
        with on_device(x):
            backward_kernel[(triton.cdiv(n, tile.rows),)](
                x, quantized, codes.contiguous(), gradient, error, codes if mask is None else mask.contiguous(), dx,
                x.shape[1], *x.stride(), *gradient.stride(), *dx.stride(), n, dim,
                ROTATION=rotation and dquantized is not None, HAS_GRADIENT=dquantized is not None,
                HAS_ERROR=derror is not None, HAS_MASK=mask is not None,
                BLOCK_N=tile.rows, BLOCK_D=tile.dims, num_warps=tile.num_warps,
            )  # fmt: skip
    return dx.to(dtype)


def _supports(x: Tensor, *_rest: object) -> str | None:
    return unsupported(x)


register("gather", "triton", gather, supports=_supports)
register("quantize_backward", "triton", quantize_backward, supports=_supports)
