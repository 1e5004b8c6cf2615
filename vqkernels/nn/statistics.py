"""The two halves of an EMA step: collecting what a batch says about the codebook, and applying it later.

They are ops, so that torch.compile sees one node each and the process group, the recomputation and the mode are
looked at when the node runs, not when it is traced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import codebook_stats, ema_update_
from ..ops._library import define
from .distributed import all_reduce_packed, broadcast_from_first
from .passes import first_forward, recomputing
from .sampling import sample_tokens

NEVER = -(2**40)  # last_used of a code that was never used


def count_codes(
    tokens: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    codebook_size: int,
) -> Tensor:  # [K]
    """Tokens per code, over the first channel alone: the sums are not wanted."""
    return codebook_stats(tokens[..., :1], codes, codebook_size)[0]


def usage_and_perplexity(
    used: Tensor,  # bool [K]
    counts: Tensor,  # [K]
) -> tuple[Tensor, Tensor]:  # [], []
    """Share of codes in use, and exp(entropy of the code frequencies); 1 where nothing was counted."""
    frequency = counts / counts.sum().clamp(min=torch.finfo(counts.dtype).tiny)
    return used.to(counts.dtype).mean(), torch.special.entr(frequency).sum().exp()


def apply_pending(
    codebook: Tensor,  # [K, D]
    cluster_size: Tensor,  # [K]
    embed_sum: Tensor,  # [K, D]
    pending_counts: Tensor,  # [K]
    pending_sums: Tensor,  # [K, D]
    pending_revive: Tensor,  # bool [K]
    decay: float,
    eps: float,
    revived_size: float,
    normalize: bool,
) -> None:
    """One EMA step with the pending statistics, which are then empty; nothing happens where they already are."""
    ema_update_(
        codebook,
        cluster_size,
        embed_sum,
        pending_counts,
        pending_sums,
        revive=pending_revive,
        decay=decay,
        eps=eps,
        revived_size=revived_size,
        normalize=normalize,
    )
    for pending in (pending_counts, pending_sums, pending_revive):
        pending.zero_()


@torch.no_grad()
def _apply(codebook: Tensor, *rest: object) -> None:
    if not recomputing():
        apply_pending(codebook, *rest)  # type: ignore[arg-type]


@torch.no_grad()
def _collect(
    tokens: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    cluster_size: Tensor,  # [K]
    seed: Tensor,  # int64 []
    pending_counts: Tensor,  # [K]
    pending_sums: Tensor,  # [K, D]
    pending_revive: Tensor,  # bool [K]
    window_counts: Tensor,  # [K]
    last_used: Tensor,  # int64 [K]
    step: Tensor,  # int64 []
    dead_code_threshold: float,
    usage_window: int,
) -> None:
    if recomputing():
        return
    counts, sums = codebook_stats(tokens, codes, cluster_size.shape[0])
    if dead_code_threshold == 0:
        counts, sums = all_reduce_packed(counts, sums)
        observed = counts
    else:
        dead = cluster_size < dead_code_threshold  # before this step: the same on every rank
        hits, rows = sample_tokens(tokens, codes >= 0, dead & ~pending_revive, seed, step)
        slots = torch.where(dead[:, None], rows, sums)  # a dead code's tokens make way for its sample
        observed, hits, sums = all_reduce_packed(counts, hits, slots)
        counts = torch.where(dead, hits, observed)
        pending_revive |= hits > 0
    pending_counts += counts
    pending_sums += sums
    _remember(observed, window_counts, last_used, step, usage_window)


@torch.no_grad()
def _observe(
    tokens: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    window_counts: Tensor,  # [K]
    last_used: Tensor,  # int64 [K]
    step: Tensor,  # int64 []
    usage_window: int,
) -> None:
    if recomputing():
        return
    (counts,) = all_reduce_packed(count_codes(tokens, codes, window_counts.shape[0]))
    _remember(counts, window_counts, last_used, step, usage_window)


@torch.no_grad()
def _synchronize(state: list[Tensor], number: int) -> None:
    if first_forward(number):
        broadcast_from_first(state)


def _remember(
    counts: Tensor,  # [K]
    window_counts: Tensor,  # [K]
    last_used: Tensor,  # int64 [K]
    step: Tensor,  # int64 []
    usage_window: int,
) -> None:
    step += 1
    last_used.copy_(torch.where(counts > 0, step, last_used))
    window_counts.mul_(1 - 1 / usage_window).add_(counts)


apply_pending_ = define(
    "codebook_apply_(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum, Tensor(d!) pending_counts,"
    " Tensor(e!) pending_sums, Tensor(f!) pending_revive, float decay, float eps, float revived_size, bool normalize)"
    " -> ()",
    _apply,
)
collect_ = define(
    "codebook_collect_(Tensor tokens, Tensor codes, Tensor cluster_size, Tensor seed, Tensor(a!) pending_counts,"
    " Tensor(b!) pending_sums, Tensor(c!) pending_revive, Tensor(d!) window_counts, Tensor(e!) last_used,"
    " Tensor(f!) step, float dead_code_threshold, int usage_window) -> ()",
    _collect,
)
observe_ = define(
    "codebook_observe_(Tensor tokens, Tensor codes, Tensor(a!) window_counts, Tensor(b!) last_used,"
    " Tensor(c!) step, int usage_window) -> ()",
    _observe,
)
synchronize_ = define("codebook_synchronize_(Tensor(a!)[] state, int number) -> ()", _synchronize)
