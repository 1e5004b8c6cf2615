"""Vectors of length 1, at any scale."""

from __future__ import annotations

import torch
from torch import Tensor


def l2_normalize(
    x: Tensor,  # [..., D]
) -> Tensor:  # [..., D]
    """x / |x| along the last axis; 0 stays 0, a vector with Inf or NaN becomes NaN.

    Scaled by its largest entry first, so that vectors of 1e30 or 1e-30 neither overflow nor vanish in the square.
    The scale is a constant to autograd: the result does not depend on it.
    """
    scale = x.detach().abs().amax(-1, keepdim=True)
    scaled = x / torch.where(scale > 0, scale, 1)
    # a vector that is not 0 now has a length of at least 1: the clamp is for 0 alone, whose gradient stays finite
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=0.5)
