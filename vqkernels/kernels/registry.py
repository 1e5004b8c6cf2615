"""The table of kernels: who implements which op, and what each one can take.

A kernel module ends with one ``register(...)`` per op. ``vqkernels.backends`` imports the modules and chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OPS = (
    "nearest",
    "nearest_k",
    "nearest_both",
    "nearest_prepared",
    "nearest_k_prepared",
    "gather",
    "quantize",
    "quantize_backward",
    "codebook_gradient",
    "codebook_stats",
    "add_statistics_",
    "ema_update_",
    "ema_step_",
    "softmax_forward",
    "softmax_code_sums",
    "softmax_backward",
    "softmax_sample",
)


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op."""

    op: str
    backend: str
    fn: Callable[..., Any]
    supports: Callable[..., str | None]  # called with fn's positional arguments: None, or why not
    details: Callable[..., str | None]  # likewise: what it will do with them, in one line


_TABLE: dict[tuple[str, str], Kernel] = {}


def _anything(*_args: Any) -> None:
    return None


def register(
    op: str,
    backend: str,
    fn: Callable[..., Any],
    supports: Callable[..., str | None] = _anything,
    details: Callable[..., str | None] = _anything,
) -> None:
    """Enter ``fn`` as ``backend``'s implementation of ``op``; entering a pair twice is an error."""
    if op not in OPS:
        raise ValueError(f"op: expected one of {OPS}, got {op!r}")
    if (op, backend) in _TABLE:
        raise ValueError(f"{op!r} is already registered for backend {backend!r}")
    _TABLE[op, backend] = Kernel(op, backend, fn, supports, details)


def lookup_kernel(op: str, backend: str) -> Kernel | None:
    """The registered implementation, or None where the backend has none."""
    return _TABLE.get((op, backend))
