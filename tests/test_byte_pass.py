"""The CPU search's byte pass, and what it leaves to a finer one: on AVX2, on AVX512 VNNI, and in plain loops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adversarial import Case, cases, true_nearest
from instruction_sets import check_nearest, use_instruction_set
from instruction_sets import library as library
from torch import Tensor

from vqkernels.kernels import compiled

pytestmark = pytest.mark.usefixtures("library")
ALL = [(metric, case) for metric in ("euclidean", "cosine") for case in cases(metric)]


@pytest.fixture(params=["avx512", "avx2", "portable"])
def byte_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_instruction_set(request.param, monkeypatch)
    monkeypatch.setenv("VQKERNELS_CPU_PASS", "byte")
    if compiled._coarse_pass(64, 64, True) != "byte":
        pytest.skip("this CPU has AVX512, but no VNNI")
    return request.param


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _crowded(size: int, dim: int) -> Tensor:
    """150 codes around each of some: more than are kept of a token; int16 tells them apart, bytes do not."""
    around = _randn(size // 150 + 1, dim, seed=1).repeat(150, 1)[:size]
    return around + 2e-3 * _randn(size, dim, seed=2)


@pytest.mark.parametrize(("metric", "case"), ALL, ids=str)
def test_nearest_is_true(byte_pass: str, metric: str, case: Case):
    check_nearest(case, metric)


@pytest.mark.parametrize("pattern", [[1.0], [1.0, 0.0], [1.0, 0.4, 0.01, 0.4], [1.0, 0.01, 0.01, 0.01]])
@pytest.mark.parametrize("dim", [8, 100, 1024])
def test_the_largest_sums_fit(byte_pass: str, dim: int, pattern: list[float]):
    """Tokens of the largest numbers and codes of like signs: with AVX2 sums of four products meet in 16 bits."""
    signs = _randn(20, dim, seed=44).sign() * torch.tensor(pattern).repeat(dim)[:dim]
    codebook = torch.stack([signs, -signs], dim=1).flatten(0, 1)  # their mean is 0
    report = compiled.nearest_report(3.0 * codebook.sign()[None], codebook, "euclidean", "exact")
    true, _ = true_nearest(3.0 * codebook.sign(), codebook, "euclidean")
    assert torch.equal(report.codes[0], true)
    assert (report.coarse_pass, report.refined, report.scanned) == ("byte", 0, 0)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("n", "size", "dim"), [(60, 1500, 64), (150, 290, 300), (30, 2100, 200)])
def test_a_crowd_of_candidates_goes_to_the_finer_pass(byte_pass: str, metric: str, n: int, size: int, dim: int):
    codebook, x = _crowded(size, dim), _randn(n, dim, seed=3)
    report = compiled.nearest_report(x[None], codebook, metric, "exact")
    assert report.refined > n // 2
    assert torch.equal(report.codes[0], true_nearest(x, codebook, metric)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["map", "strided"])
def test_tokens_of_any_layout_are_gathered_for_it(byte_pass: str, dtype: torch.dtype, layout: str):
    codebook, x = (10.0 * _crowded(900, 72)).to(dtype), (10.0 * _randn(3, 20, 72, seed=6)).to(dtype)
    if layout == "map":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        x = torch.cat([x, x], dim=2)[:, :, ::2]
    report = compiled.nearest_report(x, codebook, "euclidean", "exact")
    assert report.refined > 20
    true, _ = true_nearest(x.reshape(60, 72), codebook, "euclidean")
    assert torch.equal(report.codes.reshape(60), true)


def test_more_of_them_than_are_gathered_at_a_time(byte_pass: str):
    """2^20 numbers: 1024 tokens of 1024 dimensions."""
    if byte_pass == "portable":
        pytest.skip("in plain loops this takes a minute, and gathering is the same")
    codebook, x = _crowded(300, 1024), _randn(16, 1024, seed=7).repeat(140, 1)
    report = compiled.nearest_report(x[None], codebook, "euclidean", "exact")
    assert report.refined > 2 * 1024
    assert torch.equal(report.codes[0], true_nearest(x[:16], codebook, "euclidean")[0].repeat(140))


def test_a_few_tokens_are_decided_in_float64_at_once(byte_pass: str):
    codebook, x = _crowded(1000, 64) + 3.0, _randn(3, 64, seed=3) + 3.0
    first, second = [compiled.nearest_report(x[None], codebook, "euclidean", "exact") for _ in range(2)]
    assert (first.refined, first.scanned) == (0, 3)
    assert (second.refined, second.scanned) == (3, 0), "it pays to pack the codebook for more"
    for report in (first, second):
        assert torch.equal(report.codes[0], true_nearest(x, codebook, "euclidean")[0])


@pytest.mark.parametrize("seed", range(4))
def test_ties_where_float32_sums_may_overflow(byte_pass: str, seed: int):
    """Tied distances near the largest float: of some codes the sum of squares is infinity, of others it is not."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(64, generator=generator).double()
    order = torch.rand(20, 64, generator=generator).argsort(dim=1)
    middle = (torch.finfo(torch.float32).max / (row - 0.5).square().sum()).sqrt()
    sums = []
    for step in range(-20, 21):
        scale = middle * (1.0 + step * 2.0**-25)
        codebook = (row * scale).float()[order]
        x = torch.full((2, 64), 0.5, dtype=torch.float64).mul(scale).float()
        codes, _ = compiled.nearest(x[None], codebook, "euclidean", "exact")
        assert codes.tolist() == [[0, 0]], step
        sums.append((codebook - x[0]).square().sum(dim=1))
    assert any(some.isinf().any() and some.isfinite().any() for some in sums)


def test_the_finer_form_follows_a_codebook_that_changes(byte_pass: str):
    codebook, x = _crowded(900, 64), _randn(30, 64, seed=10)
    for change in range(3):
        codebook.add_(0.25 * _randn(900, 64, seed=11 + change) * (torch.arange(900)[:, None] % 60 == change))
        report = compiled.nearest_report(x[None], codebook, "euclidean", "exact")
        assert report.refined > 4
        assert torch.equal(report.codes[0], true_nearest(x, codebook, "euclidean")[0])


def test_threads_that_need_the_finer_form_at_once(byte_pass: str):
    codebook, x = _crowded(960, 80), _randn(40, 80, seed=14)
    true, _ = true_nearest(x, codebook, "euclidean")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: compiled.nearest(x[None], codebook, "euclidean", "exact")[0][0], range(12)))
    assert all(torch.equal(codes, true) for codes in found)


def test_what_does_not_pay_is_remembered(byte_pass: str):
    codebook = torch.cat([_crowded(2040, 64), 10.0 * _randn(60, 64, seed=4)])
    x = torch.cat([_randn(30, 64, seed=3), codebook[-10:]])  # of which bytes decide the last
    refined = [compiled.nearest_report(x[None], codebook, "euclidean", "exact").refined for _ in range(3)]
    assert refined == [30, 30, 40], "given up after more than 64 tokens"
    changed = compiled.nearest_report(x[None], codebook + 1.0, "euclidean", "exact")
    assert changed.refined == 30, "another codebook may be better"


def test_one_call_gives_up_halfway(byte_pass: str):
    torch.set_num_threads(1)
    codebook = torch.cat([_crowded(2040, 64), 10.0 * _randn(60, 64, seed=5)])  # not one that is known already
    x = torch.cat([_randn(3, 64, seed=3), codebook[-1:]]).repeat(750, 1)
    first, second = [compiled.nearest_report(x[None], codebook, "euclidean", "exact") for _ in range(2)]
    assert 2250 < first.refined < 3000
    assert second.refined == 3000
    true, _ = true_nearest(x[:4], codebook, "euclidean")
    assert torch.equal(first.codes[0], true.repeat(750))
    assert torch.equal(second.codes, first.codes)


def test_it_is_for_codebooks_that_repay_its_candidates(monkeypatch: pytest.MonkeyPatch):
    """Of AVX2 alone by itself: 64 dimensions or more, up to 1024, and 32768 numbers."""
    use_instruction_set("avx2", monkeypatch)
    chosen = {(k, d): compiled._coarse_pass(k, d, True) for k, d in ((512, 64), (32, 1024), (16384, 256))}
    assert set(chosen.values()) == {"byte"}
    others = {(k, d): compiled._coarse_pass(k, d, True) for k, d in ((511, 64), (99999, 63), (1 << 20, 1025))}
    assert set(others.values()) == {"int16"}
    assert compiled._coarse_pass(16384, 256, False) == "float32"
