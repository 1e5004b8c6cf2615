"""Codebook statistics and the EMA update in Triton.

Every sum has a fixed order, so that a run repeats bit for bit: no float atomics. Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .in_steps import add_in_steps, clear_consumed, quantize_in_steps, step_in_steps
from .registry import register
from .triton_common import load_tile, on_device, readable, row_offsets, store_tile, tile_for, unsupported
from .triton_nearest import nearest
from .triton_training import gather

SUM_BLOCK = 1024  # codes of one partial sum


@triton.jit(do_not_specialize=["tokens_per_batch", "stride_b", "q_stride_b", "K", "pieces", "piece_length"])
def piece_kernel(
    x_ptr,  # [B, T, D]
    quantized_ptr,  # [B, T, D], not looked at without PULL
    derror_ptr,  # [N] float32, likewise
    order_ptr,  # [N] int64, token numbers sorted by code
    first_ptr,  # [K + 1] int64, where each code's tokens begin in the order
    code_ptr,  # [pieces] int64, K where the piece is not used
    piece_ptr,  # [K + 1] int64, where each code's pieces begin
    partial_ptr,  # [pieces, D] float32
    tokens_per_batch,
    stride_b,
    stride_t,
    stride_d,
    q_stride_b,
    q_stride_t,
    q_stride_d,
    K,
    D,
    pieces,
    piece_length,
    PULL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each piece is a run of at most ``piece_length`` tokens x of one code, added in token order.

    With ``PULL`` 2 derror (q - x) is added: the gradient of the codes.
    """
    piece = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    code = tl.load(code_ptr + piece, mask=piece < pieces, other=0)
    used = (piece < pieces) & (code < K)
    within = piece - tl.load(piece_ptr + code, mask=used, other=0)
    first = tl.load(first_ptr + code, mask=used, other=0) + within * piece_length
    count = tl.load(first_ptr + code + 1, mask=used, other=0) - first
    count = tl.where(used, tl.minimum(count, piece_length), 0)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for step in range(0, tl.max(count, 0)):
        live = step < count
        row = tl.load(order_ptr + first + step, mask=live, other=0)
        offsets = row_offsets(row, tokens_per_batch, stride_b, stride_t)
        value = load_tile(x_ptr, offsets, live, dims, D, stride_d)
        if PULL:
            q_offsets = row_offsets(row, tokens_per_batch, q_stride_b, q_stride_t)
            weight = 2.0 * tl.load(derror_ptr + row, mask=live, other=0.0)
            value = weight[:, None] * (load_tile(quantized_ptr, q_offsets, live, dims, D, q_stride_d) - value)
        total += value
    store_tile(partial_ptr, piece * D, used, dims, D, 1, total)


@triton.jit(do_not_specialize=["K"])
def join_kernel(
    piece_ptr,  # [K + 1] int64, where each code's pieces begin
    partial_ptr,  # [pieces, D] float32
    sums_ptr,  # [K, D] float32
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the pieces of each code in order."""
    code = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(piece_ptr + code, mask=code < K, other=0)
    count = tl.load(piece_ptr + code + 1, mask=code < K, other=0) - first
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for step in range(0, tl.max(count, 0)):
        total += load_tile(partial_ptr, (first + step) * D, step < count, dims, D, 1)
    store_tile(sums_ptr, code * D, code < K, dims, D, 1, total)


def codebook_stats(
    x: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    codebook_size: int,
) -> tuple[Tensor, Tensor]:  # counts float32 [K], sums float32 [K, D]
    """Counts and sums per code; codes below 0 are left out. Extra memory O(N + K D)."""
    x = readable(x)
    return _sum_by_code(x, x, codes, None, codebook_size)


def codebook_gradient(
    x: Tensor,  # [B, T, D]
    quantized: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    derror: Tensor,  # float32 [B, T]
    codebook_size: int,
) -> Tensor:  # [K, D]
    """-sum of 2 derror (x - q) over the tokens of each code; no [N, D] temporary."""
    sums = _sum_by_code(readable(x), readable(quantized), codes, derror.contiguous(), codebook_size)[1]
    return sums.to(x.dtype)


def _sum_by_code(
    x: Tensor,  # [B, T, D]
    quantized: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    derror: Tensor | None,  # float32 [B, T]; the sum of x where absent
    codebook_size: int,
) -> tuple[Tensor, Tensor]:  # counts float32 [K], sums float32 [K, D]
    n, dim, device = codes.numel(), x.shape[2], x.device
    sums = torch.zeros(codebook_size, dim, dtype=torch.float32, device=device)
    sorted_codes, order = torch.sort(codes.reshape(-1), stable=True)
    first = torch.searchsorted(sorted_codes, torch.arange(codebook_size + 1, device=device))  # [K + 1]
    counts = first.diff()  # [K]
    if n == 0:
        return counts.float(), sums
    # as long as wide: partial sums take O(N) memory; sqrt(N): a code that has every token is no program's whole work
    length = triton.next_power_of_2(max(64, dim, math.isqrt(n)))
    begin = torch.nn.functional.pad(((counts + length - 1) // length).cumsum(0), (1, 0))  # [K + 1]
    pieces = n // length + min(n, codebook_size)  # at least as many as there are
    owner = torch.searchsorted(begin[1:], torch.arange(pieces, device=device), right=True)  # [pieces]
    partial = torch.empty(pieces, dim, dtype=torch.float32, device=device)
    tile = tile_for(dim)
    rows = tile.rows if derror is None else max(1, tile.rows // 2)  # two operands: with all of them registers spill
    chunks, shape = triton.cdiv(dim, tile.dims), {"BLOCK_D": tile.dims, "num_warps": tile.num_warps}
    with on_device(x):
        piece_kernel[(triton.cdiv(pieces, rows), chunks)](
            x, quantized, codes if derror is None else derror, order, first, owner, begin, partial,
            x.shape[1], *x.stride(), *quantized.stride(), codebook_size, dim, pieces, length,
            PULL=derror is not None, BLOCK_P=rows, **shape,
        )  # fmt: skip
        join_kernel[(triton.cdiv(codebook_size, tile.rows), chunks)](
            begin, partial, sums, codebook_size, dim, BLOCK_K=tile.rows, **shape
        )
    return counts.float(), sums


@triton.jit
def ordered_sum(
    ptr,  # [count] float32
    count,
    BLOCK: tl.constexpr,
):
    """The sum of ``count`` values, the same in every program."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["K"])
def kept_kernel(
    counts_ptr,  # [K] float32
    revive_ptr,  # [K] bool
    kept_ptr,  # [blocks] float32
    K,
    BLOCK: tl.constexpr,
):
    """Sum of the counts of codes that are not revived, one block of codes a program."""
    code = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    revive = tl.load(revive_ptr + code, mask=code < K, other=1) != 0
    count = tl.load(counts_ptr + code, mask=code < K, other=0.0)
    tl.store(kept_ptr + tl.program_id(0), tl.sum(tl.where(revive, 0.0, count), 0))


@triton.jit(do_not_specialize=["K", "blocks"])
def size_kernel(
    cluster_size_ptr,  # [K] float32, updated
    counts_ptr,  # [K] float32
    revive_ptr,  # [K] bool
    kept_ptr,  # [blocks] float32
    total_ptr,  # [blocks] float32, written: sums of the updated sizes
    decay,
    gain,
    revived_size,
    K,
    blocks,
    BLOCK: tl.constexpr,
):
    """Decayed cluster sizes and their sum, one block of codes a program."""
    active = ordered_sum(kept_ptr, blocks, BLOCK) > 0
    code = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = code < K
    old = tl.load(cluster_size_ptr + code, mask=inside, other=0.0)
    new = decay * old + gain * tl.load(counts_ptr + code, mask=inside, other=0.0)
    size = tl.where(active, new, old)
    size = tl.where(tl.load(revive_ptr + code, mask=inside, other=0) != 0, revived_size, size)
    tl.store(cluster_size_ptr + code, size, mask=inside)
    tl.store(total_ptr + tl.program_id(0), tl.sum(tl.where(inside, size, 0.0), 0))


@triton.jit
def row_norms(
    sums_ptr,  # [K, D] float32
    embed_sum_ptr,  # [K, D] float32
    rows,  # [BLOCK_K] int64
    inside,  # [BLOCK_K] bool
    smoothed,  # [BLOCK_K] float32
    decay,
    gain,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Lengths of the sampled rows and of the decayed means, at least 1e-12."""
    sample_square = tl.zeros([BLOCK_K], tl.float32)
    mean_square = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        sample = load_tile(sums_ptr, rows, inside, dims, D, 1)
        mean = decay * load_tile(embed_sum_ptr, rows, inside, dims, D, 1) + gain * sample
        mean = mean / smoothed[:, None]
        sample_square += tl.sum(sample * sample, 1)
        mean_square += tl.sum(mean * mean, 1)
    return tl.maximum(tl.sqrt(sample_square), 1e-12), tl.maximum(tl.sqrt(mean_square), 1e-12)


@triton.jit(do_not_specialize=["K", "blocks"])
def row_kernel(
    codebook_ptr,  # [K, D] float32, updated
    cluster_size_ptr,  # [K] float32, already updated
    embed_sum_ptr,  # [K, D] float32, updated
    sums_ptr,  # [K, D] float32
    revive_ptr,  # [K] bool
    kept_ptr,  # [blocks] float32
    total_ptr,  # [blocks] float32
    decay,
    gain,
    eps,
    eps_total,
    revived_size,
    K,
    D,
    blocks,
    NORMALIZE: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Embedding sums and codebook rows; what is neither revived nor active stays as it is."""
    active = ordered_sum(kept_ptr, blocks, BLOCK) > 0
    total = ordered_sum(total_ptr, blocks, BLOCK)
    code = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = code < K
    rows = code * D
    revive = tl.load(revive_ptr + code, mask=inside, other=0) != 0
    size = tl.load(cluster_size_ptr + code, mask=inside, other=1.0)
    smoothed = size + eps
    if not PLAIN:
        smoothed = smoothed / (total + eps_total) * total
    change = tl.where(active, inside, inside & revive)
    if NORMALIZE:
        sample_norm, mean_norm = row_norms(
            sums_ptr, embed_sum_ptr, rows, inside, smoothed, decay, gain, D, BLOCK_K, BLOCK_D
        )
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        sample = load_tile(sums_ptr, rows, inside, dims, D, 1)
        embed = decay * load_tile(embed_sum_ptr, rows, inside, dims, D, 1) + gain * sample
        mean = embed / smoothed[:, None]
        if NORMALIZE:
            sample = sample / sample_norm[:, None]
            mean = mean / mean_norm[:, None]
        embed = tl.where(revive[:, None], sample * revived_size, embed)
        store_tile(embed_sum_ptr, rows, change, dims, D, 1, embed)
        store_tile(codebook_ptr, rows, change, dims, D, 1, tl.where(revive[:, None], sample, mean))


def _ema_supports(codebook: Tensor, cluster_size: Tensor, *rest: object) -> str | None:
    if codebook.dtype != torch.float32:
        return f"keeps statistics in float32, not {str(codebook.dtype).removeprefix('torch.')}"
    return unsupported(codebook)


def ema_update_(
    codebook: Tensor,  # [K, D] float32
    cluster_size: Tensor,  # [K]
    embed_sum: Tensor,  # [K, D]
    counts: Tensor,  # [K]
    sums: Tensor,  # [K, D]
    revive: Tensor,  # bool [K]
    decay: float,
    eps: float,
    revived_size: float,
    normalize: bool,
    plain: bool = False,
    consume: bool = False,
) -> None:
    """Decay, Laplace smoothing (van den Oord et al. 2017, appendix A.1), revival; in place."""
    k, dim = codebook.shape
    blocks = triton.cdiv(k, SUM_BLOCK)
    kept, total = torch.empty(2, blocks, dtype=torch.float32, device=codebook.device).unbind()
    tile, gain, revived_size = tile_for(dim), 1.0 - decay, float(revived_size)  # an int would be specialised
    with on_device(codebook):
        kept_kernel[(blocks,)](counts, revive, kept, k, BLOCK=SUM_BLOCK)
        size_kernel[(blocks,)](
            cluster_size, counts, revive, kept, total, decay, gain, revived_size, k, blocks, BLOCK=SUM_BLOCK
        )
        row_kernel[(triton.cdiv(k, tile.rows),)](
            codebook, cluster_size, embed_sum, sums, revive, kept, total,
            decay, gain, eps, k * eps, revived_size, k, dim, blocks,
            NORMALIZE=normalize, PLAIN=plain, BLOCK=SUM_BLOCK,
            BLOCK_K=tile.rows, BLOCK_D=tile.dims, num_warps=tile.num_warps,
        )  # fmt: skip
    clear_consumed(consume, counts, sums, revive)


def _stats_supports(x: Tensor, codes: Tensor, codebook_size: int) -> str | None:
    return unsupported(x)


def _whole_supports(x: Tensor, *_rest: object) -> str | None:
    return unsupported(x)


register("codebook_stats", "triton", codebook_stats, supports=_stats_supports)
register("codebook_gradient", "triton", codebook_gradient, supports=_whole_supports)
register("quantize", "triton", quantize_in_steps(nearest, gather), supports=_whole_supports)
register("add_statistics_", "triton", add_in_steps(codebook_stats), supports=_whole_supports)
register("ema_update_", "triton", ema_update_, supports=_ema_supports)
register("ema_step_", "triton", step_in_steps(codebook_stats, ema_update_), supports=_whole_supports)
