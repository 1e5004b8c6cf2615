"""The CPU search's int8 pass: on this CPU's tiles where it has some (avx512), and on tiles in plain loops."""

from __future__ import annotations

import pytest
import torch
from adversarial import Case, cases, true_nearest
from requirements import skip_or_fail

from vqkernels import _extension
from vqkernels.kernels import compiled

ALL = [(metric, case) for metric in ("euclidean", "cosine") for case in cases(metric)]


@pytest.fixture(autouse=True)
def _library():
    reason = _extension.cpu_library()
    if reason is not None:
        skip_or_fail("compiled", reason)


@pytest.fixture(params=["avx512", "portable"])
def int8_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_CPU_ISA", request.param)
    monkeypatch.setenv("VQKERNELS_CPU_PASS", "int8")
    if _extension.instruction_set() != request.param:
        skip_or_fail(request.param, f"this CPU has no {request.param}")


@pytest.mark.parametrize(("metric", "case"), ALL, ids=str)
def test_nearest_is_true(int8_pass: None, metric: str, case: Case):
    true, _ = true_nearest(case.x, case.codebook, metric)
    for threads, pieces in ((2, 1), (1, 4)):
        torch.set_num_threads(threads)
        parts = [compiled.nearest(part[None], case.codebook, metric, "exact") for part in case.x.tensor_split(pieces)]
        assert torch.equal(torch.cat([codes[0] for codes, _ in parts]), true)


@pytest.mark.parametrize("dim", [1024, 1025])
def test_the_largest_sums_fit_into_32_bits(int8_pass: None, dim: int):
    """Every number is the largest of its row, and products have one sign: 1024 * 127^2 * 128 is 1.6 % below 2^31."""
    signs = torch.randn(20, dim, generator=torch.Generator().manual_seed(44)).sign()
    codebook = torch.stack([signs, -signs], dim=1).flatten(0, 1)  # their mean is 0
    report = compiled.nearest_report(3.0 * codebook[None], codebook, "euclidean", "exact")
    assert torch.equal(report.codes[0], torch.arange(40))
    if dim == 1024:
        assert (report.coarse_pass, report.certified) == ("int8", 40)
    else:
        assert report.coarse_pass != "int8"


def test_it_is_for_dimensions_that_fill_its_tiles():
    """Below 64 int16 is quicker, above 1024 its sums would not fit; and only CPUs with tiles have it."""
    chosen = {dim: compiled._coarse_pass(8, dim, True) for dim in (8, 63, 64, 256, 1024, 1025)}
    assert {chosen[dim] for dim in (8, 63, 1025)} <= {"int16", "float32"}
    assert len({chosen[dim] for dim in (64, 256, 1024)}) == 1
    assert (chosen[64] == "int8") == (compiled.peak_rates(1)["int8"] > 0)
