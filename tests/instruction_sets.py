"""What the tests of the C++ kernels ask of this machine, and the check that each of its passes has to stand."""

from __future__ import annotations

import pytest
import torch
from adversarial import Case, true_nearest
from requirements import skip_or_fail

from vqkernels import _extension
from vqkernels.kernels import compiled


@pytest.fixture
def library() -> None:
    """Skips where the C++ kernels cannot be had: ``pytestmark = pytest.mark.usefixtures("library")``."""
    reason = _extension.cpu_library()
    if reason is not None:
        skip_or_fail("compiled", reason)


def use_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends; skips where this CPU has it not."""
    monkeypatch.setenv("VQKERNELS_CPU_ISA", name)
    if _extension.instruction_set() != name:
        skip_or_fail(name, f"this CPU has no {name}")


def check_nearest(case: Case, metric: str) -> None:
    """True codes for two threads and one, at once and in pieces."""
    true, _ = true_nearest(case.x, case.codebook, metric)
    for threads, pieces in ((2, 1), (1, 4)):
        torch.set_num_threads(threads)
        parts = [compiled.nearest(part[None], case.codebook, metric, "exact") for part in case.x.tensor_split(pieces)]
        assert torch.equal(torch.cat([codes[0] for codes, _ in parts]), true)
