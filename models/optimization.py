"""The optimizer of a training run and its learning rate."""

from __future__ import annotations

import math

import torch

from .config import TrainConfig
from .image_model import ImageModel


def learning_rate_at(
    config: TrainConfig,
    step: int,
    share: float,
) -> float:
    """Linear warm-up over the first steps, times a cosine over the share of the run that is done."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return config.learning_rate * warmup * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def make_optimizer(model: ImageModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay for kernels only, as the model says, not for norms, biases and codebooks."""
    kernels = [weight for name, weight in model.named_parameters() if model.decays(name, weight)]
    others = [weight for name, weight in model.named_parameters() if not model.decays(name, weight)]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    first, second = config.betas
    foreach = False if config.sharding == "full" else None  # torch takes no list of sharded and whole weights
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(first, second), foreach=foreach)
