"""A plain fused search in Triton with products of three TF32 terms, as cuVS runs on Hopper; vqkernels runs another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_K, BLOCK_D = 64, 128, 32


@triton.jit
def _nearest_kernel(
    x,  # [N, D]
    codebook,  # [K, D]
    half_squares,  # [K]
    codes,  # [N]
    n,
    k,
    d,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    best = tl.full([block_n], float("inf"), tl.float32)
    best_code = tl.zeros([block_n], tl.int64)
    for first in range(0, k, block_k):
        columns = first + tl.arange(0, block_k).to(tl.int64)
        products = tl.zeros([block_n, block_k], tl.float32)
        for start in range(0, d, block_d):
            dims = start + tl.arange(0, block_d)
            a = tl.load(x + rows[:, None] * d + dims[None, :], (rows[:, None] < n) & (dims[None, :] < d), 0.0)
            b = tl.load(
                codebook + columns[None, :] * d + dims[:, None], (columns < k)[None, :] & (dims < d)[:, None], 0.0
            )
            products = tl.dot(a, b, products, input_precision="tf32x3")
        score = tl.load(half_squares + columns, columns < k, float("inf"))[None, :] - products
        value, place = tl.min(score, axis=1, return_indices=True)
        better = value < best
        best = tl.where(better, value, best)
        best_code = tl.where(better, first + place, best_code)
    tl.store(codes + rows, best_code, rows < n)


def nearest(
    x: Tensor,  # [N, D] float32
    codebook: Tensor,  # [K, D] float32
    half_squares: Tensor,  # [K]
) -> Tensor:  # int64 [N]
    """The code of the smallest |c|^2 / 2 - x.c, to the precision of three TF32 products."""
    (n, d), k = x.shape, codebook.shape[0]
    codes = torch.empty(n, dtype=torch.int64, device=x.device)
    arguments = (x.contiguous(), codebook.contiguous(), half_squares, codes, n, k, d)
    _nearest_kernel[(triton.cdiv(n, BLOCK_N),)](*arguments, BLOCK_N, BLOCK_K, BLOCK_D)
    return codes
