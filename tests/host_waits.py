"""What makes the host wait for a device, found on any machine.

    with no_host_waits(device):
        training_step()             # raises HostWait where it would wait, with the stack that led there

"cuda"  the driver tells.
"cpu"   every op and every call of a tensor's method is looked at, inside vqkernels' own ops too.
"meta"  the same, and there are no numbers that could be read; a tensor made on the CPU would have to be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqkernels.kernels.registry import OPS

# read a tensor as Python values without any op that a dispatch mode could see, or would copy from a device to the host
READS = ("tolist", "numpy", "cpu", "item", "__array__", "__contains__", "__format__", "__repr__")
READS += ("__bool__", "__int__", "__float__", "__index__")
DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostWait(AssertionError):
    """Something read a number that a GPU may still be computing."""


def _boolean_index(indices: list[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def waits(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the op's result, or its shape, has to be known to the host."""
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        return _boolean_index(args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and torch.Tag.dynamic_output_shape in func.tags
    return bool(DATA_DEPENDENT & set(func.tags)) or name.startswith("unique")


def _is_read(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "to":
        places = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.device | str)]
        return any(torch.device(place).type == "cpu" for place in places)
    if name in ("tensor", "as_tensor"):
        return any(isinstance(value, Tensor) for value in tree_leaves(args[0]))
    return name in READS and isinstance(args[0], Tensor)


class _Ops(TorchDispatchMode):
    """Looks at every op; inside composite ones and inside vqkernels' own, whose Python runs with this mode on."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(func, args, kwargs):
            raise HostWait(f"{func} waits for the device")
        result = self._inside(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        made = {each.device.type for each in tree_leaves(result) if isinstance(each, Tensor)}
        if self.device == "meta" and "cpu" in made:
            raise HostWait(f"{func} makes a tensor on the CPU")
        return result

    def _inside(self, func, args, kwargs):
        if func.namespace == "vqkernels" and not self._is_kernel(func.overloadpacket.__name__):
            with self:  # its own Python, not through the dispatcher, which would come back to here
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if func.namespace == "aten":
            with self:
                return func.decompose(*args, **kwargs)
        return NotImplemented

    def _is_kernel(self, name: str) -> bool:
        """On meta the ops of vqkernels.ops give shapes; those of the modules, codebook_*, are made of them."""
        return self.device == "meta" and (name in OPS or not name.startswith("codebook_"))


class _Methods(TorchFunctionMode):
    """Looks at every call of a tensor's method."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_read(func, args, kwargs):
            raise HostWait(f"{func.__name__} waits for the device")
        return func(*args, **kwargs)


@contextmanager
def no_host_waits(device: str = "cpu", *, methods: bool = True) -> Iterator[None]:
    """Raise HostWait (on CUDA: torch's RuntimeError) at whatever waits; a kernel in C++ or Triton counts as one op.

    Args:
        methods: look at calls of tensors' methods too; False where Triton's interpreter runs, which makes such calls.
    """
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with _Ops(device), _Methods() if methods else nullcontext():
            yield
