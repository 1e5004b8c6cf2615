"""Quantizers, tokens and comparisons that several test modules share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vqkernels.nn import VectorQuantizer

OPTIONS = {
    "plain": {},
    "cosine": {"metric": "cosine"},
    "gradient": {"update": "gradient"},
    "gradient-cosine": {"update": "gradient", "metric": "cosine"},
    "projected": {"codebook_dim": 5},
    "revival": {"dead_code_threshold": 0.5},
    "kmeans": {"kmeans_init": True},
    "rotation": {"gradient": "rotation"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(dim: int = 8, codebook_size: int = 32, *, seed: int = 0, **options) -> VectorQuantizer:
    torch.manual_seed(seed)
    return VectorQuantizer(dim, codebook_size, **options)


def distances(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
) -> Tensor:  # [N, M]
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def state(module: nn.Module) -> dict[str, Tensor]:
    """Everything a module holds, pending statistics included, but not where its norm drift counts from."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {k: v.detach().clone() for k, v in named if not k.endswith("start_length")}


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = state(a), state(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def train_step(module: VectorQuantizer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """One forward and backward; x's gradient."""
    x = x.clone().requires_grad_()
    quantized, _, loss = module(x, mask)
    (quantized.square().sum() + loss).backward()
    assert x.grad is not None
    return x.grad
