"""k-means over the tokens of all ranks: a start for a codebook (Lloyd 1982; a first codebook as in Zeghidour et al.
2021, sec. III.C)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import codebook_stats, nearest
from ..ops._library import define
from .distributed import all_reduce_packed
from .normalize import l2_normalize
from .sampling import sample_tokens

ITERATIONS = 10


@torch.no_grad()
def kmeans_(
    codebook: Tensor,  # [K, D]
    tokens: Tensor,  # [B, T, D]
    mask: Tensor | None,  # bool [B, T]
    seed: Tensor,  # int64 []
    metric: str,
    precision: str,
    iterations: int,
) -> None:
    """Overwrite ``codebook`` with centroids of the finite, unmasked tokens; the same on every rank.

    Starts from random tokens, no token twice; a code that loses all its tokens restarts at a random one. With fewer
    tokens than codes the codes left over keep their rows. All ranks must call it; a rank may have no tokens.
    """
    valid = tokens.isfinite().all(-1)
    valid = valid if mask is None else valid & mask
    draw = torch.full_like(seed, -1)  # training draws with steps >= 0: never the same numbers
    empty = torch.ones(codebook.shape[0], dtype=torch.bool, device=codebook.device)
    rows = _fill(codebook, empty, tokens, valid, seed, draw)
    for _ in range(iterations):
        draw = draw - 1
        codes = nearest(tokens, rows, metric=metric, precision=precision)[0].masked_fill_(~valid, -1)
        counts, sums = all_reduce_packed(*codebook_stats(tokens, codes, rows.shape[0]))
        empty = counts == 0
        mean = torch.where(empty[:, None], rows, sums / counts.clamp(min=1)[:, None])
        enough = counts.sum() >= rows.shape[0]  # else restarting would only make codes coincide
        rows = _fill(mean, empty & enough, tokens, valid, seed, draw)
        if metric == "cosine":
            rows = l2_normalize(rows)
    codebook.copy_(rows)


def _fill(
    rows: Tensor,  # [K, D]
    empty: Tensor,  # bool [K]
    tokens: Tensor,  # [B, T, D]
    valid: Tensor,  # bool [B, T]
    seed: Tensor,  # int64 []
    draw: Tensor,  # int64 []
) -> Tensor:  # [K, D]
    """``rows`` with a random token in every empty place, as far as the tokens go."""
    hits, sample = all_reduce_packed(*sample_tokens(tokens, valid, empty, seed, draw))
    return torch.where(hits[:, None] > 0, sample, rows)


def _initialize(
    tokens: Tensor,  # [B, T, D]
    mask: Tensor | None,  # bool [B, T]
    codebook: Tensor,  # [K, D]
    initialized: Tensor,  # bool []
    seed: Tensor,  # int64 []
    metric: str,
    precision: str,
) -> None:
    if not initialized.item():  # waits for the device, once in a training run
        kmeans_(codebook, tokens, mask, seed, metric, precision, ITERATIONS)
        initialized.fill_(True)


initialize_ = define(
    "codebook_initialize_(Tensor tokens, Tensor? mask, Tensor(a!) codebook, Tensor(b!) initialized, Tensor seed,"
    " str metric, str precision) -> ()",
    _initialize,
)
