"""The two halves of an EMA step: collecting what a batch says about the codebook, and applying it later.

They are ops, so that torch.compile sees one node each and the process group, the recomputation and the mode are
looked at when the node runs, not when it is traced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..ops import plain
from ..ops._library import define, run
from ..ops.codebook_stats import add_statistics_
from .distributed import (
    all_reduce_packed,
    broadcast_from_first,
    capturing,
    finish_all_reduce,
    rank_and_world,
    start_all_reduce,
)
from .passes import first_forward, recomputing
from .sampling import sample_tokens

NEVER = -(2**40)  # last_used of a code that was never used


def count_codes(
    tokens: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    codebook_size: int,
) -> Tensor:  # [K]
    """Tokens per code."""
    if plain.active():
        return plain.codebook_stats(tokens[..., :1], codes, codebook_size)[0]
    counts = tokens.new_zeros(codebook_size, dtype=accumulation_dtype(tokens.dtype))
    add_statistics_(tokens, codes, counts, None)
    return counts


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
    owner: Tensor,  # int64 [], of sums that are still on their way
    decay: float,
    eps: float,
    revived_size: float,
    relative: bool,
    normalize: bool,
    plain: bool,
) -> None:
    """One EMA step with the pending statistics, which are then empty; nothing happens where they already are.

    With ``relative`` a revived code gets ``revived_size`` times the mean cluster size before the step.
    """
    finish_all_reduce(owner, pending_sums)
    pending = (pending_counts, pending_sums, pending_revive)
    options = (decay, eps, revived_size, normalize, plain)
    if not relative:
        run("ema_update_", codebook, cluster_size, embed_sum, *pending, *options, True)
        return
    size = revived_size * cluster_size.mean()
    run("ema_update_", codebook, cluster_size, embed_sum, *pending, *options, False)
    cluster_size.copy_(torch.where(pending_revive, size, cluster_size))
    embed_sum.copy_(torch.where(pending_revive[:, None], codebook * size, embed_sum))
    for each in pending:
        each.zero_()


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
    owner: Tensor,  # int64 [], of the sums on their way
    pending_counts: Tensor,  # [K]
    pending_sums: Tensor,  # [K, D]
    pending_revive: Tensor,  # bool [K]
    window_counts: Tensor,  # [K]
    last_used: Tensor,  # int64 [K]
    step: Tensor,  # int64 []
    dead_code_threshold: float,
    relative: bool,
    usage_window: int,
) -> None:
    """Counts travel first, this forward's usage needs them; the sums [K, D] follow while the decoder runs."""
    if recomputing():
        return
    alone = rank_and_world()[1] == 1
    if alone and dead_code_threshold == 0:
        observed = torch.zeros_like(pending_counts)
        run("add_statistics_", tokens, codes, observed, pending_sums)
        pending_counts += observed
        _remember(observed, window_counts, last_used, step, usage_window)
        return
    counts, slots = run("codebook_stats", tokens, codes, cluster_size.shape[0])
    if dead_code_threshold == 0:
        (observed,) = (counts,) = all_reduce_packed(counts)
    else:
        dead = dead_codes(cluster_size, dead_code_threshold, relative)  # before this step: the same on every rank
        hits, rows = sample_tokens(tokens, codes >= 0, dead & ~pending_revive, seed, step)
        slots = torch.where(dead[:, None], rows, slots)  # a dead code's tokens make way for its sample
        observed, hits = all_reduce_packed(counts, hits)
        counts = torch.where(dead, hits, observed)
        pending_revive |= hits > 0
    pending_counts += counts
    if alone:
        pending_sums += slots
    elif capturing(tokens):  # a CUDA graph holds its whole step: nothing may be on its way from one replay to the next
        pending_sums += all_reduce_packed(slots)[0]
    else:
        finish_all_reduce(owner, pending_sums)  # of the last micro-batch, where the update is deferred
        start_all_reduce(owner, slots)
    _remember(observed, window_counts, last_used, step, usage_window)


def dead_codes(
    cluster_size: Tensor,  # [K]
    threshold: float,
    relative: bool,
) -> Tensor:  # bool [K]
    """Codes with fewer decayed tokens per step than ``threshold``, or than that many times the mean of all codes."""
    return cluster_size < (threshold * cluster_size.mean() if relative else threshold)


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
    " Tensor(e!) pending_sums, Tensor(f!) pending_revive, Tensor owner, float decay, float eps, float revived_size,"
    " bool relative, bool normalize, bool plain) -> ()",
    _apply,
)
collect_ = define(
    "codebook_collect_(Tensor tokens, Tensor codes, Tensor cluster_size, Tensor seed, Tensor owner,"
    " Tensor(a!) pending_counts, Tensor(b!) pending_sums, Tensor(c!) pending_revive, Tensor(d!) window_counts,"
    " Tensor(e!) last_used, Tensor(f!) step, float dead_code_threshold, bool relative, int usage_window) -> ()",
    _collect,
)
observe_ = define(
    "codebook_observe_(Tensor tokens, Tensor codes, Tensor(a!) window_counts, Tensor(b!) last_used,"
    " Tensor(c!) step, int usage_window) -> ()",
    _observe,
)
synchronize_ = define("codebook_synchronize_(Tensor(a!)[] state, int number) -> ()", _synchronize)
