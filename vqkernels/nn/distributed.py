"""Sums over ranks. The process group is looked up at every call, so that it may be created after the module.

What nobody needs before the next step travels in the background: ``start_all_reduce`` now, ``finish_all_reduce`` where
the sum is used. In between it belongs to an *owner*, a tensor that nobody writes or replaces, so that torch.compile
makes no copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def capturing(tensor: Tensor) -> bool:
    """Whether what runs on the tensor's device is being recorded into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


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


@dataclass(frozen=True, eq=False)
class _Flight:
    """One sum on its way."""

    owner: StorageWeakRef  # its address may belong to somebody else once this has expired
    work: dist.Work
    part: Tensor  # any shape; the sum, after work.wait()


_FLIGHTS: dict[int, _Flight] = {}  # by the owner's address


def start_all_reduce(
    owner: Tensor,
    part: Tensor,  # any shape; not to be touched again
) -> None:
    """Begin to sum ``part`` over all ranks; ``finish_all_reduce`` must come before the owner's next start.

    All ranks must call it, in the same order as their other collectives.
    """
    for address in [key for key, flight in _FLIGHTS.items() if flight.owner.expired()]:
        del _FLIGHTS[address]  # of a module that is gone
    work = dist.all_reduce(part, async_op=True)
    assert work is not None
    _FLIGHTS[owner.data_ptr()] = _Flight(StorageWeakRef(owner.untyped_storage()), work, part)


def finish_all_reduce(
    owner: Tensor,
    into: Tensor,  # the part's shape; written
) -> None:
    """Add what is on its way for ``owner``, if anything, to ``into``. Local: it waits for no rank but the slowest."""
    flight = _FLIGHTS.get(owner.data_ptr()) if _FLIGHTS else None
    if flight is not None and not flight.owner.expired():
        if capturing(into):  # it stays on its way, for update_codebook() to finish
            raise RuntimeError("codebook: sums of the last step are still on their way; call update_codebook() first")
        del _FLIGHTS[owner.data_ptr()]
        flight.work.wait()  # on CUDA the stream waits, not the host
        into += flight.part


def broadcast_from_first(
    tensors: Sequence[Tensor],  # any shapes and dtypes
) -> None:
    """Overwrite every rank's tensors with rank 0's. All ranks must call it."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
