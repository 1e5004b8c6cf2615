"""Searches of a prepared codebook by the C++ and CUDA C++ kernels."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .. import _extension
from .compiled import nearest_details, supports, supports_on_cpu, value_errors
from .prepared import PreparedCodebook
from .registry import register


class Snapshot:
    """The C++ kernels' packed codebook, kept as long as this object lives."""

    def __init__(self, number: int, details: str | None) -> None:
        self.number = number
        self.details = details  # which pass it was packed for, and why
        weakref.finalize(self, _release(), number).atexit = False  # the process frees all of it


@cache
def _release() -> Callable[[int], None]:
    function = ctypes.CDLL(str(_extension.library_path())).vqkernels_release_snapshot
    function.argtypes, function.restype = [ctypes.c_int64], None
    return function


def _snapshot(prepared: PreparedCodebook, precision: str) -> Snapshot:
    """Packed for the instruction set and the pass that are in force when it is first asked for."""

    def pack(rows: Tensor) -> Snapshot:  # [K, D]
        with value_errors:
            number = torch.ops.vqkernels_C.take_snapshot(rows, prepared.metric == "cosine", precision == "exact")
        return Snapshot(number, nearest_details(rows, rows, prepared.metric, precision))

    return prepared.form(("cpu", precision), pack)


def nearest_prepared(
    x: Tensor,  # [B, T, D]
    prepared: PreparedCodebook,  # [K, D]
    precision: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    """See ``vqkernels.nearest``."""
    if not x.is_cuda:
        return torch.ops.vqkernels_C.nearest_of_snapshot(x, _snapshot(prepared, precision).number)
    cosine, exact = prepared.metric == "cosine", precision == "exact"
    kept = prepared.form(("cuda",), lambda rows: torch.ops.vqkernels_C.prepare_operands(rows, cosine))
    return torch.ops.vqkernels_C.nearest_of_operands(x, prepared.rows, *kept, cosine, exact)


def nearest_k_prepared(
    x: Tensor,  # [B, T, D]
    prepared: PreparedCodebook,  # [K, D]
    k: int,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T, k], distance float32 [B, T, k]
    """See ``vqkernels.nearest_k``."""
    return torch.ops.vqkernels_C.nearest_k_of_snapshot(x, _snapshot(prepared, "exact").number, k)


def _details(x: Tensor, prepared: PreparedCodebook, precision: str) -> str | None:
    """The pass that it was packed for, or will be."""
    if x.device.type == "cuda":
        words = nearest_details(x, prepared.rows, prepared.metric, precision)
        return f"prepared codebook, its operand and bounds are kept: no kernel works on codes before the pass; {words}"
    known = prepared.known_form(("cpu", precision))
    words = nearest_details(x, prepared.rows, prepared.metric, precision) if known is None else known.details
    return f"prepared codebook, no fingerprint and no packing; {words}"


def _k_details(x: Tensor, prepared: PreparedCodebook, _k: int) -> str | None:
    return _details(x, prepared, "exact")


register("nearest_prepared", "compiled", nearest_prepared, supports=supports, details=_details)
register("nearest_k_prepared", "compiled", nearest_k_prepared, supports=supports_on_cpu, details=_k_details)
