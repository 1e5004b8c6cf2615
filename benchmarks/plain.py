"""Search and k-means in plain torch, by blocks of tokens whose scores stay in cache: a peer, and a yardstick."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES = 1 << 20, 1 << 26  # scores held at once: L2 of a core; a few waves


def blocked_argmin(
    x: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
) -> Tensor:  # int64 [N]
    """Nearest codes by ``addmm`` and ``argmin``."""
    return torch.cat([scores.argmin(dim=1) for scores in _blocked_scores(x, codebook)])


def blocked_top(
    x: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    k: int,
) -> Tensor:  # int64 [N, k]
    """The k nearest codes by ``addmm`` and ``topk``."""
    return torch.cat([scores.topk(k, dim=1, largest=False).indices for scores in _blocked_scores(x, codebook)])


def _blocked_scores(x: Tensor, codebook: Tensor) -> Iterator[Tensor]:  # [N, D], [K, D] -> [n, K] each
    budget = CUDA_CHUNK_BYTES if x.is_cuda else CPU_CHUNK_BYTES
    rows = max(1, budget // (x.element_size() * codebook.shape[0]))
    bias, transposed = codebook.square().sum(dim=1) / 2, codebook.t()
    return (torch.addmm(bias, block, transposed, alpha=-1) for block in x.split(rows))


def lloyd_step(
    x: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
) -> Tensor:  # [K, D]
    """Every code to the mean of its tokens, those without stay."""
    codes = blocked_argmin(x, codebook)
    counts = torch.bincount(codes, minlength=codebook.shape[0])[:, None]
    sums = torch.zeros_like(codebook).index_add_(0, codes, x)
    return torch.where(counts > 0, sums / counts.clamp(min=1), codebook)
