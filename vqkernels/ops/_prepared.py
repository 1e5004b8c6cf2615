"""What every op that takes a prepared codebook asks of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import PreparedCodebook


def opened(
    codebook: Tensor | PreparedCodebook,  # [K, D]
    metric: str | None,
) -> tuple[Tensor, str]:
    """The rows that are searched, and the metric: "euclidean" where None is said, or the prepared codebook's own.

    Raises:
        ValueError: a metric that the codebook was not prepared for.
    """
    if not isinstance(codebook, PreparedCodebook):
        return codebook, "euclidean" if metric is None else metric
    if metric is not None and metric != codebook.metric:
        raise ValueError(f"metric: expected {codebook.metric!r}, for which codebook was prepared, got {metric!r}")
    return codebook.rows, codebook.metric


def prepared_search(codebook: Tensor | PreparedCodebook) -> bool:
    """Whether a search goes to the prepared form: not while a graph is traced, which knows tensors alone."""
    return isinstance(codebook, PreparedCodebook) and not torch.compiler.is_compiling()
