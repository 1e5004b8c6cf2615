"""Searches of a prepared codebook in plain torch: those of its snapshot."""

from __future__ import annotations

from torch import Tensor

from .prepared import PreparedCodebook
from .reference_nearest import nearest
from .reference_nearest_k import nearest_k
from .registry import register


def nearest_prepared(
    x: Tensor,  # [B, T, D]
    prepared: PreparedCodebook,  # [K, D]
    precision: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    """See ``vqkernels.nearest``."""
    return nearest(x, prepared.rows, prepared.metric, precision)


def nearest_k_prepared(
    x: Tensor,  # [B, T, D]
    prepared: PreparedCodebook,  # [K, D]
    k: int,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T, k], distance float32 [B, T, k]
    """See ``vqkernels.nearest_k``."""
    return nearest_k(x, prepared.rows, k, prepared.metric)


def _details(*_args: object) -> str:
    return "prepared codebook: its snapshot, nothing is packed"


register("nearest_prepared", "reference", nearest_prepared, details=_details)
register("nearest_k_prepared", "reference", nearest_k_prepared, details=_details)
