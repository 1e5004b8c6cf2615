"""The k nearest codes in Triton: exact, in five launches and O(N k) memory.

    operands, coarse   as for ``nearest`` (triton_nearest): the best granules of codes of each token
    limit              a score that k codes reach for certain (triton_shortlist)
    collect            the product again: every code that may reach it, into a list a token (triton_shortlist)
    order              the list by float64 scores, ties exactly (triton_order)

The product runs twice, so that a list holds little more than k codes whatever k is: the state that finds one nearest
code could find k only with k times its registers. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import triton_configs
from .prepared import PreparedCodebook
from .registry import register
from .triton_common import MAX_CODES, MAX_DIM, on_device, readable, unsupported
from .triton_configs import GROUPS, Operand, SearchConfig, operand_of
from .triton_nearest import (
    EXACT_BLOCK_D,
    EXACT_BLOCK_K,
    Codes,
    Operands,
    coarse,
    config_for,
    kept_codes,
    prepare,
    prepared_details,
    program_slots,
)
from .triton_order import order_kernel
from .triton_shortlist import collect_kernel, limit_kernel

MAX_K = 1024  # codes a token; each takes a round of the order and about 100 bytes
CODES_OF_SPLIT = 8  # the coarse pass keeps 16 granules a split: of 2 k, the k-th is about the (1.15 k)-th of all
ROOM, SPARE = 4, 64  # a list holds ROOM k + SPARE codes
LIMIT_ROWS, LIMIT_SLOTS = 16, 32
ORDER_ROWS, ORDER_SLOTS, ORDER_DIMS = 8, 16, 16
WARPS = 4
NO_COLLECT = 10  # major compute capability: Triton 3.7.1's pass manager fails on collect_kernel for sm_100


@dataclass(frozen=True)
class Shortlist:
    """The codes that may be among a token's k nearest."""

    limit: Tensor  # [N] float32, see limit_kernel
    count: Tensor  # [N] int32; more than the capacity: all codes may
    codes: Tensor  # [N, capacity] int32, in no order

    @property
    def capacity(self) -> int:
        """Codes that a list has room for."""
        return self.codes.shape[1]


def list_capacity(size: int, k: int, granule: int) -> int:
    """All codes where there are no k granules to tell which; else room for what rounding leaves possible."""
    return size if size <= granule * k else min(size, ROOM * k + SPARE)


def shorten(
    operands: Operands,
    shape: Operand,
    size: int,  # K
    k: int,
    cosine: bool,
    config: SearchConfig,
    slots: int,  # programs that run at once
) -> Shortlist:
    """Three launches."""
    n, device = operands.stats.shape[0], operands.stats.device
    state = coarse(operands, shape, config, slots, triton.cdiv(k, CODES_OF_SPLIT))
    out = Shortlist(
        limit=torch.empty(n, dtype=torch.float32, device=device),
        count=torch.empty(n, dtype=torch.int32, device=device),
        codes=torch.empty(n, list_capacity(size, k, config.granule), dtype=torch.int32, device=device),
    )
    limit_kernel[(triton.cdiv(n, LIMIT_ROWS),)](
        operands.stats, operands.limits, state.code, state.upper, out.limit, out.count,
        n, state.upper[0].numel(), k,
        COSINE=cosine, GRANULE=config.granule, BLOCK_N=LIMIT_ROWS, BLOCK_S=LIMIT_SLOTS, num_warps=WARPS,
    )  # fmt: skip
    rows, tiles = triton.cdiv(n, config.block_n), operands.limits.shape[0] // GROUPS
    per_split = triton.cdiv(tiles, triton_configs.count_splits(rows, tiles, slots))
    collect_kernel[(rows, triton.cdiv(tiles, per_split))](
        operands.tokens, operands.stats, operands.codes, operands.bias, operands.limits,
        out.limit, out.codes, out.count, n, size, shape.depth, out.capacity, tiles, per_split,
        BIAS=shape.bias, GRANULE=config.granule, RESIDENT=shape.resident,
        BLOCK_N=config.block_n, BLOCK_D=shape.block_d, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def order(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    unit: Tensor,  # [K] float64; cosine only
    found: Shortlist,
    codes: Tensor,  # [B, T, k] written
    distance: Tensor,  # [B, T, k] written
    cosine: bool,
) -> None:
    """One launch."""
    n, (size, dim), k = x.shape[0] * x.shape[1], codebook.shape, codes.shape[2]
    scores = torch.empty(found.codes.shape, dtype=torch.float64, device=x.device)
    order_kernel[(triton.cdiv(n, ORDER_ROWS),)](
        x, codebook, unit, found.limit, found.count, found.codes, scores, codes, distance,
        x.shape[1], *x.stride(), n, size, dim, found.capacity, k,
        COSINE=cosine, BLOCK_N=ORDER_ROWS, BLOCK_S=ORDER_SLOTS, BLOCK_D=ORDER_DIMS,
        EXACT_K=EXACT_BLOCK_K, EXACT_D=EXACT_BLOCK_D, num_warps=WARPS,
    )  # fmt: skip


def _supports(x: Tensor, codebook: Tensor | PreparedCodebook, k: int, metric: str = "") -> str | None:
    if codebook.shape[0] > MAX_CODES or codebook.shape[1] > MAX_DIM:
        return f"takes up to {MAX_CODES} codes of up to {MAX_DIM} dims, not {list(codebook.shape)}"
    if k > MAX_K:
        return f"takes k up to {MAX_K}, not {k}"
    reason = unsupported(x)
    if reason is None and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == NO_COLLECT:
        return f"Triton does not compile its list of codes for compute capability {NO_COLLECT}.x"
    return reason


def nearest_k(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    k: int,
    metric: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T, k], distance float32 [B, T, k]
    """See ``vqkernels.nearest_k``."""
    if not x.is_cuda and not torch.isfinite(codebook).all():
        raise ValueError("codebook: expected finite values, got NaN or Inf")
    return search_k(x, codebook, k, metric == "cosine", config_for(x, *codebook.shape))


def nearest_k_prepared(
    x: Tensor,  # [B, T, D]
    prepared: PreparedCodebook,  # [K, D]
    k: int,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T, k], distance float32 [B, T, k]
    """See ``vqkernels.nearest_k``. The tokens' half of the first launch, and the other four."""
    config = config_for(x, *prepared.shape)
    return search_k(x, prepared.rows, k, prepared.metric == "cosine", config, kept_codes(prepared, config))


def search_k(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    k: int,
    cosine: bool,
    config: SearchConfig,
    kept: Codes | None = None,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T, k], distance float32 [B, T, k]
    """Five launches; the first one does nothing for the codes where they are kept."""
    codes = torch.empty(*x.shape[:2], k, dtype=torch.int64, device=x.device)
    distance = torch.empty(*x.shape[:2], k, dtype=torch.float32, device=x.device)
    if codes.numel() > 0:
        with on_device(x):
            tokens, rows = readable(x), readable(codebook).contiguous()
            operands = prepare(tokens, rows, cosine, config, kept)
            shape, slots = operand_of(config, rows.shape[1], cosine), program_slots(x, config)
            found = shorten(operands, shape, rows.shape[0], k, cosine, config, slots)
            order(tokens, rows, operands.unit, found, codes, distance, cosine)
    return codes, distance


register("nearest_k", "triton", nearest_k, supports=_supports)
register("nearest_k_prepared", "triton", nearest_k_prepared, supports=_supports, details=prepared_details)
