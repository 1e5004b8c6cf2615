"""Which kernel runs: the choice between compiled, Triton and reference, and its explanation.

    backends.select("nearest", x, codebook, "euclidean", "exact")  ->  the kernel to call

An explicit request (``use_backend``, VQKERNELS_BACKEND) is obeyed or fails with every backend's reason; without one the
first backend of ``ORDER`` that can take the tensors runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

from torch import Tensor

from .kernels.in_steps import columns_in_steps as columns_in_steps  # what ops make of any backend's kernels
from .kernels.prepared import PreparedCodebook
from .kernels.registry import OPS, lookup_kernel

BACKENDS = ("compiled", "triton", "reference")
ORDER = {"cpu": ("compiled", "reference"), "cuda": ("triton", "compiled", "reference")}
DEFAULTS: dict[str, tuple[Any, ...]] = {  # completes explain's arguments
    "nearest": ("euclidean", "exact"),
    "nearest_prepared": ("exact",),
    "nearest_both": (None, "euclidean"),
}

_MODULES = {
    "compiled": ("compiled", "compiled_prepared", "compiled_softmax"),
    "triton": (
        *("triton_nearest", "triton_nearest_k", "triton_training", "triton_codebook"),
        *("triton_softmax", "triton_softmax_backward"),
    ),
    "reference": (
        *("reference_nearest", "reference_nearest_k", "reference_prepared"),
        *("reference_training", "reference_softmax"),
    ),
}
_requested: str | None = None


class BackendError(RuntimeError):
    """The requested backend cannot take these tensors; the message holds every backend's reason."""


@dataclass(frozen=True)
class Candidate:
    """What one backend says to one call."""

    backend: str
    reason: str | None  # None: it can run


@cache
def _load(backend: str) -> str | None:
    """Import the backend's kernels; None, or why they cannot be had."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        for module in _MODULES[backend]:
            importlib.import_module(f"vqkernels.kernels.{module}")
    except ImportError as error:
        return f"its kernels cannot be imported: {error}"
    return None


def _reason(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    """None where ``backend`` can run ``op`` on ``args``, otherwise one line."""
    unavailable = _load(backend)
    if unavailable is not None:
        return unavailable
    kernel = lookup_kernel(op, backend)
    return f"has no {op}" if kernel is None else kernel.supports(*args)


def requested_backend() -> str | None:
    """The explicit choice in force: ``use_backend`` first, then VQKERNELS_BACKEND, else None."""
    name = _requested or os.environ.get("VQKERNELS_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"VQKERNELS_BACKEND: expected one of {BACKENDS}, got {name!r}")
    return name


def _device_type(args: tuple[Any, ...]) -> str:
    return next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")


def candidates(op: str, *args: Any) -> list[Candidate]:
    """Every backend in order of preference with its reason for this call."""
    order = ORDER.get(_device_type(args), ("reference",))
    rest = tuple(name for name in BACKENDS if name not in order)
    return [Candidate(name, _reason(op, name, args)) for name in order + rest]


def select(op: str, *args: Any) -> Callable[..., Any]:
    """The kernel that runs ``op`` on ``args``.

    Raises:
        BackendError: the explicitly requested backend cannot run it, or none can.
    """
    wanted = requested_backend()
    order = (wanted,) if wanted else ORDER.get(_device_type(args), ("reference",))
    for backend in order:
        if _reason(op, backend, args) is None:
            kernel = lookup_kernel(op, backend)
            assert kernel is not None
            return kernel.fn
    head = f"backend {wanted!r} was requested" if wanted else "no backend can run it"
    raise BackendError(f"{op}: {head}\n{_listing(candidates(op, *args))}")


def _listing(rows: list[Candidate], chosen: str | None = None, details: str | None = None) -> str:
    lines = []
    for row in rows:
        state = "runs here" if row.reason is None else f"no: {row.reason}"
        lines.append(f"  {row.backend:<10} {state}{'  <- chosen' if row.backend == chosen else ''}")
        if row.backend == chosen and details is not None:
            lines.append(f"             {details}")
    return "\n".join(lines)


def explain(op: str, *args: Any) -> str:
    """One line a backend: can it run ``op`` on these tensors, which one is chosen, and why; for ``nearest`` also how.

    Args:
        op: one of ``kernels.registry.OPS``.
        args: the op's arguments; what is left out at the end of ``nearest`` takes its default. A prepared codebook may
            stand in the codebook's place, without the metric, which is its own.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {OPS}, got {op!r}")
    if not args or not isinstance(args[0], Tensor):
        raise TypeError(f"args: expected {op}'s tensors, got {type(args[0]).__name__ if args else 'none'}")
    title = op
    if len(args) > 1 and isinstance(args[1], PreparedCodebook):
        title, op = f"{op} of a prepared codebook", op if op.endswith("_prepared") else f"{op}_prepared"
        if op not in OPS:
            raise TypeError(f"args: expected tensors, {title} is not among {OPS}")
    defaults = DEFAULTS.get(op, ())
    args = args + defaults[max(0, len(args) - 2) :]
    rows = candidates(op, *args)
    wanted = requested_backend()
    on_its_own = ORDER.get(_device_type(args), ("reference",))
    able = [r.backend for r in rows if r.reason is None and r.backend in ((wanted,) if wanted else on_its_own)]
    cause = f"requested: {wanted}" if wanted else "automatic: the first in this order that can"
    kernel = lookup_kernel(op, able[0]) if able else None
    details = kernel.details(*args) if kernel is not None else None
    return f"{title} ({cause})\n{_listing(rows, able[0] if able else None, details)}"


class use_backend:
    """Run every op on ``name`` from now on, or inside ``with use_backend(name):``; None returns to automatic choice.

    Raises:
        ValueError: no backend of that name.
        BackendError: later, by the op that the backend cannot run.
    """

    def __init__(self, name: str | None) -> None:
        global _requested
        if name is not None and name not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS} or None, got {name!r}")
        self._previous = _requested
        _requested = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous
