"""The optimizer of a training run and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import TrainConfig


def learning_rate_at(
    config: TrainConfig,
    step: int,
    share: float,
) -> float:
    """Linear warm-up over the first steps, times a cosine over the share of the run that is done."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return config.learning_rate * warmup * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay for convolution kernels only, not for norms, biases and codebooks."""
    kernels = [weight for weight in model.parameters() if weight.dim() == 4]
    others = [weight for weight in model.parameters() if weight.dim() != 4]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    first, second = config.betas
    foreach = False if config.sharding == "full" else None  # torch takes no list of sharded and whole weights
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(first, second), foreach=foreach)
