"""The registry: who can run an operation, how, and why not.

A provider is one function from a Problem to the call that is timed; what it does before returning (building an
index, compiling) is not. ``register`` enters it; tests, the command line and pytest-benchmark iterate the table.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .machine import available_memory
from .problem import Problem, trial_problem


class Lookup(NamedTuple):
    """What the operation "quantize" returns."""

    quantized: Tensor  # [N, D]
    codes: Tensor  # [N]
    errors: Tensor  # [N] |x - quantized|^2; or a peer's loss


class Both(NamedTuple):
    """What the operation "nearest-both" returns."""

    codes: Tensor  # [N]
    tokens: Tensor  # [K]


class EntropyGradients(NamedTuple):
    """What the operation "entropy" returns."""

    loss: Tensor  # []
    dx: Tensor  # [N, D]
    dcodebook: Tensor | None  # [K, D]; None where there is nothing to learn


# codes [N] ("search", "train-step"), a Lookup ("quantize"), the new codebook [K, D] ("ema", "kmeans"),
# codes [N, k] ("nearest-k"), tokens [K] ("nearest-tokens"), Both ("nearest-both"),
# EntropyGradients ("entropy"); None: no check
Result = Tensor | Lookup | Both | EntropyGradients | None
Call = Callable[[], Result]  # what is timed
PROVIDER_MODULES = (
    *("search_providers", "gpu_providers", "quantize_providers", "ema_providers", "step_providers", "kmeans_providers"),
    *("entropy_providers", "columns_providers"),
)
MEMORY_SHARE = 0.7  # of what is free, that a provider may take for its N x K intermediates


class Unavailable(Exception):
    """Raised by a provider's function where it cannot run, with the reason."""


@dataclass(frozen=True)
class Provider:
    """One way to run one operation."""

    name: str
    operation: str
    prepare: Callable[[Problem], Call]
    ours: bool = False  # held to zero wrong codes: no time is shown otherwise
    yardstick: bool = False  # a bound to compare with, not an answer: ours may be wrong then, and is printed as such
    optional: bool = False  # takes part only when asked for by name
    package: str | None = None  # the import that it needs
    install: str | None = None  # what to pip install for it
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16", "float64")
    bytes_per_score: float = 0.0  # transient memory per entry of N x K, for fp32
    note: str = ""
    explain: Callable[[Problem], dict[str, Any] | None] | None = None  # how the call went, for the report

    def unavailable(self, problem: Problem) -> str | None:
        """None where the provider can take ``problem``, otherwise the reason in one line."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed (pip install {self.install})"
        device, dtype = problem.x.device.type, str(problem.x.dtype).removeprefix("torch.")
        if device not in self.devices:
            return f"does not run on {device}"
        if dtype not in self.dtypes:
            return f"does not take {dtype}"
        needed, free = self.bytes_per_score * problem.scores, available_memory(problem.x.device)
        if free is not None and needed > MEMORY_SHARE * free:
            return f"needs about {needed / 1e9:.1f} GB for its N x K intermediates, {free / 1e9:.1f} GB are free"
        return self._trial(problem) if self.ours else None

    def _trial(self, problem: Problem) -> str | None:
        """Ours says by itself whether a backend can run: ask it with a few tokens."""
        from vqkernels.backends import BackendError

        dtype = str(problem.x.dtype).removeprefix("torch.")
        trial = trial_problem(self.operation, dtype=dtype, device=str(problem.x.device))
        try:
            self.prepare(trial)()
        except Unavailable as error:
            return str(error)
        except BackendError as error:
            backend = self.name.split("-")[1] if "-" in self.name else self.name
            lines = [line.split("no: ")[1] for line in str(error).splitlines() if backend in line and "no: " in line]
            return lines[0] if lines else str(error)
        return None


_TABLE: dict[tuple[str, str], Provider] = {}
_LOADED = False


def register(entry: Provider) -> Provider:
    """Enter a provider; its pair of operation and name must be new."""
    if (entry.operation, entry.name) in _TABLE:
        raise ValueError(f"provider {entry.name!r} is already registered for {entry.operation!r}")
    _TABLE[entry.operation, entry.name] = entry
    return entry


def _load() -> None:
    global _LOADED
    if not _LOADED:
        _LOADED = True
        for module in PROVIDER_MODULES:
            importlib.import_module(f".{module}", __package__)


def providers_of(operation: str) -> list[Provider]:
    """Every provider of ``operation``, ours first."""
    _load()
    return [entry for entry in _TABLE.values() if entry.operation == operation]


def choose(operation: str, names: list[str], device: str = "") -> list[Provider]:
    """The named providers, or all that are not optional and run on ``device`` (cpu | cuda; any when left out).

    Raises:
        ValueError: a name that the operation does not have.
    """
    known = {entry.name: entry for entry in providers_of(operation)}
    for name in names:
        if name not in known:
            raise ValueError(f"provider: expected one of {', '.join(known)} for {operation}; got {name!r}")
    kind = device.split(":")[0]
    return [known[name] for name in dict.fromkeys(names)] or [
        entry for entry in known.values() if not entry.optional and (not kind or kind in entry.devices)
    ]
