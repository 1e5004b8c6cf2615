"""The coarse pass of the Triton search: its bound holds, it keeps what it must, and three launches are all.

In the interpreter here, or on the GPU where there is one.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict

import pytest
import torch
from adversarial import Case, cases, true_nearest
from requirements import skip_or_fail
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("triton") is None:
    skip_or_fail("triton", "triton is not installed")

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from vqkernels.kernels import triton_common, triton_configs, triton_nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS = triton_configs.GROUPS
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, under the interpreter, on meant overflow


def _coarse(
    case: Case, metric: str
) -> tuple[triton_nearest.Operands, triton_nearest.State, triton_configs.SearchConfig]:
    x, codebook = case.x[None].float().to(DEVICE), case.codebook.float().to(DEVICE)
    config = triton_nearest.config_for(x, *codebook.shape)
    operands = triton_nearest.prepare(x, codebook, metric == "cosine", config)
    shape = triton_configs.operand_of(config, codebook.shape[1], metric == "cosine")
    return operands, triton_nearest.coarse(operands, shape, config, 3), config


def _searchable(metric: str) -> list[Case]:
    """Of every kind one: what rounds, ties, cancels, saturates or underflows."""
    kinds = ("19x300x100", "7x67x257", "duplicates", "near-duplicates-1e-4", "init-uniform-1/16384", "offset-100-sigma")
    kinds += ("scale-1e38", "subnormal", "mixed-scales", "one-outlier-code-1e+30", "huge-tokens", "one-huge-token")
    kinds += ("cosine-gauss", "cosine-zero-vectors", "cosine-all-negative", "cosine-near-parallel", "cosine-scale")
    return [c for c in cases(metric) if any(kind in c.name for kind in kinds)]


@pytest.mark.parametrize("config", {triton_nearest.codes_key(c): c for c in triton_configs.CONFIGS}.values(), ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_codes_prepared_alone_have_the_same_bits(metric: str, config: triton_configs.SearchConfig):
    """In every layout of codes, and so have the tokens beside them."""
    for case in [c for c in cases(metric) if c.x.dtype == torch.float32][::9]:
        x, codebook, cosine = case.x[None].to(DEVICE), case.codebook.to(DEVICE), metric == "cosine"
        if config not in triton_configs.usable(
            codebook.shape[1], triton_configs.Gpu(shared_memory=1 << 20, capability=90)
        ):
            continue
        whole = triton_nearest.prepare(x, codebook, cosine, config)
        kept = triton_nearest.prepare_codes(codebook, cosine, config)
        parts = triton_nearest.prepare(x, codebook, cosine, config, kept)
        assert parts.codes is kept.codes
        for name in ("codes", "limits", "tokens", "stats", *(["unit"] if cosine else [])):
            assert torch.equal(*(getattr(each, name).nan_to_num(nan=7.0) for each in (whole, parts))), (case, name)
        if triton_configs.operand_of(config, codebook.shape[1], cosine).bias == 2:
            assert torch.equal(whole.bias, parts.bias)


def _lower(operands: triton_nearest.Operands, state: triton_nearest.State, granule: int) -> Tensor:  # [N]
    """The highest G - E of the granules kept, as the finishing kernel has it."""
    upper, code = state.upper.cpu().double().flatten(1), state.code.cpu().flatten(1).long()  # [N, slots]
    a, b, m, _ = operands.stats.cpu().double()[:, None].unbind(-1)  # [N, 1] each
    p, q, r, _ = operands.limits.cpu().double()[code // granule].unbind(-1)  # [N, slots] each
    reached = upper - 2 * (a * p + b * q + m * r)
    return reached.nan_to_num(nan=-torch.inf, posinf=-torch.inf).amax(1)


@pytest.mark.parametrize(("metric", "case"), [(m, c) for m in ("euclidean", "cosine") for c in _searchable(m)], ids=str)
def test_the_true_nearest_code_is_never_ruled_out(metric: str, case: Case):
    operands, state, config = _coarse(case, metric)
    true, _ = true_nearest(case.x, case.codebook, metric)
    rows = torch.nonzero((true >= 0) & (case.x != 0).any(1))[:, 0]
    lower = _lower(operands, state, config.granule)[rows]
    granule = true[rows] // config.granule
    split, group = granule // GROUPS // state.tiles_per_split, granule % GROUPS
    kept = state.code.cpu()[rows, split, :, group] // config.granule == granule[:, None]  # [R, 2]
    upper = state.upper.cpu()[rows, split, :, group].double()
    seen = torch.where(kept, upper, -torch.inf).amax(1)
    seen = torch.where(kept.any(1), seen, state.third.cpu()[rows, split, group].double())
    assert (seen >= lower).all()


@pytest.mark.parametrize("dim", [4, 20, 70])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_scores_stay_within_the_bound(metric: str, dim: int):
    """What is kept is G + E of the granule's best: so the true score T is at most that, and at least G - E."""
    generator = torch.Generator().manual_seed(dim)
    scale = torch.logspace(-3, 3, 40)[torch.randperm(40, generator=generator)][:, None]
    x = torch.randn(40, dim, generator=generator) * scale + 2.5
    codebook = torch.randn(200, dim, generator=generator) * torch.logspace(-2, 2, 200)[:, None] + 2.5
    operands, state, config = _coarse(Case("bound", x, codebook), metric)
    upper, code = state.upper.cpu().double().flatten(1), state.code.cpu().flatten(1).long()  # [N, slots]
    a, b, m, _ = operands.stats.cpu().double()[:, None].unbind(-1)
    p, q, r, _ = operands.limits.cpu().double()[code // config.granule].unbind(-1)
    bound = a * p + b * q + m * r
    truth = codebook.double() / codebook.double().norm(dim=1, keepdim=True) if metric == "cosine" else codebook.double()
    score = x.double() @ truth.T - (0 if metric == "cosine" else 0.5 * truth.square().sum(1))  # [N, K]
    padded = torch.full((40, operands.limits.shape[0] * config.granule), -torch.inf, dtype=torch.float64)
    padded[:, :200] = score
    best = padded.view(40, -1, config.granule).amax(2).gather(1, code // config.granule)  # [N, slots]
    kept = upper > -torch.inf
    # one positive factor and one offset a token bring true scores to the kernel's units: from two granules of the token
    for n in range(40):
        t, u, e = best[n][kept[n]], upper[n][kept[n]], bound[n][kept[n]]
        near, far = t.argmax(), t.argmin()
        factor = (u[near] - u[far]) / (t[near] - t[far])
        slack = (e[near] + e[far]) * 2  # of the factor and the offset themselves
        gap = (u - e) - (u[near] - e[near]) - factor * (t - t[near])
        assert (gap.abs() <= e + e[near] + slack).all()


def test_three_launches_and_no_torch_operation(monkeypatch):
    """Allocations apart, the whole search is three kernels, whatever the data."""
    launches: list[object] = []
    ops: list[str] = []
    inside: list[bool] = []  # a launch: the interpreter copies its arguments
    for owner in (InterpretedFunction, JITFunction):

        def run(self, *args, _run=owner.run, **options):
            launches.append(self)
            inside.append(True)
            _run(self, *args, **options)
            inside.pop()

        monkeypatch.setattr(owner, "run", run)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not inside:
                ops.append(str(func))
            return func(*args, **(kwargs or {}))

    x, codebook = torch.randn(1, 9, 12).to(DEVICE), torch.randn(40, 12).repeat(2, 1).to(DEVICE)
    config = triton_nearest.config_for(x, 80, 12)
    with Count():
        triton_nearest.search(x, codebook, False, config)
    assert len(launches) == 3
    assert set(ops) == {"aten.empty.memory_format"}


def test_an_outlier_costs_its_neighbours_only():
    """One code a million times the others: its granule alone is looked at again for every token."""
    generator = torch.Generator().manual_seed(1)
    x, codebook = torch.randn(64, 40, generator=generator), torch.randn(256, 40, generator=generator)
    plain = _candidates(Case("plain", x, codebook))
    codebook[130] *= 1e6
    outlier = _candidates(Case("outlier", x, codebook))
    assert plain.double().mean() < 1.5
    assert (outlier <= plain + 2).all()
    assert outlier.double().mean() < 2.5


def _candidates(case: Case) -> Tensor:  # [N]
    operands, state, config = _coarse(case, "euclidean")
    lower = _lower(operands, state, config.granule)[:, None]
    return (state.upper.cpu().double().flatten(1) >= lower).sum(1)


def test_exact_halves_lose_nothing():
    """Tokens and codes that fp16 holds: the measured residuals are those of the float32 operations alone."""
    generator = torch.Generator().manual_seed(2)
    case = Case(
        "halves", torch.randn(20, 33, generator=generator).half(), torch.randn(80, 33, generator=generator).half()
    )
    operands, _, _ = _coarse(case, "euclidean")
    a, b, _, _ = operands.stats.cpu().unbind(1)
    assert (a <= b * 2.0**-22).all()


@pytest.mark.parametrize("n", [1, 63, 700, 4096, 65536, 1 << 24])
@pytest.mark.parametrize("dim", [1, 3, 8, 9, 18, 32, 48, 64, 100, 256, 257, 768])
def test_every_shape_has_a_configuration_that_fits(n: int, dim: int):
    for k in (1, 512, 16384, 1 << 20):
        for capability, limit in ((86, 101376), (80, 166912), (90, 232448), (130, 300000)):
            gpu = triton_configs.Gpu("one never seen", capability, limit)
            config = triton_configs.choose_config(n, k, dim, gpu)
            assert config in triton_configs.usable(dim, gpu)
            assert triton_configs.shared_memory(config, dim, False) <= limit


def test_codes_are_split_where_tokens_leave_the_device_idle():
    for slots in (1, 7, 132, 500):
        for rows in (1, 8, 128, 5000):
            for tiles in (1, 3, 128, 4096):
                assert 1 <= triton_configs.count_splits(rows, tiles, slots) <= min(tiles, 32)
    assert triton_configs.count_splits(32, 4096, 132) >= 4
    assert triton_configs.count_splits(128, 128, 132) == 1  # 128 of 132 are busy
    assert triton_configs.count_splits(5000, 4, 132) == 1
    assert triton_configs.count_splits(1, 4096, 1) == 1


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VQKERNELS_CACHE", str(tmp_path))
    triton_configs._known.cache_clear()
    yield tmp_path
    triton_configs._known.cache_clear()


def test_the_measured_choice_is_kept_and_used(monkeypatch, empty_cache):
    x, codebook = torch.randn(1, 70, 12).to(DEVICE), torch.randn(90, 12).to(DEVICE)
    asked: list[triton_configs.SearchConfig] = []
    monkeypatch.setattr(triton_nearest, "search", lambda x, codebook, cosine, config: asked.append(config))

    def time(call) -> float:
        call()
        return -float(len(asked))  # the last is the quickest

    best = triton_nearest.tune(x, codebook, time)
    gpu = triton_nearest.device_of(x)
    assert asked == triton_configs.usable(12, gpu)
    assert best == asked[-1]
    assert json.loads((empty_cache / "search.json").read_text()) == {gpu.name: {"128,128,12": asdict(best)}}
    assert triton_nearest.config_for(x, 90, 12) == best
    assert triton_configs.choose_config(70, 90, 12, triton_configs.Gpu("another")) != best


def test_a_choice_that_was_never_checked_is_refused(empty_cache):
    config = {**asdict(triton_configs.CONFIGS[0]), "num_warps": 5}
    (empty_cache / "search.json").write_text(json.dumps({"unknown": {"128,128,12": config}}))
    with pytest.raises(ValueError, match=r"search\.json: expected configurations among CONFIGS.*num_warps=5"):
        triton_configs.choose_config(70, 90, 12)


def test_the_shipped_table_is_readable():
    assert triton_configs._read(triton_configs.SHIPPED) is not None


def test_groups_agree():
    from vqkernels.kernels import triton_operands

    assert triton_operands.GROUPS.value == triton_configs.GROUPS
    assert triton_common.MAX_CODES < 1 << 31
