"""How a codebook does: numbers to log, on its device, so that asking waits for nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.nearest_k import nearest_k
from .distributed import all_reduce_packed


@dataclass(frozen=True, eq=False)
class CodebookHealth:
    """What ``Codebook.health`` returns; the same on every rank, as the statistics are."""

    usage: Tensor  # [] share of the codes with a token in the last ``usage_window`` training forwards
    perplexity: Tensor  # [] exp(entropy of the code frequencies) over that window
    dead_share: Tensor  # [] share of the codes below the dead code threshold; without one, of those out of use
    norm_drift: Tensor  # [] mean length of the codes over that at the start (init, k-means, loading), minus 1


def mean_length(
    rows: Tensor,  # [K, D]
) -> Tensor:  # []
    """Mean euclidean length of the codes."""
    return torch.linalg.vector_norm(rows, dim=1).mean()


@torch.no_grad()
def margin_histogram(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    *,
    bins: int = 10,
    metric: str = "euclidean",
) -> Tensor:  # [bins] float32
    """How clearly tokens choose: a histogram of (d2 - d1) / d2, d1 and d2 the distances of the two nearest codes.

    Args:
        x: tokens [..., D], see ``vqkernels.nearest_k``, which finds the two codes (at the cost of one more search).
        codebook: codes [K, D], K >= 2.
        bins: equal ones from 0 (a tie: the token sits between two codes) to 1 (it sits on its code).
        metric: "euclidean" (squared distances) or "cosine" (1 - cosine).

    Returns:
        counts float32 [bins], summed over ranks where there is a process group: every rank must call it then. Tokens
        with NaN or Inf are left out; both distances 0 count as a tie. On CUDA it may wait for the
        device: for logging, not for a training step.

    Raises:
        ValueError: bins < 1, or an argument that ``nearest_k`` refuses.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins: expected an integer >= 1, got {bins!r}")
    codes, distance = nearest_k(x, codebook, 2, metric=metric)
    near, next_near = distance.reshape(-1, 2).clamp(min=0).unbind(1)  # [N]
    margin = torch.where(next_near > 0, (next_near - near) / next_near, 0.0)
    place = (margin * bins).nan_to_num().long().clamp(0, bins - 1)
    counted = (codes.reshape(-1, 2)[:, 0] >= 0).to(torch.int64)
    counts = torch.zeros(bins, dtype=torch.int64, device=x.device).index_add_(0, place, counted)  # integers: any order
    return all_reduce_packed(counts)[0].float()
