"""Ops made of smaller ones, for the backends that have no kernel of their own for the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype

Nearest = Callable[[Tensor, Tensor, str, str], tuple[Tensor, Tensor]]
Gather = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Statistics = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def quantize_in_steps(nearest: Nearest, gather: Gather) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``quantize`` out of a search and a lookup."""

    def quantize(
        x: Tensor,  # [B, T, D]
        codebook: Tensor,  # [K, D]
        mask: Tensor | None,  # bool [B, T]
        metric: str,
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # quantized [B, T, D] laid out like x, codes [B, T], error [B, T]
        """Rows of the nearest codes and their squared errors; a masked token has code -1, a row of 0 and error 0."""
        codes, _ = nearest(x, codebook, metric, precision)
        if mask is None:
            quantized, error = gather(x, codebook, codes)
            return quantized, codes, error
        out = ~mask
        codes.masked_fill_(out, -1)
        quantized, error = gather(x, codebook, codes)
        return quantized.masked_fill_(out[..., None], 0), codes, error.masked_fill_(out, 0)

    return quantize


def gradient_in_steps(statistics: Statistics) -> Callable[..., Tensor]:
    """``codebook_gradient`` out of sums over the tokens of a code."""

    def codebook_gradient(
        x: Tensor,  # [B, T, D]
        quantized: Tensor,  # [B, T, D]
        codes: Tensor,  # [B, T]
        derror: Tensor,  # [B, T]
        codebook_size: int,
    ) -> Tensor:  # [K, D]
        """-sum over a code's tokens of 2 derror (x - q), in token order."""
        wide = accumulation_dtype(x.dtype)
        pull = (quantized.to(wide) - x.to(wide)) * (2 * derror[..., None])
        return statistics(pull, codes, codebook_size)[1].to(x.dtype)

    return codebook_gradient


def add_in_steps(statistics: Statistics) -> Callable[..., None]:
    """``add_statistics_`` out of ``codebook_stats``."""

    def add_statistics_(
        x: Tensor,  # [B, T, D]
        codes: Tensor,  # [B, T]
        counts: Tensor,  # [K], written
        sums: Tensor | None,  # [K, D], written
    ) -> None:
        """Adds the counts of the codes, and the sums of their tokens."""
        tokens = x if sums is not None else x[..., :1]
        fresh = statistics(tokens, codes, counts.shape[0])
        counts += fresh[0]
        if sums is not None:
            sums += fresh[1]

    return add_statistics_


def step_in_steps(statistics: Statistics, update: Callable[..., None]) -> Callable[..., None]:
    """``ema_step_`` out of statistics and update."""

    def ema_step_(
        x: Tensor,  # [B, T, D]
        codes: Tensor,  # [B, T]
        codebook: Tensor,  # [K, D], written
        cluster_size: Tensor,  # [K], written
        embed_sum: Tensor,  # [K, D], written
        decay: float,
        eps: float,
        normalize: bool,
        plain: bool = False,
    ) -> None:
        """One step of the moving average with the statistics of these tokens."""
        counts, sums = statistics(x, codes, codebook.shape[0])
        revive = torch.zeros_like(counts, dtype=torch.bool)
        update(codebook, cluster_size, embed_sum, counts, sums, revive, decay, eps, 1.0, normalize, plain)

    return ema_step_


def clear_consumed(consume: bool, *consumed: Tensor) -> None:
    """What ``ema_update_`` leaves behind of statistics that it used up."""
    for tensor in consumed if consume else ():
        tensor.zero_()


def or_zeros(
    x: Tensor,  # [B, T, D]
    dquantized: Tensor | None,  # [B, T, D]
    derror: Tensor | None,  # [B, T]
) -> tuple[Tensor, Tensor]:
    """Absent gradients as tensors, without memory of their own."""
    if dquantized is None:
        dquantized = x.new_zeros(()).expand(x.shape)
    if derror is None:
        derror = torch.zeros((), dtype=accumulation_dtype(x.dtype), device=x.device).expand(x.shape[:2])
    return dquantized, derror


def masked(mask: Tensor | None, dx: Tensor) -> Tensor:  # bool [B, T], [B, T, D] -> [B, T, D]
    """No gradient for what is masked."""
    return dx if mask is None else dx.masked_fill_(~mask[..., None], 0)


def columns_in_steps(
    nearest: Nearest,
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    mask: Tensor | None,  # bool [B, T]
    metric: str,
) -> tuple[Tensor, Tensor]:  # index int64 [K], distance float32 [K]
    """``nearest_tokens``: the search with the roles exchanged. In the place of a token that may not win stands a copy
    of the first that may: the two tie, and whichever index comes out is taken for that token's."""
    tokens = x.reshape(-1, x.shape[-1])  # [N, D]
    if tokens.shape[0] == 0:
        shape = codebook.shape[:1]
        return x.new_full(shape, -1, dtype=torch.int64), x.new_full(shape, torch.nan, dtype=torch.float32)
    valid = tokens.abs().amax(1) < torch.inf  # [N]; NaN is not; a tenth of the time of isfinite().all(1)
    if mask is not None:
        valid = valid & mask.reshape(-1)
    first = valid.long().argmax()  # the lowest index that may win; 0 where none may
    stand_in = torch.where(valid.any(), tokens.index_select(0, first[None]), 0)  # [1, D]
    rows = torch.where(valid[:, None], tokens, stand_in)
    index, distance = (found[0] for found in nearest(codebook[None], rows, metric, "exact"))
    index = torch.where(valid[index.clamp(min=0)], index, first)
    known = (distance == distance) & valid.any()  # NaN: a code that is not finite
    return torch.where(known, index, -1), torch.where(known, distance, torch.nan)


def both_in_steps(nearest: Nearest) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``nearest_both`` out of two searches."""

    def nearest_both(
        x: Tensor,  # [B, T, D]
        codebook: Tensor,  # [K, D]
        mask: Tensor | None,  # bool [B, T]
        metric: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # codes [B, T], distance [B, T], tokens [K], token_distance [K]
        """See ``vqkernels.nearest_both``."""
        codes, distance = nearest(x, codebook, metric, "exact")
        return codes, distance, *columns_in_steps(nearest, x, codebook, mask, metric)

    return nearest_both


def both_details(*_args: object) -> str:
    """What ``explain`` says of ``both_in_steps``."""
    return "two searches, the second with the roles exchanged"
