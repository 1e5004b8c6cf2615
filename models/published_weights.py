"""Networks that are judged by and never trained: their weights are a user's file, or random where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .weight_files import read_weights

Network = TypeVar("Network", bound=nn.Module)

RANDOM_SEED = 0
RANDOM_FEATURES = "random features"  # the label of a network without a weight file, which has no other name
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of its images in [0, 1], which these networks were trained on
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
BRANCH_SCALE = 0.25  # of a random network's residual branches: the sum stays about as large as its input
WRAPPERS = ("state_dict", "model")  # where checkpoints that hold more than weights keep them
NOT_NEEDED = "num_batches_tracked"  # of BatchNorm: older files lack it, and nothing here depends on it


def read_tensors(path: str | Path, option: str) -> dict[str, Tensor]:
    """The tensors of a weight file by name; never its code.

    Args:
        path: see ``read_weights``; also a file that keeps its tensors under "state_dict" or "model".
        option: that named the file; errors begin with it.

    Raises:
        FileNotFoundError, ValueError: no such file, not safe to read, damaged, or it holds no tensors by name.
    """
    try:
        found = read_weights(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{option}: {error}") from error
    if isinstance(found, Mapping):
        found = next((found[name] for name in WRAPPERS if isinstance(found.get(name), Mapping)), found)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{option}: {path}: expected tensors by name, got {_kinds_in(found)}")
    return dict(found)


def _kinds_in(found: object) -> str:
    if not isinstance(found, Mapping):
        return type(found).__name__
    strange = next(name for name, value in found.items() if not isinstance(value, Tensor))
    return f"{strange!r}: {type(found[strange]).__name__}"


def translated(
    tensors: Mapping[str, Tensor],
    rules: Sequence[tuple[str, str]],
) -> dict[str, Tensor]:
    """``tensors`` under other names: those of the first (pattern, replacement) that a whole name matches."""
    result = {}
    for name, tensor in tensors.items():
        rule = next((rule for rule in rules if re.fullmatch(rule[0], name)), None)
        result[name if rule is None else re.sub(rule[0], rule[1], name)] = tensor
    return result


def fill(network: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copies ``tensors`` into a network that has just these; shapes may differ in axes of length 1.

    Args:
        origin: option and file, for messages.

    Raises:
        ValueError: a tensor that is missing, unexpected, or of another size; names it.
    """
    own = network.state_dict()
    for name, value in own.items():
        if name not in tensors:
            if name.endswith(NOT_NEEDED):
                continue
            raise ValueError(f"{origin}: has no {name!r}, shape {list(value.shape)}; it holds another network")
        if tensors[name].squeeze().shape != value.squeeze().shape:
            got = list(tensors[name].shape)
            raise ValueError(f"{origin}: {name} must have shape {list(value.shape)}, got {got}")
    unexpected = sorted(tensors.keys() - own.keys())
    if unexpected:
        raise ValueError(f"{origin}: {unexpected[0]!r} is not part of the network; the file holds another one")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name].reshape(value.shape) if name in tensors else torch.zeros_like(value))


def empty(make: Callable[[], Network]) -> Network:
    """A network whose weights are about to be set: made without torch's own random start, which takes seconds."""
    with torch.device("meta"):
        network = make()
    return network.to_empty(device="cpu")


@torch.no_grad()
def randomize(network: nn.Module, branches: Sequence[Tensor] = ()) -> None:
    """He initialisation from a fixed seed: features that tell textures apart, alike in every run and process.

    Args:
        branches: factors on the residual branches; they become BRANCH_SCALE.
    """
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            drawn = torch.randn(module.weight.shape, generator=generator)
            module.weight.copy_(drawn * (2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.reset_parameters()
    for scale in branches:
        scale.fill_(BRANCH_SCALE)
