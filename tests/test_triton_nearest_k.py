"""What is particular to the Triton kernels of ``nearest_k``: lists, their overflow, splits, configurations, launches.

That the codes are the true ones is checked beside every other backend's, in test_nearest_k.py. In the interpreter here,
or on the GPU where there is one.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from host_waits import no_host_waits
from quantizers import randn
from requirements import skip_or_fail
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    skip_or_fail("triton", "triton is not installed")

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from vqkernels import nearest_k, use_backend
from vqkernels.kernels import reference_nearest_k, triton_configs, triton_nearest, triton_nearest_k
from vqkernels.kernels.prepared import PreparedCodebook

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, under the interpreter, on meant overflow


def _check(x: Tensor, codebook: Tensor, k: int, metric: str = "euclidean") -> None:  # [N, D], [K, D]
    codes, distance = triton_nearest_k.nearest_k(x[None].to(DEVICE), codebook.to(DEVICE), k, metric)
    true, true_distance = reference_nearest_k.nearest_k(x[None], codebook, k, metric)
    assert torch.equal(codes.cpu(), true)
    torch.testing.assert_close(distance.cpu(), true_distance, rtol=2.0**-22, atol=2.0**-46, equal_nan=True)


def _shortlist(x: Tensor, codebook: Tensor, k: int) -> triton_nearest_k.Shortlist:  # [N, D], [K, D]
    tokens, rows = x[None].to(DEVICE), codebook.to(DEVICE)
    config = triton_nearest.config_for(tokens, *rows.shape)
    operands = triton_nearest.prepare(tokens, rows, False, config)
    shape = triton_configs.operand_of(config, rows.shape[1], False)
    return triton_nearest_k.shorten(operands, shape, len(rows), k, False, config, 1)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("tokens", "size", "dim", "k"), [(70, 300, 8, 2), (7, 600, 40, 9), (5, 200, 130, 3)])
def test_it_equals_the_reference_on_several_tiles_of_codes(tokens: int, size: int, dim: int, k: int, metric: str):
    x, codebook = randn(tokens, dim), randn(size, dim, seed=1)
    codebook[::7] *= 100  # several scales
    codebook[1:3] = codebook[3]
    x[3, 1], x[4] = float("inf"), 0
    _check(x, codebook, k, metric)


@pytest.mark.parametrize("config", triton_configs.CONFIGS, ids=str)
@pytest.mark.parametrize("dim", [1, 33])
def test_every_search_configuration_at_every_kind_of_dim(monkeypatch, config, dim: int):
    monkeypatch.setattr(triton_nearest_k, "config_for", lambda x, k, dim: config)
    _check(randn(20, dim), randn(75, dim, seed=1), 2)


def test_it_is_split_over_the_codes(monkeypatch):
    """Few tokens: every tile of codes is a program of its own, and they fill one list."""
    monkeypatch.setattr(triton_nearest_k, "program_slots", lambda x, config: 1000)
    _check(randn(5, 9), randn(700, 9, seed=1), 6)


def test_a_list_that_overflows_is_decided_among_all_codes(monkeypatch):
    monkeypatch.setattr(triton_nearest_k, "list_capacity", lambda size, k, granule: 4)
    x, codebook = randn(6, 7), randn(90, 7, seed=1)
    codebook[50] = codebook[3]
    x[1] = codebook[3]
    _check(x, codebook, 5)
    _check(x, codebook, 5, "cosine")


@pytest.mark.parametrize("k", [1, 7, 40])
def test_lists_hold_the_k_nearest_and_little_else(k: int):
    x, codebook = randn(20, 16), randn(1500, 16, seed=1)
    found = _shortlist(x, codebook, k)
    true = torch.cdist(x.double(), codebook.double()).topk(k, largest=False).indices  # [N, k]
    for row, count, codes in zip(true.tolist(), found.count.tolist(), found.codes.tolist(), strict=True):
        assert count <= found.capacity
        assert len(set(codes[:count])) == count
        assert set(row) <= set(codes[:count])
    assert found.count.double().mean() <= 1.6 * k + 4


def test_where_granules_are_fewer_than_k_all_codes_are_listed():
    found = _shortlist(randn(5, 8), randn(61, 8, seed=1), 40)
    assert (found.limit == -torch.inf).all()
    assert found.codes[:, :61].sort(1).values.tolist() == [list(range(61))] * 5
    assert found.capacity == 61


def test_memory_grows_with_k_and_not_with_the_codebook():
    assert triton_nearest_k.list_capacity(1 << 20, 8, 16) == triton_nearest_k.list_capacity(1 << 14, 8, 16) < 128
    for size, k in ((1 << 20, 512), (700, 16), (16, 16), (5000, 100)):
        assert k <= triton_nearest_k.list_capacity(size, k, 16) <= min(size, 16 * k + triton_nearest_k.SPARE)


def test_five_launches_that_wait_for_nothing(monkeypatch):
    launches: list[object] = []
    for owner in (InterpretedFunction, JITFunction):

        def run(self, *args, _run=owner.run, **options):
            launches.append(self)
            return _run(self, *args, **options)

        monkeypatch.setattr(owner, "run", run)
    x, codebook = randn(1, 9, 12).to(DEVICE), randn(40, 12).repeat(2, 1).to(DEVICE)
    config = triton_nearest.config_for(x, 80, 12)
    with no_host_waits(DEVICE, methods=False):
        triton_nearest_k.search_k(x, codebook, 3, False, config)
    assert len(launches) == 5


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_prepared_codebook_gives_the_same_from_kept_operands(metric: str):
    x, codebook = randn(1, 9, 12).to(DEVICE), randn(90, 12, seed=1).to(DEVICE)
    codebook[40:60] = codebook[:20]  # ties
    codebook[::7] *= 100
    x[0, 1], x[0, 2], x[0, 3] = float("nan"), 0, codebook[45]
    prepared = PreparedCodebook(codebook.clone(), metric)
    with use_backend("triton"):
        for k in (1, 5):
            for mine, plain in zip(nearest_k(x, prepared, k), nearest_k(x, codebook, k, metric=metric), strict=True):
                torch.testing.assert_close(mine, plain, rtol=0, atol=0, equal_nan=True)
    (kept,) = prepared._forms.values()  # one for all calls, and nearest_prepared's
    assert kept is triton_nearest.kept_codes(prepared, triton_nearest.config_for(x, *codebook.shape))


def test_what_it_cannot_take_is_said():
    x, codebook = torch.zeros(1, 2, 3), torch.zeros(4, 3)
    assert triton_nearest_k._supports(x, codebook.expand(4, 3), 4, "euclidean") is None
    assert "k up to 1024, not 1025" in triton_nearest_k._supports(x, torch.zeros(2000, 3), 1025, "euclidean")
    assert "65536" in triton_nearest_k._supports(x, codebook[:, :1].expand(4, 1 << 17), 1, "euclidean")
    assert "float64" in triton_nearest_k._supports(x.double(), codebook.double(), 1, "euclidean")
