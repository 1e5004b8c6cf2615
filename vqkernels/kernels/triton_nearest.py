"""Nearest-code search in Triton: a float32 pass that proves most tokens, float64 and integers for the rest.

    coarse   S_k = h_k - xh . ch_k in float32, all centred on the codebook's mean: the best, its code, the second
    finish   a bound E >= |S_k - s_k| from measured rounding residuals; second > best + 2 E proves the code
    exact    tokens without proof, listed on the device: a float64 scan, then exact arithmetic between what ties

Nothing of size N x K is stored and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registry import register
from .triton_common import (
    MAX_CODES,
    MAX_DIM,
    load_tile,
    on_device,
    program_target,
    readable,
    row_offsets,
    unsupported,
)
from .triton_exact import exact_kernel

UNIT32, UNIT64 = tl.constexpr(2.0**-24), tl.constexpr(2.0**-53)  # unit roundoff
TINY32 = tl.constexpr(2.0**-126)  # smallest normal float32: what flushing to zero can cost
HUGE32 = tl.constexpr(1e38)  # scores below it cannot overflow on the way
NORM_SLACK = tl.constexpr(1.0 + 2.0**-30)  # covers the rounding of a float64 norm of any D below 2^16


@dataclass(frozen=True)
class SearchConfig:
    """Tile of one program of the coarse pass."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


# Every configuration that choose_config can return; the compile test builds each for each architecture. Fewer than 64
# tokens: from 64 on Triton (3.7.1, sm_100) takes half-precision tokens to the TF32 tensor cores, "ieee" or not.
CONFIGS = (
    SearchConfig(block_n=32, block_k=64, block_d=16, num_warps=4, num_stages=2),
    SearchConfig(block_n=16, block_k=64, block_d=32, num_warps=4, num_stages=2),
)
FINISH_BLOCK_N, EXACT_BLOCK_K, FLOAT64_BLOCK_D, FLOAT64_WARPS = 32, 64, 32, 4  # of the two float64 kernels


def choose_config(n: int, dim: int) -> SearchConfig:
    """Low tiles where there are few tokens, so that the device is filled; shallow ones where D is small."""
    return CONFIGS[0] if dim <= 16 or n > 4096 else CONFIGS[1]


@dataclass(frozen=True)
class Prepared:
    """What the search needs of a codebook, all on the device."""

    codebook: Tensor  # [K, D] float32, as given
    coarse: Tensor  # [K, D] float32: centred (euclidean) or of unit length (cosine)
    center: Tensor  # [D] float32; zeros for cosine
    half_norm: Tensor  # [K] float32; zeros for cosine
    scale: Tensor  # [K] float64, 1 / |c|; 0 for a zero code
    limits: Tensor  # [4] float64: largest |coarse row|, largest residual of one, largest half norm, 1 if all is finite


def prepare(
    codebook: Tensor,  # [K, D]
    cosine: bool,
) -> Prepared:
    """O(K D) work and memory, without a host synchronisation."""
    book = codebook.float().contiguous()
    wide = book.double()
    finite = torch.isfinite(book).all().double()
    norm = wide.square().sum(1).sqrt()
    scale = torch.where(norm > 0, norm.reciprocal(), 0.0)
    if cosine:
        center = book.new_zeros(book.shape[1])
        target = wide * scale[:, None]
    else:
        center = wide.mean(0).float()
        target = wide - center.double()
    coarse = target.float()
    residual = (target - coarse.double()).square().sum(1).sqrt()
    length = target.square().sum(1).sqrt()
    half_norm = book.new_zeros(book.shape[0]) if cosine else (0.5 * length.square()).float()
    limits = torch.stack([length.max(), residual.max(), half_norm.max().double(), finite])
    return Prepared(book, coarse, center, half_norm, scale, limits)


@triton.jit
def tile_dot(
    x_ptr,  # [B, T, D]
    center_ptr,  # [D] float32
    coarse_ptr,  # [K, D] float32
    offsets,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    codes,  # [BLOCK_K] int32
    stride_d,
    K,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_N, BLOCK_K] float32 products of centred tokens and codes, in full float32."""
    dot = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    rows = codes.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        center = tl.load(center_ptr + dims, mask=dims < D, other=0.0)
        x = load_tile(x_ptr, offsets, live, dims, D, stride_d) - center[None, :]
        inside = (dims < D)[:, None] & (codes < K)[None, :]
        c = tl.load(coarse_ptr + dims[:, None] + rows[None, :], mask=inside, other=0.0)
        dot = tl.dot(x, c, dot, input_precision="ieee")
    return dot


@triton.jit(do_not_specialize=["tokens_per_batch", "stride_b", "N", "K", "codes_per_split"])
def coarse_kernel(
    x_ptr,  # [B, T, D]
    center_ptr,  # [D] float32
    coarse_ptr,  # [K, D] float32
    half_norm_ptr,  # [K] float32
    best_ptr,  # [splits, N] float32
    second_ptr,  # [splits, N] float32
    code_ptr,  # [splits, N] int32
    tokens_per_batch,
    stride_b,
    stride_t,
    stride_d,
    N,
    K,
    D,
    codes_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Running best, its code and second best of a tile of tokens over one split of the codes."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    offsets = row_offsets(rows, tokens_per_batch, stride_b, stride_t)
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    second = tl.full([BLOCK_N], float("inf"), tl.float32)
    code = tl.zeros([BLOCK_N], tl.int32)
    first = tl.program_id(1) * codes_per_split
    for start in range(first, tl.minimum(first + codes_per_split, K), BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        dot = tile_dot(x_ptr, center_ptr, coarse_ptr, offsets, live, codes, stride_d, K, D, BLOCK_N, BLOCK_K, BLOCK_D)
        score = tl.load(half_norm_ptr + codes, mask=codes < K, other=float("inf"))[None, :] - dot
        score = tl.where(score == score, score, float("inf"))
        tile_best, column = tl.min(score, 1, return_indices=True)
        others = tl.where(tl.arange(0, BLOCK_K)[None, :] == column[:, None], float("inf"), score)
        second = tl.minimum(tl.maximum(best, tile_best), tl.minimum(second, tl.min(others, 1)))
        code = tl.where(tile_best < best, start + column, code)
        best = tl.minimum(best, tile_best)
    out = tl.program_id(1).to(tl.int64) * N + rows
    tl.store(best_ptr + out, best, mask=live)
    tl.store(second_ptr + out, second, mask=live)
    tl.store(code_ptr + out, code, mask=live)


@triton.jit
def merge_splits(
    best_ptr,  # [splits, N] float32
    second_ptr,  # [splits, N] float32
    code_ptr,  # [splits, N] int32
    rows,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    N,
    splits,
):
    """Best, second and the best's code over all splits, in code order: the lowest index wins ties."""
    best = tl.load(best_ptr + rows, mask=live, other=0.0)
    second = tl.load(second_ptr + rows, mask=live, other=0.0)
    code = tl.load(code_ptr + rows, mask=live, other=0)
    for split in range(1, splits):
        at = rows + split * N.to(tl.int64)
        other = tl.load(best_ptr + at, mask=live, other=0.0)
        second = tl.minimum(tl.maximum(best, other), tl.minimum(second, tl.load(second_ptr + at, mask=live, other=0.0)))
        code = tl.where(other < best, tl.load(code_ptr + at, mask=live, other=0), code)
        best = tl.minimum(best, other)
    return best, second, code


@triton.jit
def score_bound(
    x_norm,  # [BLOCK_N] float64, |xh|
    x_residual,  # [BLOCK_N] float64, |x - mu - xh|
    limits_ptr,  # [4] float64
    D,
):
    """E >= |S_k - s_k| for every k, inf where a score could overflow.

    s = |c|^2 / 2 - x.c and S = h - xh.ch differ by dx.c + xh.dc, the rounding of h, of D products and their sum, and
    of the subtraction; each flush of a subnormal adds up to 2^-126 times the other factor.
    """
    c_norm = tl.load(limits_ptr) * NORM_SLACK
    c_residual = tl.load(limits_ptr + 1) * NORM_SLACK + c_norm * (UNIT64 * 8.0) * (D + 8)
    half_norm = tl.load(limits_ptr + 2)
    x_norm = x_norm * NORM_SLACK
    x_residual = x_residual * NORM_SLACK + x_norm * (UNIT64 * 4.0)
    product = x_norm * (c_norm + c_residual)
    steps = D * UNIT32 + 8.0 * UNIT32
    rounding = steps / (1.0 - steps) * (product + half_norm)
    flushed = (D + 1) * TINY32 * (3.0 + x_norm + c_norm + c_residual)
    bound = x_residual * c_norm + x_norm * c_residual + rounding + flushed
    return tl.where(product + half_norm < HUGE32, bound, float("inf"))


@triton.jit
def measure_tokens(
    x_ptr,  # [B, T, D]
    center_ptr,  # [D] float32
    offsets,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    stride_d,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Float64 norms of what the coarse pass saw of each token and of what rounding took from it; finite or not."""
    square = tl.zeros([BLOCK_N], tl.float64)
    residual = tl.zeros([BLOCK_N], tl.float64)
    infinite = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        center = tl.load(center_ptr + dims, mask=dims < D, other=0.0)[None, :]
        x = load_tile(x_ptr, offsets, live, dims, D, stride_d)
        infinite = tl.maximum(infinite, tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1))
        seen = (x - center).to(tl.float64)
        lost = x.to(tl.float64) - center.to(tl.float64) - seen
        square += tl.sum(seen * seen, 1)
        residual += tl.sum(lost * lost, 1)
    return tl.sqrt(square), tl.sqrt(residual), infinite == 0


@triton.jit
def code_distance(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D] float32
    offsets,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    code,  # [BLOCK_N] int32
    stride_d,
    D,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_N] float64: |x - c|^2, or 1 - cos."""
    total = tl.zeros([BLOCK_N], tl.float64)
    x_square = tl.zeros([BLOCK_N], tl.float64)
    c_square = tl.zeros([BLOCK_N], tl.float64)
    rows = code.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, offsets, live, dims, D, stride_d).to(tl.float64)
        c = load_tile(codebook_ptr, rows, live, dims, D, 1).to(tl.float64)
        if COSINE:
            total += tl.sum(x * c, 1)
            x_square += tl.sum(x * x, 1)
            c_square += tl.sum(c * c, 1)
        else:
            total += tl.sum((x - c) * (x - c), 1)
    if COSINE:
        norms = tl.sqrt(x_square) * tl.sqrt(c_square)
        total = tl.maximum(1.0 - tl.where(norms > 0, total / tl.where(norms > 0, norms, 1.0), 0.0), 0.0)
    return total


@triton.jit(do_not_specialize=["tokens_per_batch", "stride_b", "N", "splits"])
def finish_kernel(
    x_ptr,  # [B, T, D]
    center_ptr,  # [D] float32
    codebook_ptr,  # [K, D] float32
    limits_ptr,  # [4] float64
    best_ptr,  # [splits, N] float32
    second_ptr,  # [splits, N] float32
    code_ptr,  # [splits, N] int32
    codes_ptr,  # [N] int64
    distance_ptr,  # [N] float32
    listed_ptr,  # [N] int64
    count_ptr,  # [1] int32
    tokens_per_batch,
    stride_b,
    stride_t,
    stride_d,
    N,
    D,
    splits,
    COSINE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Codes and distances from the merged splits; with EXACT, the tokens without proof go on a list."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    offsets = row_offsets(rows, tokens_per_batch, stride_b, stride_t)
    best, second, code = merge_splits(best_ptr, second_ptr, code_ptr, rows, live, N, splits)
    norm, residual, valid = measure_tokens(x_ptr, center_ptr, offsets, live, stride_d, D, BLOCK_N, BLOCK_D)
    # widened before the comparison: the interpreter broadcasts a scalar bool as a float
    valid = valid & (tl.load(limits_ptr + 3) + tl.zeros([BLOCK_N], tl.float64) > 0)
    if COSINE:
        code = tl.where(norm == 0, 0, code)
    distance = code_distance(x_ptr, codebook_ptr, offsets, live & valid, code, stride_d, D, COSINE, BLOCK_N, BLOCK_D)
    tl.store(codes_ptr + rows, tl.where(valid, code.to(tl.int64), -1), mask=live)
    tl.store(distance_ptr + rows, tl.where(valid, distance, float("nan")).to(tl.float32), mask=live)
    if EXACT:
        proven = second.to(tl.float64) > best.to(tl.float64) + 2.0 * score_bound(norm, residual, limits_ptr, D)
        if COSINE:
            proven = proven | (norm == 0)
        open_rows = live & valid & (proven == 0)
        slot = tl.cumsum(open_rows.to(tl.int32), 0) - 1
        first = tl.atomic_add(count_ptr, tl.sum(open_rows.to(tl.int32), 0))
        tl.store(listed_ptr + first + slot, rows, mask=open_rows)


def _supports(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str | None:
    if codebook.shape[0] > MAX_CODES or codebook.shape[1] > MAX_DIM:
        return f"takes up to {MAX_CODES} codes of up to {MAX_DIM} dims, not {list(codebook.shape)}"
    return unsupported(x)


def nearest(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    """See ``vqkernels.nearest``."""
    with on_device(x):
        book = prepare(codebook, metric == "cosine")
        if not x.is_cuda and not book.limits[3]:
            raise ValueError("codebook: expected finite values, got NaN or Inf")
        codes = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
        distance = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
        if codes.numel() > 0:
            _search(readable(x), book, codes, distance, metric == "cosine", precision == "exact")
    return codes, distance


def _search(
    x: Tensor,  # [B, T, D]
    book: Prepared,
    codes: Tensor,  # [B, T] written
    distance: Tensor,  # [B, T] written
    cosine: bool,
    exact: bool,
) -> None:
    n, (k, dim), targets = codes.numel(), book.codebook.shape, program_target(x)
    best, second, code = _coarse(x, book, n, targets)
    listed = torch.empty(n if exact else 1, dtype=torch.int64, device=x.device)
    count = torch.zeros(1, dtype=torch.int32, device=x.device)
    place = (x.shape[1], *x.stride())
    finish_kernel[(triton.cdiv(n, FINISH_BLOCK_N),)](
        x, book.center, book.codebook, book.limits, best, second, code, codes, distance, listed, count,
        *place, n, dim, best.shape[0],
        COSINE=cosine, EXACT=exact, BLOCK_N=FINISH_BLOCK_N, BLOCK_D=FLOAT64_BLOCK_D, num_warps=FLOAT64_WARPS,
    )  # fmt: skip
    if exact:
        exact_kernel[(min(n, targets),)](
            x, book.codebook, book.scale, codes, distance, listed, count, *place, k, dim,
            COSINE=cosine, BLOCK_K=EXACT_BLOCK_K, BLOCK_D=FLOAT64_BLOCK_D, num_warps=FLOAT64_WARPS,
        )  # fmt: skip


def _coarse(
    x: Tensor,  # [B, T, D]
    book: Prepared,
    n: int,
    targets: int,
) -> tuple[Tensor, Tensor, Tensor]:  # best float32, second float32, code int32: [splits, N] each
    k, dim = book.codebook.shape
    config = choose_config(n, dim)
    tiles, steps = triton.cdiv(n, config.block_n), triton.cdiv(k, config.block_k)
    per_split = triton.cdiv(steps, min(steps, max(1, targets // tiles)))  # code tiles of one program
    splits = triton.cdiv(steps, per_split)
    best, second = torch.empty(2, splits, n, dtype=torch.float32, device=x.device).unbind()
    code = torch.empty(splits, n, dtype=torch.int32, device=x.device)
    coarse_kernel[(tiles, splits)](
        x, book.center, book.coarse, book.half_norm, best, second, code,
        x.shape[1], *x.stride(), n, k, dim, per_split * config.block_k,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_D=config.block_d,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return best, second, code


register("nearest", "triton", nearest, supports=_supports)
