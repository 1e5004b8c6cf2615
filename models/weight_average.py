"""A moving average of a model's weights, which is what gets evaluated and saved."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .sharding import sliced_like

Model = TypeVar("Model", bound=nn.Module)


class WeightAverage(Generic[Model]):
    """Exponential moving average of the parameters; buffers, such as the quantizer's codebook, are copied.

    Args:
        model: the model to follow, not sharded.
        decay: weight of the past per step; the first steps use (1 + step) / (10 + step) where that is less, so
            that a short run does not keep its random start. 0 follows the model exactly.

    Attributes:
        model: holds the average; where the model that it follows is sharded, after ``gather``.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model: Model = copy.deepcopy(model)
        self.model.eval().requires_grad_(False)
        self._values: list[Tensor] = list(self.model.parameters())

    def follow(self, model: nn.Module) -> None:
        """Says that the model has been sharded, or that ``self.model`` has been loaded."""
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        self._values = [sliced_like(mine.detach(), theirs) for mine, theirs in pairs]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after `step` optimizer steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights: list[Tensor] = list(model.parameters())
        if any(isinstance(weight, DTensor) for weight in weights):  # torch takes no list of both kinds
            for mine, theirs in zip(self._values, weights, strict=True):
                mine.lerp_(theirs, 1 - decay)
        else:
            torch._foreach_lerp_(self._values, weights, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def gather(self) -> None:
        """Brings ``model`` up to date; all processes must call it."""
        for mine, value in zip(self.model.parameters(), self._values, strict=True):
            if isinstance(value, DTensor):
                mine.copy_(value.full_tensor())
