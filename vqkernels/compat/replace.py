"""replace_quantizers: the peers' quantizers in a model become ours, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from .peer import Peer
from .registry import PEERS


@dataclass(frozen=True)
class ReplaceReport:
    """What ``replace_quantizers`` did. Printable; empty where the model holds no quantizer."""

    swapped: Mapping[str, str] = field(default_factory=dict)  # path -> "library Class", now ours
    left: Mapping[str, str] = field(default_factory=dict)  # path -> why it stays as it was

    def __str__(self) -> str:
        lines = [f"swapped  {path}: {name}" for path, name in self.swapped.items()]
        lines += [f"left     {path or '(the model itself)'}: {reason}" for path, reason in self.left.items()]
        return "\n".join(lines) or "no quantizer found"


def replace_quantizers(model: nn.Module, *, strict: bool = False) -> ReplaceReport:
    """Swap vqkernels into ``model`` wherever one of these stands, and say where:

        vector-quantize-pytorch   VectorQuantize (EMA, euclidean or cosine; learnable euclidean; heads=1)
        diffusers                 VectorQuantizer, as in VQModel
        taming-transformers       VectorQuantizer2, also as a copy in another repository

        print(vq.replace_quantizers(model))

    The new modules hold the very parameters, buffers and submodules of the old ones: an optimiser made before goes
    on, dtype, device, training mode and EMA state stay, and so do the state_dict's keys and shapes. Calls, return
    values and index shapes are the peer's. Codes are the true nearest ones, where the peers' rounding now and then
    picks a farther one; nothing of size N x K is formed. Two things differ: k-means and the revival of dead codes draw
    other random tokens than the peer would, and four rare call arguments of VectorQuantize (topk, ema_update_weight,
    accum_ema_update, codebook_transform_fn) raise NotImplementedError.

    Args:
        model: any module; changed in place. Where it is a quantizer itself there is no place to put another: use
            the ``from_peer`` of a class in ``vqkernels.compat``.
        strict: raise, before anything is changed, if a quantizer cannot be swapped or if there is none.

    Returns:
        ``ReplaceReport``: ``swapped`` and ``left``, which names every option that ours has not. A module whose class
        is called "...Quantiz..." but that is none of the above is named in ``left`` too.

    Raises:
        TypeError: model is no module.
        ValueError: with ``strict``, as said there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found, left = _survey(model)
    if strict and (left or not found):
        report = ReplaceReport(left=left)
        raise ValueError(f"model: expected quantizers that can all be swapped, got\n{report}")
    fresh = {id(old): peer.convert(old) for old, peer in found.values()}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in fresh:
            model.set_submodule(path, fresh[id(module)])
    return ReplaceReport({path: peer.name for path, (_, peer) in found.items()}, left)


def _survey(model: nn.Module) -> tuple[dict[str, tuple[nn.Module, Peer]], dict[str, str]]:
    """What can be swapped, and why the rest cannot; nothing is changed yet."""
    found: dict[str, tuple[nn.Module, Peer]] = {}
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        peer = next((each for each in PEERS if each.recognises(module)), None)
        if peer is None:
            if _looks_like_one(module):
                left[path] = f"no drop-in for {type(module).__module__}.{type(module).__qualname__}"
            continue
        reasons = peer.refusals(module, _around(model, path))
        if not path:
            reasons = ["it has no place in a parent; use the from_peer of a class in vqkernels.compat", *reasons]
        if reasons:
            left[path] = f"{peer.name}: {'; '.join(reasons)}"
        else:
            found[path] = module, peer
    return found, left


def _around(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules that hold the one at ``path``, outermost first."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))] if path else []


def _looks_like_one(module: nn.Module) -> bool:
    kind = type(module)
    return "Quantiz" in kind.__name__ and kind.__module__.split(".")[0] not in ("vqkernels", "torch")
