"""The soft assignment and the peers' losses over it as [N, K] formulas in float64, to test against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def logits(
    x: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    metric: str,
    temperature: float,
) -> Tensor:  # [N, K]
    if metric == "euclidean":
        return -(x[:, None] - codebook).square().sum(-1) / temperature
    if metric == "cosine":
        x, codebook = F.normalize(x, dim=1), F.normalize(codebook, dim=1)
    return x @ codebook.T / temperature


def entropy(p: Tensor) -> Tensor:  # [..., K] -> [...]
    return torch.special.entr(p).sum(-1)


def llamagen_loss(affinity: Tensor, temperature: float = 0.01) -> Tensor:  # [N, K] -> []
    """As LlamaGen, MAGVIT and SEED-Voken state it: 1e-5 inside the batch's logarithm."""
    p = (affinity / temperature).softmax(1)
    mean = p.mean(0)
    return entropy(p).mean() + (mean * (mean + 1e-5).log()).sum()


def clamped_entropy(p: Tensor, least: float = 1e-5) -> Tensor:  # [..., K] -> [...]
    """vector-quantize-pytorch's: the logarithm stops at 1e-5."""
    return -(p * p.clamp(min=least).log()).sum(-1)


def all_signs(dim: int, scale: float = 1.0) -> Tensor:  # [2^D, D] float64
    """Code k holds the bits of k, the first channel the most significant."""
    bits = (torch.arange(1 << dim)[:, None] >> torch.arange(dim - 1, -1, -1)) & 1
    return scale * (2.0 * bits.double() - 1)
