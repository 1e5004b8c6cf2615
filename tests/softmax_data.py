"""Tokens and codes of the tests of the softmax's ops, and how near their float32 has to be."""

from __future__ import annotations

import pytest
import torch
from quantizers import randn
from torch import Tensor

METRICS = ("euclidean", "cosine", "dot")
N, K, D, T = 45, 37, 11, 0.7
every_metric = pytest.mark.parametrize("metric", METRICS)


def data(dtype: torch.dtype = torch.float32, device: str = "cpu", *, n: int = N, k: int = K, d: int = D):
    x, codebook = randn(n, d, seed=1).to(device, dtype), randn(k, d, seed=2).to(device, dtype)
    return x.requires_grad_(), codebook.requires_grad_()


def wide(*tensors: Tensor) -> list[Tensor]:
    """Leaves in float64 on the CPU with the same numbers."""
    return [t.detach().cpu().double().requires_grad_() for t in tensors]


def float32_error(x: Tensor, codebook: Tensor, metric: str, temperature: float) -> float:
    """How far rounding can move a logit in float32, by the usual bound on a product of D terms (Higham 2002, 3.5)."""
    lengths = 1.0 if metric == "cosine" else (x.norm(dim=1).max() * codebook.norm(dim=1).max()).item()
    return 4 * (x.shape[1] + 6) * 2.0**-24 * lengths / temperature


def assert_near(mine: Tensor, truth: Tensor, tolerance: float) -> None:
    """By norm, relative to the truth's."""
    assert mine.shape == truth.shape
    assert (mine.detach().cpu().double() - truth).norm() <= tolerance * truth.norm()
