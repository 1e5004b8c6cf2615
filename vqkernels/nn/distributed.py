"""Sums over ranks. The process group is looked up at every call, so that it may be created after the module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_packed(
    *parts: Tensor,  # any shapes, one dtype and device
) -> tuple[Tensor, ...]:  # the same shapes
    """Each part summed over all ranks, in one collective; the parts themselves where there is one rank.

    Every rank gets the same bits. All ranks must call it, each with the same shapes.
    """
    if rank_and_world()[1] == 1:
        return parts
    packed = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(packed)
    pieces = packed.split([part.numel() for part in parts])
    return tuple(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))


def broadcast_from_first(
    tensors: Sequence[Tensor],  # any shapes and dtypes
) -> None:
    """Overwrite every rank's tensors with rank 0's. All ranks must call it."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
