"""The CUDA kernels' own source, run on the host: a block's threads as fibers, in order and in random orders."""

from __future__ import annotations

import subprocess

import pytest
import torch
from adversarial import Case, cases, true_nearest
from host_cuda import library as host
from requirements import skip_or_fail
from torch import Tensor

from vqkernels.kernels import reference_training as reference
from vqkernels.testing import sum_tolerance

SEEDS = (0, 5)  # threads in order, threads in a random order
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = ("channels-last", "channels-first", "sliced")
ALL = [(metric, case) for metric in ("euclidean", "cosine") for case in cases(metric)]


@pytest.fixture(autouse=True, scope="module")
def _host_library():
    if host.compiler() is None:
        skip_or_fail("c++", "no C++ compiler")
    host.library()


def _randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _tokens(layout: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """[2, 21, 13] in the given memory layout."""
    if layout == "channels-first":
        return _randn(2, 13, 21, seed=seed, dtype=dtype).transpose(1, 2)
    if layout == "sliced":
        return _randn(2, 42, 26, seed=seed, dtype=dtype)[:, ::2, 1::2]
    return _randn(2, 21, 13, seed=seed, dtype=dtype)


def _codes(codebook_size: int, batch: int = 2, length: int = 21) -> Tensor:
    """[batch, length] with a token that has none."""
    codes = torch.randint(0, codebook_size, (batch, length), generator=torch.Generator().manual_seed(3))
    codes[-1, 4] = -1
    return codes


def _search(
    case: Case, metric: str, precision: str = "exact", seed: int = 0, layout: str = "channels-last"
) -> tuple[Tensor, Tensor]:
    x = case.x.T.contiguous().T if layout == "channels-first" else case.x.contiguous()
    codes, distance = host.nearest(x[None], case.codebook.contiguous(), metric, precision, seed)
    return codes[0], distance[0]


@pytest.mark.parametrize(("metric", "case"), ALL, ids=lambda value: str(value))
def test_nearest_is_the_true_nearest_prepared_or_not(metric: str, case: Case):
    true, true_distance = true_nearest(case.x, case.codebook, metric)
    absolute = 2.0**-46 if metric == "cosine" else 0.0  # 1 - cos cancels: float64's error of a cosine stays
    for seed, layout in zip(reversed(SEEDS), ("channels-first", "channels-last"), strict=True):
        codes, distance = _search(case, metric, seed=seed, layout=layout)
        assert torch.equal(codes, true)
        torch.testing.assert_close(distance, true_distance, rtol=2.0**-22, atol=absolute, equal_nan=True)
    x, codebook = case.x[None].contiguous(), case.codebook.contiguous()
    prepared = host.nearest_prepared(x, codebook, metric, "exact", SEEDS[len(case.name) % 2])
    assert torch.equal(prepared[0][0], true)
    assert torch.equal(prepared[1][0].nan_to_num(), distance.nan_to_num())


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e18])
def test_ties_are_exact_at_every_scale(scale: float):
    """Codes that are permutations of each other, seen from constant tokens: equally far over the real numbers."""
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(s)) for s in range(30)])
    codebook = (_randn(12, seed=1) * scale)[order]
    x = torch.arange(-2.0, 3.0)[:, None] * torch.full((1, 12), scale)
    codes, _ = _search(Case("permutations", x, codebook), "euclidean")
    assert (codes == 0).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nearest_of_many_codes_split_over_blocks(metric: str):
    codebook = _randn(600, 9, seed=4)
    codebook[400:] = codebook[:200] * (1 + 2.0**-22)  # near-ties across the split
    x = _randn(150, 9, seed=5)
    true, _ = true_nearest(x, codebook, metric)
    assert torch.equal(_search(Case("split", x, codebook), metric, seed=2)[0], true)


def _expected_states(
    scores: Tensor,  # [N, rows], of the operand's rows
    splits: int,
    split: bool,
) -> tuple[Tensor, Tensor]:  # lowest, runner-up: [N, splits, groups]
    """Of granules (or single codes) of each lane group, from the documented order of the operand's rows."""
    row = torch.arange(scores.shape[1])
    code = row // 32 * 32 + row // 2 % 4 * 8 + row // 8 % 4 * 2 + row % 2
    by_code = torch.empty_like(scores)
    by_code[:, code] = scores
    granules = by_code.view(len(scores), splits, -1, host.COARSE_GROUPS, 8)  # a split's granules, by group
    kept = granules.amin(-1) if split else granules.transpose(2, 3).flatten(3).unsqueeze(2)[:, :, 0]
    kept = kept.transpose(2, 3) if split else kept
    lowest = kept.sort(-1).values
    runner_up = lowest[..., 1] if lowest.shape[-1] > 1 else torch.full_like(lowest[..., 0], float("inf"))
    return lowest[..., 0], runner_up


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("depth", [16, 48, 64])
def test_the_coarse_pass_keeps_the_lowest_scores_of_each_lane_group(depth: int, split: bool):
    """The product's fragments lie as the PTX ISA says, up to what its matrix units may cut off."""
    tokens, codes = _randn(150, depth, seed=30).half(), _randn(512, depth, seed=31).half()
    bias, scale = _randn(512, seed=32), 2.0 ** _randn(150, seed=33).round()
    bias[3::70] = float("inf")  # codes that do not fit
    scores = tokens.double() @ codes.double().T
    if not split:
        scores += bias.double() * scale.double()[:, None]
    first, second, code = host.coarse_pass(tokens, codes, bias, scale, split, seed=1)
    lowest, runner_up = _expected_states(scores, first.shape[1], split)
    size = tokens.double().norm(dim=1).max() * codes.double().norm(dim=1).max()
    tolerance = float(size * depth * 2.0**-22)
    torch.testing.assert_close(first.double(), lowest, rtol=0, atol=tolerance)
    torch.testing.assert_close(second.double(), runner_up, rtol=0, atol=tolerance)
    assert (code % 8 == 0).all() or not split
    assert (code // 8 % host.COARSE_GROUPS == torch.arange(host.COARSE_GROUPS)).all()


def _scaled(factor: float, *shape: int, seed: int, every: int = 1000) -> Tensor:
    """Normal numbers; every ``every``-th row, from the first on, is ``factor`` times as long."""
    rows = _randn(*shape, seed=seed)
    rows[::every] *= factor
    return rows


LIVE = _scaled(1e4, 300, 70, seed=53, every=20) * 1e-4  # the other codes have hardly moved from 0
EASY = {
    "gauss-8": (_randn(130, 8, seed=40), _randn(500, 8, seed=41)),
    "gauss-100": (_randn(60, 100, seed=42), _randn(300, 100, seed=43)),
    "untrained": (_randn(60, 20, seed=44), _randn(300, 20, seed=45) / 16384),  # tokens far larger than codes
    "offset": (_randn(60, 20, seed=46) + 100, _randn(300, 20, seed=47) + 100),
    "outlier": (_randn(60, 20, seed=48), _scaled(1e6, 300, 20, seed=49)),
    "far-outlier": (_randn(60, 70, seed=50), _scaled(1e25, 300, 70, seed=51)),
    "dead-codes": (LIVE[::20].repeat(4, 1) + 0.3 * _randn(60, 70, seed=52), LIVE),
    "huge-token": (_scaled(1e25, 60, 20, seed=54), _randn(300, 20, seed=55)),
    "tiny": (_randn(60, 20, seed=56) * 1e-30, _randn(300, 20, seed=57) * 1e-30),
}


@pytest.mark.parametrize("name", EASY)
def test_the_certificate_settles_ordinary_tokens(name: str):
    """Outliers, offsets and scales cost the exact road at most for the tokens that they concern."""
    x, codebook = EASY[name]
    codes, _, counted = host.nearest_and_count(x[None], codebook)
    assert torch.equal(codes[0], true_nearest(x, codebook)[0])
    assert counted.exact_road <= 2


@pytest.mark.parametrize("dim", [8, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_three_launches(dtype: torch.dtype, dim: int):
    """Also where every token is a tie; float64 prepares codes and tokens in launches of their own."""
    x, codebook = _randn(2, 40, dim, seed=58, dtype=dtype), _randn(30, dim, seed=59, dtype=dtype).repeat(2, 1)
    codes, _, counted = host.nearest_and_count(x, codebook)
    assert torch.equal(codes.flatten(), true_nearest(x.flatten(0, 1), codebook)[0])
    assert counted.exact_road == 80
    assert counted.launches == (4 if dtype == torch.float64 else 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_of_any_layout(dtype: torch.dtype, layout: str):
    x, codebook = _tokens(layout, dtype), _randn(50, 13, seed=6, dtype=dtype)
    codes, _ = host.nearest(x, codebook, "euclidean", "exact", seed=1)
    assert torch.equal(codes.flatten(), true_nearest(x.reshape(-1, 13), codebook)[0])


def test_an_empty_batch_writes_nothing():
    codes, distance = host.nearest(torch.empty(0, 3, 4), torch.ones(2, 4), "euclidean", "exact")
    assert codes.shape == distance.shape == (0, 3)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_non_finite_values_have_no_code(metric: str, precision: str):
    x, codebook = _randn(40, 6, seed=7), _randn(33, 6, seed=8)
    x[3, 2], x[17, 5] = float("inf"), float("nan")
    codes, distance = _search(Case("tokens", x, codebook), metric, precision)
    lost = torch.zeros(40, dtype=torch.bool)
    lost[[3, 17]] = True
    assert torch.equal(codes == -1, lost)
    assert torch.equal(distance.isnan(), lost)
    codebook[20, 1] = float("nan")
    codes, distance = _search(Case("codebook", x, codebook), metric, precision)
    assert (codes == -1).all()
    assert distance.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_finds_well_separated_codes(dtype: torch.dtype):
    codebook = _randn(70, 20, seed=9, dtype=dtype)
    x = codebook[_codes(70).clamp(min=0)] + 0.1 * _randn(2, 21, 20, seed=10).to(dtype)
    codes, _ = host.nearest(x, codebook, "euclidean", "fast", seed=1)
    assert torch.equal(codes, _codes(70).clamp(min=0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(dtype: torch.dtype, layout: str):
    x, codebook, codes = _tokens(layout, dtype), _randn(17, 13, seed=11, dtype=dtype), _codes(17)
    quantized, error = host.gather(x, codebook, codes, seed=1)
    true_quantized, true_error = reference.gather(x, codebook, codes)
    assert quantized.stride() == torch.empty_like(x).stride()
    assert torch.equal(quantized.nan_to_num(9), true_quantized.nan_to_num(9))
    torch.testing.assert_close(error, true_error, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_backward(dtype: torch.dtype, layout: str, rotation: bool):
    x, codebook, codes = _tokens(layout, dtype), _randn(17, 13, seed=12, dtype=dtype), _codes(17)
    codebook[int(codes[0, 0])] = 0  # neither a zero code
    x[1, 1] = 0  # nor a zero token has a direction,
    codes[1, 2], codebook[5] = 5, -x[1, 2]  # and between opposite ones there is none
    quantized, _ = reference.gather(x, codebook, codes)
    gradient, derror = _tokens("channels-last", dtype, seed=13), _randn(2, 21, seed=14)
    derror = derror.to(torch.float64 if dtype == torch.float64 else torch.float32)
    dx = host.quantize_backward(x, quantized, codes, gradient, derror, rotation, seed=1)
    expected = reference.quantize_backward(x, quantized, codes, gradient, derror, rotation)
    assert dx.stride() == torch.empty_like(x).stride()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(dx, expected, rtol=tolerance, atol=tolerance * 4)


def _true_stats(x: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    flat, tokens = codes.flatten(), x.reshape(-1, x.shape[-1]).double()
    sums = torch.zeros(codebook_size, x.shape[-1], dtype=torch.float64)
    sums.index_add_(0, flat[flat >= 0], tokens[flat >= 0])
    return torch.bincount(flat[flat >= 0], minlength=codebook_size), sums


@pytest.mark.parametrize("rotation", [False, True])
def test_absent_gradients_and_masked_tokens(rotation: bool):
    x, quantized, gradient = torch.randn(3, 2, 9, 21)
    codes, error, mask = torch.randint(-1, 5, (2, 9)), torch.rand(2, 9), torch.rand(2, 9) > 0.4
    zeros, nothing = torch.zeros_like(x), torch.zeros_like(error)
    for absent, present in (((None, error), (zeros, error)), ((gradient, None), (gradient, nothing))):
        dx = host.quantize_backward(x, quantized, codes, *absent, rotation, mask, seed=1)
        expected = reference.quantize_backward(x, quantized, codes, *present, rotation)
        torch.testing.assert_close(dx, torch.where(mask[..., None], expected, 0.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codebook_stats(dtype: torch.dtype, layout: str):
    x, codes = _tokens(layout, dtype), _codes(9)
    counts, sums = host.codebook_stats(x, codes, 12, seed=1)
    true_counts, true_sums = _true_stats(x, codes, 12)
    assert torch.equal(counts.long(), true_counts)
    tolerance = sum_tolerance(42, sums.dtype, x.abs().max().item())
    torch.testing.assert_close(sums.double(), true_sums, rtol=0, atol=tolerance)


@pytest.mark.parametrize("codebook_size", [1, 2, 7, 300])
def test_codebook_stats_over_many_chunks(codebook_size: int):
    """One code's tokens span many chunks, many codes share one; every thread order gives the same bits."""
    x, codes = _randn(1, 1000, 5, seed=15), _codes(codebook_size, 1, 1000)
    codes[0, 100:400] = codebook_size // 2  # a crowd
    codes[0, ::50] = -1
    runs = [host.codebook_stats(x, codes, codebook_size, seed) for seed in (0, 1, 2)]
    true_counts, true_sums = _true_stats(x, codes, codebook_size)
    assert torch.equal(runs[0][0].long(), true_counts)
    assert torch.equal(runs[0][1], true_sums.float())  # summed in float64, rounded once
    for counts, sums in runs[1:]:
        assert torch.equal(counts, runs[0][0])
        assert torch.equal(sums, runs[0][1])


def test_codebook_stats_of_no_tokens():
    for x, codes in ((torch.empty(0, 4, 3), torch.empty(0, 4)), (torch.ones(1, 4, 3), torch.full((1, 4), -1))):
        counts, sums = host.codebook_stats(x, codes.long(), 5)
        assert not counts.any()
        assert not sums.any()


def _statistics(dtype: torch.dtype, codebook_size: int, dim: int) -> dict[str, Tensor]:
    rows, size = (codebook_size, dim), (codebook_size,)
    return {
        "codebook": _randn(*rows, seed=16, dtype=dtype),
        "cluster_size": _randn(*size, seed=17, dtype=dtype).abs(),
        "embed_sum": _randn(*rows, seed=18, dtype=dtype),
        "counts": (_randn(*size, seed=19).abs() * 4).round().to(dtype),
        "sums": _randn(*rows, seed=20, dtype=dtype),
        "revive": _randn(*size, seed=21) > 1.0,
    }


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (37, 5), (1100, 3), (9, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ema_update(dtype: torch.dtype, size: tuple[int, int], normalize: bool):
    expected = _statistics(dtype, *size)
    reference.ema_update_(*expected.values(), 0.9, 1e-5, 2.5, normalize)
    runs = [_statistics(dtype, *size) for _ in SEEDS]
    for seed, run in zip(SEEDS, runs, strict=True):
        host.ema_update_(*run.values(), 0.9, 1e-5, 2.5, normalize, seed=seed)
    for name, value in expected.items():
        assert torch.equal(runs[0][name], runs[1][name])
        torch.testing.assert_close(runs[0][name], value)


def test_ema_update_learns_nothing_from_no_tokens():
    before, after = _statistics(torch.float32, 40, 6), _statistics(torch.float32, 40, 6)
    after["counts"][~after["revive"]] = 0
    host.ema_update_(*after.values(), 0.9, 1e-5, 2.5, False)
    revive = before["revive"]
    for name in ("codebook", "cluster_size", "embed_sum"):
        assert torch.equal(after[name][~revive], before[name][~revive])
    assert torch.equal(after["codebook"][revive], before["sums"][revive])


def test_a_missing_barrier_shows():
    """The harness itself: threads that read before their neighbours wrote get something else than with a barrier."""
    right = (torch.arange(64) + 1) % 64
    for seed in (0, 1, 2):
        assert not torch.equal(host.rotate_without_barrier(seed), right)


def test_a_missing_wait_shows():
    """A copy that has not been waited for is poison, not data."""
    assert (host.copy_without_wait(torch.ones(64, 4, dtype=torch.int32)) == 0xFFFFFFFF).all()


def test_sanitizers_find_nothing():
    """Every kernel at ragged sizes under the address and undefined-behaviour sanitizers."""
    if not host.links(host.SANITIZE):
        skip_or_fail("sanitizers", "the compiler has no sanitizer runtimes")
    program = host.compile_cpp("sanitized", [*host.SANITIZE, "-O0"])  # -O1 takes longer in all
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "ok"
