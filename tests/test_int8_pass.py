"""The CPU search's int8 pass: on this CPU's tiles where it has some (avx512), and on tiles in plain loops."""

from __future__ import annotations

import pytest
import torch
from adversarial import Case, cases
from instruction_sets import check_nearest, use_instruction_set
from instruction_sets import library as library

from vqkernels.kernels import compiled

pytestmark = pytest.mark.usefixtures("library")
ALL = [(metric, case) for metric in ("euclidean", "cosine") for case in cases(metric)]


@pytest.fixture(params=["avx512", "portable"])
def int8_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_instruction_set(request.param, monkeypatch)
    monkeypatch.setenv("VQKERNELS_CPU_PASS", "int8")


@pytest.mark.parametrize(("metric", "case"), ALL, ids=str)
def test_nearest_is_true(int8_pass: None, metric: str, case: Case):
    check_nearest(case, metric)


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
