"""What the machine lacks: skipped, unless VQKERNELS_REQUIRE names it; then it is a failure."""

from __future__ import annotations

import os

import pytest

NAMES = ("compiled", "triton", "cuda", "nvcc", "c++", "sanitizers", "avx512", "avx2", "portable")


def required() -> set[str]:
    """The names in VQKERNELS_REQUIRE (comma separated); one that no test asks about is an error."""
    names = {name.strip() for name in os.environ.get("VQKERNELS_REQUIRE", "").split(",")} - {""}
    if unknown := names - set(NAMES):
        raise ValueError(f"VQKERNELS_REQUIRE: expected names of {NAMES}, got {sorted(unknown)}")
    return names


def skip_or_fail(name: str, reason: str) -> None:
    """Skip because ``name`` is missing; fail where VQKERNELS_REQUIRE asks for ``name``."""
    if name not in NAMES:
        raise ValueError(f"name: expected one of {NAMES}, got {name!r}")
    if name in required():
        pytest.fail(f"VQKERNELS_REQUIRE={name}: {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)
