"""Normal noise for training forwards: a function of a seed, the process and a count, which a checkpoint keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqkernels.nn.distributed import rank_and_world
from vqkernels.nn.draws import count_
from vqkernels.ops._random import uniform


def normal(
    shape: Sequence[int],
    seed: Tensor,  # int64 []
    step: Tensor,  # int64 []
) -> Tensor:  # float32, of that shape
    """N(0, 1) by Box and Muller, from uniform numbers that are a hash of seed, step and place; the host never waits."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    first, second = uniform(2 * pairs, seed, step, torch.empty(0, device=seed.device)).view(2, pairs)
    radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * math.pi * second  # 1 - first lies in (0, 1]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].view(*shape)


class Noise(nn.Module):
    """N(0, 1), new in every call. Ranks draw different numbers, as they see different images.

    Its seed comes from torch's generator when it is made; the count of the draws is a buffer, so that a resumed run
    draws what the one that was never stopped would have drawn.
    """

    seed: Tensor  # int64 []
    draw: Tensor  # int64 []

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("draw", torch.zeros((), dtype=torch.int64))

    def forward(self, shape: Sequence[int]) -> Tensor:  # float32, of that shape
        """The next draw."""
        count_(self.draw)
        return normal(shape, self.seed * 65537 + rank_and_world()[0], self.draw)
