"""What the machine lacks: skipped, unless VQKERNELS_REQUIRE names it; then it is a failure."""

from __future__ import annotations

import os

import pytest


def skip_or_fail(name: str, reason: str) -> None:
    """Skip because ``name`` is missing; fail where VQKERNELS_REQUIRE (comma separated) asks for ``name``."""
    if name in os.environ.get("VQKERNELS_REQUIRE", "").replace(" ", "").split(","):
        pytest.fail(f"VQKERNELS_REQUIRE={name}: {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)
