"""What the Triton kernels share: token addressing, tiles, and who may run them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
MIN_CAPABILITY = (8, 0)  # before Ampere these kernels spill
MAX_TOKENS = 1 << 30  # token numbers and their counts are int32, addresses int64
MAX_CODES, MAX_DIM = 1 << 30, 1 << 16  # int32 code ids in registers; exact digit sums in int64 and float64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def row_offsets(
    rows,  # token numbers in 0 .. B * T - 1, below MAX_TOKENS, any shape
    tokens_per_batch,
    stride_b,
    stride_t,
):
    """Where each token of a strided [B, T, D] tensor begins, as int64; by 32-bit divisions, which need no call."""
    batch = rows.to(tl.int32) // tokens_per_batch
    token = rows.to(tl.int32) % tokens_per_batch
    return batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_t


@triton.jit
def load_tile(
    ptr,  # [..., D]
    offsets,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    dims,  # [BLOCK_D] int32
    D,
    stride_d,
):
    """[BLOCK_N, BLOCK_D] float32; zero past the last row and dim."""
    where = ptr + offsets[:, None] + dims.to(tl.int64)[None, :] * stride_d
    return tl.load(where, mask=live[:, None] & (dims < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    ptr,  # [..., D]
    offsets,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    dims,  # [BLOCK_D] int32
    D,
    stride_d,
    value,  # [BLOCK_N, BLOCK_D] float32
):
    """Round to the tensor's type and store what lies inside it."""
    where = ptr + offsets[:, None] + dims.to(tl.int64)[None, :] * stride_d
    tl.store(where, value.to(ptr.dtype.element_ty), mask=live[:, None] & (dims < D)[None, :])


@dataclass(frozen=True)
class TileConfig:
    """Rows (tokens or codes) and dims of one program's tile in the kernels that stream their input."""

    rows: int
    dims: int
    num_warps: int


# every configuration that tile_for can return; the compile test builds each for each architecture
TILES = (TileConfig(rows=64, dims=16, num_warps=4), TileConfig(rows=16, dims=64, num_warps=4))


def tile_for(dim: int) -> TileConfig:
    """1024 elements either way: tall where D is small."""
    return TILES[0] if dim <= 16 else TILES[1]


def readable(
    x: Tensor,  # any shape
) -> Tensor:
    """``x``; as float32 where the interpreter would multiply the bits of bfloat16 numbers instead of their values."""
    return x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def unsupported(x: Tensor) -> str | None:
    """One line on why these kernels cannot take a tensor of this type, device and size, or None."""
    if x.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if x.dim() == 3 and x.shape[0] * x.shape[1] > MAX_TOKENS:
        return f"takes up to {MAX_TOKENS} tokens, not {x.shape[0] * x.shape[1]}"
    if x.device.type == "cpu":
        return None if INTERPRETED else "needs CUDA tensors (or TRITON_INTERPRET=1 in the environment)"
    if x.device.type != "cuda" or torch.version.hip:
        return f"needs CUDA tensors, not {x.device.type}"
    if torch.cuda.get_device_capability(x.device) < MIN_CAPABILITY:
        return f"needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer"
    return None
