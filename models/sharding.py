"""A model spread over all processes (FSDP2): each holds a slice of every weight, of its gradient and of Adam's moments.

Quantizers stay whole on every process: their codes are compared as they are, and their statistics are summed by
themselves. Checkpoints hold whole tensors either way, so a run may go on sharded or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from vqkernels.nn import Codebook, LookupFreeQuantizer
from vqkernels.nn.distributed import all_reduce_packed, rank_and_world

QUANTIZERS = (Codebook, LookupFreeQuantizer)


def _outermost_lists(module: nn.Module) -> Iterable[nn.ModuleList]:
    """The lists of levels or blocks that lie in no other list; their parts are gathered one at a time."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def shard(model: nn.Module, device: torch.device) -> None:
    """Turns the weights into slices, in place; all processes must call it, with equal weights."""
    mesh = init_device_mesh(device.type, (rank_and_world()[1],))
    whole = {weight for module in model.modules() if isinstance(module, QUANTIZERS) for weight in module.parameters()}
    for parts in _outermost_lists(model):
        for part in parts:
            if any(weight not in whole for weight in part.parameters()):
                fully_shard(part, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward sums gradients over the processes; not in all but the last of several micro-batches."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def reduce_whole_gradients(parameters: Iterable[Tensor]) -> None:
    """The mean over all processes for the gradients of what is not sharded."""
    gradients = [each.grad for each in parameters if each.grad is not None and not isinstance(each, DTensor)]
    world = rank_and_world()[1]
    if gradients and world > 1:
        for own, total in zip(gradients, all_reduce_packed(*gradients), strict=True):
            own.copy_(total / world)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:  # []
    """Scales gradients, sliced or whole, down to a common norm; returns their norm from before."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    slices = [each.to_local() for each in gradients if isinstance(each, DTensor)]
    whole = [each for each in gradients if not isinstance(each, DTensor)]
    zero = torch.zeros((), device=gradients[0].device)
    (sliced,) = all_reduce_packed(sum((each.float().square().sum() for each in slices), zero))
    norm = (sliced + sum((each.float().square().sum() for each in whole), zero)).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for each in (*slices, *whole):
        each.mul_(scale)
    return norm


def gathered(tree: Any) -> Any:
    """Nested lists and dicts with whole tensors in the place of slices; all processes must call it."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, tree)


def sliced_like(
    value: Tensor,  # any shape
    own: Tensor,  # the same shape
) -> Tensor:  # the same shape
    """A whole tensor as slices where ``own`` is."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of whole tensors."""
    own = model.state_dict()
    model.load_state_dict({name: sliced_like(value, own.get(name, value)) for name, value in state.items()})


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """``load_state_dict`` of whole tensors."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for number, entries in state["state"].items():
        own = weights[number]
        moments[number] = {k: sliced_like(v, own) if v.shape == own.shape else v for k, v in entries.items()}
    optimizer.load_state_dict({**state, "state": moments})
