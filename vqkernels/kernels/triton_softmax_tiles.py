"""What the streaming-softmax kernels share: products of tiles, logits, sums, sizes of tiles, and who may run them.

Products are "tf32x3": each float32 as two tf32 terms, three tensor-core products. Logits in the hundreds leave no room
for less: a probability is off, relative to itself, by the absolute error of its logit. Plain tf32 keeps 11 bits: 0.1 of
a logit of 200. Three products keep 21 to 22, no less than float32 sums over D do; float32 without tensor cores ("ieee")
would take some three times as long, by the rates. The interpreter multiplies in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import MAX_CODES, MAX_DIM, unsupported
from .triton_configs import Gpu, count_splits

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
    error,  # [R] float32, what total lacks
    value,  # [R] float32
):
    """A sum that keeps what rounding takes (Knuth): float32 alone would lose two digits over 10^5 codes."""
    value = value + error
    new = total + value
    added = new - total
    return new, (total - (new - added)) + (value - added)


@dataclass(frozen=True)
class SoftmaxConfig:
    """One way to run the kernels: rows that a program keeps (tokens or codes) and rows that stream past them."""

    keep: int
    stream: int
    block_d: int  # dims of one step of a product
    resident: bool  # all dims are one step: the program's own rows stay on the chip
    chunk: int  # dims of the sums that one program of a gradient has in registers; else 0
    num_warps: int

    def serves(self, dim: int) -> bool:
        """Whether all dims are one step, or one chunk; the last configuration of a list takes the rest."""
        return dim <= (self.block_d if self.resident else self.chunk)


STAGES = 3
# For mma.sync, whose operands are in registers, each with its second tf32 term: 32 passing rows are what fits. By an
# A100's rates, 170 such products a clock, a block of 64 takes 170 x 4 / 64 = 11 bytes a clock from L2, of some 47.
SCORES = (
    SoftmaxConfig(keep=64, stream=32, block_d=16, resident=True, chunk=0, num_warps=4),
    SoftmaxConfig(keep=64, stream=32, block_d=32, resident=True, chunk=0, num_warps=4),
    SoftmaxConfig(keep=64, stream=32, block_d=64, resident=True, chunk=0, num_warps=4),
    SoftmaxConfig(keep=64, stream=32, block_d=32, resident=False, chunk=0, num_warps=4),
)
GRADIENTS = (
    SoftmaxConfig(keep=64, stream=32, block_d=16, resident=True, chunk=16, num_warps=4),
    SoftmaxConfig(keep=64, stream=32, block_d=32, resident=True, chunk=32, num_warps=4),
    SoftmaxConfig(keep=64, stream=16, block_d=32, resident=False, chunk=64, num_warps=4),
    SoftmaxConfig(keep=64, stream=16, block_d=16, resident=False, chunk=128, num_warps=4),
)
# For wgmma and tcgen05, which read from shared memory. By an H100's rates, 356 products a clock, a block of 128 takes
# 11 bytes, of some 25; three times that past D = 32 where its own rows are read again: L2 is the limit there.
LARGE = (90, 100, 103)
LARGE_SCORES = (
    SoftmaxConfig(keep=128, stream=32, block_d=16, resident=True, chunk=0, num_warps=8),
    SoftmaxConfig(keep=128, stream=32, block_d=32, resident=True, chunk=0, num_warps=8),
    SoftmaxConfig(keep=128, stream=64, block_d=32, resident=False, chunk=0, num_warps=8),
)
LARGE_GRADIENTS = (
    SoftmaxConfig(keep=128, stream=32, block_d=16, resident=True, chunk=16, num_warps=8),
    SoftmaxConfig(keep=128, stream=32, block_d=32, resident=True, chunk=32, num_warps=8),
    SoftmaxConfig(keep=128, stream=32, block_d=32, resident=False, chunk=64, num_warps=8),
    SoftmaxConfig(keep=64, stream=32, block_d=16, resident=False, chunk=128, num_warps=4),
)


def score_config(dim: int, gpu: Gpu) -> SoftmaxConfig:
    """For kernels that keep a number or two of each row. By D and the kind of tensor core alone: any GPU is served, and
    a batch of another size compiles nothing."""
    return _choose(LARGE_SCORES if gpu.capability in LARGE else SCORES, dim)


def gradient_config(dim: int, gpu: Gpu) -> SoftmaxConfig:
    """For kernels that keep sums over D."""
    return _choose(LARGE_GRADIENTS if gpu.capability in LARGE else GRADIENTS, dim)


def sample_config(dim: int, gpu: Gpu) -> SoftmaxConfig:
    """As for scores, with streaming dims: Triton 3.7.1 fails to compile the running sum of resident ones for 10.0."""
    config = score_config(dim, gpu)
    return replace(config, block_d=min(config.block_d, 32), resident=False)


def _choose(configs: tuple[SoftmaxConfig, ...], dim: int) -> SoftmaxConfig:
    return next((config for config in configs if config.serves(dim)), configs[-1])


@dataclass(frozen=True)
class Split:
    """What streams past a block of rows, spread over ``count`` programs of ``length`` rows each."""

    count: int
    length: int


def split_of(
    x: Tensor,  # [B, T, D]
    blocks: int,
    rows: int,
    config: SoftmaxConfig,
) -> Split:
    """Whole tiles of the streaming ``rows`` to each program; the fewest programs that end first."""
    tiles = triton.cdiv(rows, config.stream)
    length = triton.cdiv(tiles, count_splits(blocks, tiles, slots_of(x, config), SPLITS))
    return Split(triton.cdiv(tiles, length), length * config.stream)


SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def slots_of(
    x: Tensor,  # [B, T, D]
    config: SoftmaxConfig,
) -> int:
    """Programs that run at once: registers of a multiprocessor hold eight warps of these kernels."""
    return 8 // config.num_warps * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


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
