"""Dataclasses of plain types from nested dicts, strictly, and back. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Config = TypeVar("Config")

LATER = {"later": True}  # metadata of options that the first saved models were written without


def _mismatch(value: Any, expected: str, name: str) -> ValueError:
    return ValueError(f"option {name!r} must be {expected}, got {value!r}")


def _number(value: Any, kind: type, name: str) -> Any:
    """int and float options; YAML reads 1e-3 as text, and true must not pass for 1."""
    if isinstance(value, bool):
        raise _mismatch(value, f"of type {kind.__name__}", name)
    if kind is float and isinstance(value, int | float | str):
        try:
            number = float(value)
        except (ValueError, OverflowError):  # text, or an integer beyond float64
            raise _mismatch(value, "of type float", name) from None
        if not math.isfinite(number):
            raise _mismatch(value, "a finite number", name)
        return number
    if kind is int and isinstance(value, int):
        return value
    raise _mismatch(value, f"of type {kind.__name__}", name)


def kinds(classes: tuple[type, ...]) -> dict[str, type]:
    """Config dataclasses by the `kind` that tells them apart, which is the default of that field."""
    return {getattr(each, "kind"): each for each in classes}  # noqa: B009


def _of_kind(classes: tuple[type, ...], value: Any, name: str) -> Any:
    """`value` as the one of `classes` that its `kind` names; the first where it has none."""
    if isinstance(value, classes):
        return value
    known = kinds(classes)
    named = value.get("kind", next(iter(known))) if isinstance(value, dict) else None
    if isinstance(value, dict) and (not isinstance(named, str) or named not in known):
        raise _mismatch(named, "one of " + ", ".join(known), f"{name}.kind")
    return from_dict(known.get(named, classes[0]), value, name)  # type: ignore[arg-type]


def convert(value: Any, kind: Any, name: str) -> Any:
    """`value` as `kind`, a type hint in a config: a plain type, a list, a Literal, a config or one of several."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise _mismatch(value, "one of " + ", ".join(map(str, arguments)), name)
        return value
    if type(None) in arguments:
        return None if value is None else convert(value, arguments[0], name)
    if origin is types.UnionType:
        return _of_kind(arguments, value, name)
    if origin is list:
        if not isinstance(value, list | tuple):
            raise _mismatch(value, "a list", name)
        return [convert(item, arguments[0], f"{name}[{place}]") for place, item in enumerate(value)]
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, name)
    if kind in (int, float):
        return _number(value, kind, name)
    if not isinstance(value, kind):
        raise _mismatch(value, f"of type {kind.__name__}", name)
    return value


def from_dict(kind: type[Config], values: Any, name: str = "") -> Config:
    """A config dataclass from plain nested dicts, as YAML and JSON give them.

    Args:
        kind: the dataclass.
        values: its options; those left out keep their defaults.
        name: path of these options in the file, for error messages.

    Raises:
        ValueError: an unknown option, or a value of the wrong type or out of range; names the option with its path.
    """
    if dataclasses.is_dataclass(values) and isinstance(values, kind):
        return values
    prefix = f"{name}." if name else ""
    if not isinstance(values, dict):
        raise _mismatch(values, "a group of options", name or kind.__name__)
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {prefix + close[0]!r}?" if close else f", expected one of {', '.join(hints)}"
            raise ValueError(f"unknown option {prefix + str(key)!r}{hint}")
    options = {key: convert(value, hints[key], prefix + key) for key, value in values.items()}
    try:
        return kind(**options)
    except ValueError as error:  # of its __post_init__, which names the option and not where the group lies
        raise ValueError(f"{prefix}{error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts."""
    return dataclasses.asdict(config)


def lasting_options(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts, without the options marked LATER that have their defaults.

    So a fingerprint over them stays the same when an option is added.
    """
    options = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        factory = entry.default_factory
        default = entry.default if factory is dataclasses.MISSING else factory()
        if entry.metadata.get("later") and value == default:
            continue
        options[entry.name] = lasting_options(value) if dataclasses.is_dataclass(value) else value
    return options


def save_config(config: Any, path: str | Path) -> None:
    """Writes a config dataclass as YAML."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
