"""What an adapter says about the library it stands in for, and what all adapters ask of a module first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

_OWN = frozenset(vars(nn.Module()))  # what every module has
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Peer:
    """One class of another library. The library itself is never imported: an instance shows what it is."""

    name: str  # "library Class", for the report
    recognises: Callable[[nn.Module], bool]
    refusals: Callable[[nn.Module, Sequence[nn.Module]], list[str]]  # (module, modules around it) -> why not; [] if so
    convert: Callable[[nn.Module], nn.Module]  # shares the module's parameters, buffers and submodules


def comes_from(module: nn.Module, package: str) -> bool:
    """Whether the module's class is defined in that package."""
    return _is_from(type(module), package)


def is_subclass(module: nn.Module, package: str, name: str) -> bool:
    """Whether the module's class was made from the package's class of that name."""
    return any(base.__name__ == name and _is_from(base, package) for base in type(module).__mro__[1:])


def _is_from(kind: type, package: str) -> bool:
    return kind.__module__.split(".")[0] == package


def refuse(reasons: list[str]) -> None:
    """Raise ValueError if there is a reason."""
    if reasons:
        raise ValueError(f"peer: expected an instance that can be swapped, got one that cannot: {'; '.join(reasons)}")


def tampered(module: nn.Module) -> list[str]:
    """What was put onto this one instance and would be lost with it."""
    reasons = [f"{name[1:]} are registered on it" for name in _HOOKS if getattr(module, name)]
    return [*reasons, *(["its forward was replaced"] if "forward" in vars(module) else [])]


def attribute_refusals(
    module: nn.Module,
    required: frozenset[str],
    optional: frozenset[str] = frozenset(),
) -> list[str]:
    """A changed copy or another version of the peer shows in its attributes: none may be missing, none unknown."""
    state = {**module._parameters, **module._buffers, **module._modules}
    found = (set(vars(module)) - _OWN) | set(state)
    missing, unknown = required - found, found - required - optional
    reasons = [f"attribute {name!r} is missing: another version" for name in sorted(missing)]
    return reasons + [f"attribute {name!r} is unknown: another version, or changed" for name in sorted(unknown)]
