"""lookup: the codebook rows of codes, the inverse of ``nearest``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import PreparedCodebook


def lookup(
    codes: Tensor,  # integer [...]
    codebook: Tensor | PreparedCodebook,  # [K, D]
) -> Tensor:  # [..., D]
    """Rows of ``codebook``; differentiable with respect to it.

    Args:
        codes: integers in [0, K), any shape.
        codebook: [K, D], or what ``prepare_codebook`` made of it.

    Raises:
        TypeError: codes are not integers.
        IndexError: a code outside [0, K) (looked at on CPU only: on CUDA the look would wait for the device, and
            PyTorch's own device assertion reports it).
    """
    rows = codebook.rows if isinstance(codebook, PreparedCodebook) else codebook
    check_range(codes, rows.shape[0])
    return torch.nn.functional.embedding(codes.long(), rows)


def check_range(codes: Tensor, size: int) -> None:
    """Raise TypeError unless ``codes`` are integers, and on CPU IndexError unless they are in [0, size)."""
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise TypeError(f"codes: expected integers, got {codes.dtype}")
    if not codes.is_cuda and not torch.compiler.is_compiling() and codes.numel():
        low, high = codes.min().item(), codes.max().item()
        if low < 0 or high >= size:
            raise IndexError(f"codes: expected in [0, {size}), got values from {low} to {high}")
