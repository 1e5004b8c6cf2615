"""The ``vqkernels::`` namespace of logical ops, and what every op does to its arguments first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._dtypes import DTYPES, HALF
from ..backends import select

_LIBRARY = torch.library.Library("vqkernels", "DEF")


def _returns_nothing(*_args: Any) -> None:
    return None


def define(schema: str, fn: Callable[..., Any], fake: Callable[..., Any] = _returns_nothing) -> Any:
    """Enter an op: ``fn`` runs it on CPU and CUDA tensors, ``fake`` gives the shapes of what it returns."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.vqkernels, name).default
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _noticed(fn, op), key)
    torch.library.register_fake(f"vqkernels::{name}", fake, lib=_LIBRARY)
    return op


def _noticed(fn: Callable[..., Any], op: Any) -> Callable[..., Any]:
    """``fn``, and autograd learns what it wrote: a backward that saved that tensor raises instead of reading it."""
    written = [i for i, each in enumerate(op._schema.arguments) if each.alias_info and each.alias_info.is_write]
    if not written:
        return fn

    def noticed(*args: Any) -> Any:
        result = fn(*args)
        for i in written:
            for tensor in args[i] if isinstance(args[i], (list, tuple)) else (args[i],):
                if tensor is not None and not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
        return result

    return noticed


def run(op: str, *args: Any) -> Any:
    """Call the kernel that ``backends`` chooses for these arguments."""
    return select(op, *args)(*args)


def as_tokens(
    x: Tensor,  # [..., D]
) -> Tensor:  # [B, T, D]
    """Three dimensions, as strides over the same memory wherever that is possible."""
    if x.dim() < 3:
        return x.reshape(1, -1, x.shape[-1]) if x.dim() == 1 else x.unsqueeze(0)
    return x if x.dim() == 3 else x.flatten(1, -2)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_tokens(x: Tensor, codebook: Tensor) -> None:
    """Raise with the argument's name, what was expected and what came."""
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {tensor.dtype}")
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(f"codebook: expected [K, D] with K, D >= 1, got shape {list(codebook.shape)}")
    if x.dim() < 1 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"x: expected [..., {codebook.shape[1]}] to match codebook {list(codebook.shape)}, got {list(x.shape)}"
        )
    if x.device != codebook.device:
        raise ValueError(f"codebook: expected on {x.device} like x, got {codebook.device}")


def promoted(x: Tensor, codebook: Tensor) -> Tensor:
    """``x`` in the codebook's dtype: the same one, or a half type (exactly) widened to float32.

    Raises:
        TypeError: any other pair of dtypes.
    """
    if x.dtype == codebook.dtype:
        return x
    if x.dtype in HALF and codebook.dtype == torch.float32:
        return x.float()
    raise TypeError(f"codebook: expected {x.dtype} like x (or float32 under a half-precision x), got {codebook.dtype}")


def check_codes(codes: Tensor, x: Tensor) -> None:  # [...], [..., D]
    """Raise unless ``codes`` are int64, one for each token of x, on its device."""
    if codes.dtype != torch.int64 or codes.shape != x.shape[:-1] or codes.device != x.device:
        got = f"{codes.dtype} {list(codes.shape)} on {codes.device}"
        raise ValueError(f"codes: expected int64 {list(x.shape[:-1])} on {x.device}, got {got}")


def check_mask(mask: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise unless ``mask`` is a bool tensor of that shape on that device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a bool tensor {list(shape)}, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"mask: expected bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask: expected on {device} like x, got {mask.device}")
