"""Codes drawn from the soft assignment in place of the nearest ones, in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops._library import define
from ..ops._logits import check_temperature
from ..ops.sample_codes import sample_codes
from .distributed import rank_and_world
from .passes import recomputing


@dataclass(frozen=True)
class SamplingOptions:
    """Draw each token's code with P(k) = softmax_k(-|x - c_k|^2 / temperature) (cosine: cos / temperature)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


def draw_codes(
    tokens: Tensor,  # [B, T, D]
    rows: Tensor,  # [K, D]
    metric: str,
    temperature: float,
    seed: Tensor,  # int64 []
    draw: Tensor,  # int64 [], counted up
) -> Tensor:  # int64 [B, T]
    """A function of seed, rank and draw; the recomputation of a checkpoint draws the same codes again."""
    count_(draw)
    own = seed * 65537 + rank_and_world()[0]  # ranks see different tokens: their noise should differ too
    return sample_codes(tokens.detach(), rows.detach(), metric=metric, temperature=temperature, seed=own, step=draw)


@torch.no_grad()
def _count(draw: Tensor) -> None:
    if not recomputing():
        draw += 1


count_ = define("codebook_count_(Tensor(a!) draw) -> ()", _count)
