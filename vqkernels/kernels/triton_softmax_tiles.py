"""What the streaming-softmax kernels share: products of tiles, logits, sums, sizes of tiles, and who may run them.

Products are "tf32x3": each float32 as two tf32 terms, three tensor-core products. Logits in the hundreds leave no room
for less: a probability is off, relative to itself, by the absolute error of its logit. Plain tf32 keeps 11 bits: 0.1 of
a logit of 200. Three products keep 21 to 22, no less than float32 sums over D do; float32 without tensor cores ("ieee")
would take some three times as long, by the rates. The interpreter multiplies in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import MAX_CODES, MAX_DIM, unsupported
from .triton_configs import count_splits

PRECISION = tl.constexpr("tf32x3")


@triton.jit
def load_rows(
    ptr,  # [rows, D] contiguous
    rows,  # [R] int32
    live,  # [R] bool
    dims,  # [BLOCK_D] int32
    D,
):
    """[R, BLOCK_D] float32; zero in rows that are not live and past the last dim."""
    where = ptr + rows.to(tl.int64)[:, None] * D + dims[None, :]
    return tl.load(where, mask=live[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def products(
    kept,  # [R, BLOCK_D] float32, the program's own rows and
    passing,  # [C, BLOCK_D] float32, those that pass: both used where RESIDENT, when all dims are one step
    kept_ptr,  # [rows, D]
    kept_rows,  # [R] int32
    kept_live,  # [R] bool
    ptr,  # [rows, D]
    rows,  # [C] int32
    live,  # [C] bool
    D,
    RESIDENT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[R, C] float32: every kept row times every row that passes."""
    if RESIDENT:
        total = tl.dot(kept, tl.trans(passing), input_precision=PRECISION)
    else:
        total = tl.zeros([R, C], tl.float32)
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            own = load_rows(kept_ptr, kept_rows, kept_live, dims, D)
            total = tl.dot(own, tl.trans(load_rows(ptr, rows, live, dims, D)), total, input_precision=PRECISION)
    return total


@triton.jit
def load_bias(
    bias_ptr,  # [K], or None
    codes,  # [BLOCK_K] int32
    K,
):
    """[BLOCK_K] float32; -inf past the last code, whose probability is then zero."""
    if bias_ptr is None:
        bias = tl.where(codes < K, 0.0, float("-inf"))
    else:
        bias = tl.load(bias_ptr + codes, mask=codes < K, other=float("-inf"))
    return bias


@triton.jit
def load_lse(
    lse_ptr,  # [N]
    rows,  # [BLOCK_N] int32
    N,
):
    """[BLOCK_N] float32, and which tokens are there with finite numbers; NaN for the others, so that no p of theirs
    is above zero."""
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=float("nan"))
    finite = tl.abs(lse) < float("inf")
    return tl.where(finite, lse, float("nan")), finite


@triton.jit
def split_row(
    split,
    rows,  # [R] int32
    count,
):
    """[R] int64: where the rows of a split are among [splits, count]."""
    return (tl.full([], 0, tl.int64) + split) * count + rows


@triton.jit
def add(
    total,  # [R] float32
    error,  # [R] float32, what total has too much
    value,  # [R] float32
):
    """Kahan's sum: hundreds of thousands of codes, added tile by tile, would cost float32 two digits."""
    value = value - error
    new = total + value
    return new, (new - total) - value


@dataclass(frozen=True)
class SoftmaxConfig:
    """One way to run the kernels: rows that a program keeps (tokens or codes) and rows that stream past them."""

    keep: int
    stream: int
    block_d: int  # dims of one step of a product
    resident: bool  # all dims are one step: the program's own rows stay on the chip
    num_warps: int
    num_stages: int


# every configuration that softmax_config can return; the compile test builds each for each architecture
CONFIGS = (
    SoftmaxConfig(keep=64, stream=64, block_d=16, resident=True, num_warps=4, num_stages=2),
    SoftmaxConfig(keep=64, stream=64, block_d=32, resident=True, num_warps=4, num_stages=2),
    SoftmaxConfig(keep=64, stream=64, block_d=64, resident=True, num_warps=4, num_stages=2),
    SoftmaxConfig(keep=64, stream=64, block_d=32, resident=False, num_warps=4, num_stages=3),
)


def softmax_config(dim: int) -> SoftmaxConfig:
    """By D alone, so that any GPU is served and a batch of another size compiles nothing."""
    return next((config for config in CONFIGS if config.resident and dim <= config.block_d), CONFIGS[-1])


@dataclass(frozen=True)
class Split:
    """What streams past a block of rows, spread over ``count`` programs of ``length`` rows each."""

    count: int
    length: int


def split_of(
    x: Tensor,  # [B, T, D]
    blocks: int,
    rows: int,
    tile: int,
) -> Split:
    """Whole tiles of the streaming ``rows`` to each program; the fewest programs that fill the device."""
    tiles = triton.cdiv(rows, tile)
    length = triton.cdiv(tiles, count_splits(blocks, tiles, slots_of(x)))
    return Split(triton.cdiv(tiles, length), length * tile)


def slots_of(
    x: Tensor,  # [B, T, D]
) -> int:
    """Programs that run at once: registers hold two on a multiprocessor."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def as_rows(
    x: Tensor,  # [B, T, D]
) -> Tensor:  # [N, D] contiguous
    """Tokens one after another; a copy unless they lie so, for each is read once for every tile of codes."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def softmax_unsupported(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    *_rest: object,
) -> str | None:
    """One line on why these kernels cannot take the arguments, or None."""
    if x.dtype != torch.float32:
        return f"takes float32, not {str(x.dtype).removeprefix('torch.')}"
    if codebook.shape[0] > MAX_CODES or codebook.shape[1] > MAX_DIM:
        return f"takes up to {MAX_CODES} codes of up to {MAX_DIM} dims, not {list(codebook.shape)}"
    return unsupported(x)
