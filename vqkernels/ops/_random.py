"""Random numbers without a generator: a hash of (seed, step, position), the same on every backend and device.

There is no state to save, to rewind on resume or to keep apart on several ranks, and the host waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def mix(
    value: Tensor,  # int64 [...]
) -> Tensor:  # int64 [...] in [0, 2^32)
    """A 32-bit integer hash; both multipliers are below 2^31, so no product leaves int64."""
    value = value & _WORD
    value = ((value ^ (value >> 16)) * 0x21F0AAAD) & _WORD
    value = ((value ^ (value >> 15)) * 0x735A2D97) & _WORD
    return value ^ (value >> 15)


def uniform(
    count: int,
    seed: int | Tensor,  # int64 []
    step: int | Tensor,  # int64 []
    like: Tensor,  # gives dtype (float32 or float64) and device
) -> Tensor:  # [count] in [0, 1)
    """Multiples of 2^-24, or of 2^-53 in float64: every one of them is a number of that dtype."""
    position = torch.arange(count, device=like.device)
    start = mix(mix(torch.zeros((), dtype=torch.int64, device=like.device) + seed) + step)
    word = mix(start + position)  # [count]
    if like.dtype == torch.float32:
        return (word >> 8).to(torch.float32) * 2.0**-24
    low = mix(word + 0x9E3779B9)
    return ((word << 21) | (low >> 11)).to(torch.float64) * 2.0**-53
