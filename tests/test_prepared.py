"""A prepared codebook gives the very answers of the tensor that it was made from, whatever becomes of that tensor."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading

import pytest
import torch
from adversarial import Case, cases, large_cases, true_nearest
from requirements import skip_or_fail
from torch import Tensor

import vqkernels as vq
from vqkernels._extension import cpu_library, instruction_set
from vqkernels.kernels.prepared import PreparedCodebook

ALL = [(metric, case) for metric in ("euclidean", "cosine") for case in cases(metric)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FEW = ("duplicates", "outlier-code", "mixed-scales", "gauss-33x129x18", "non-finite", "bfloat16")  # for the interpreter


def _randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _prepared(codebook: Tensor, metric: str = "euclidean") -> PreparedCodebook:
    """Of a copy that is overwritten at once, past torch's version counter."""
    codebook = codebook.clone()
    prepared = vq.prepare_codebook(codebook, metric=metric)
    codebook.data.fill_(float("nan"))
    return prepared


@pytest.fixture
def compiled():
    if (reason := cpu_library()) is not None:
        skip_or_fail("compiled", reason)
    with vq.use_backend("compiled"):
        yield


@pytest.mark.parametrize(("metric", "case"), ALL, ids=str)
def test_codes_are_the_true_ones(backend, metric: str, case: Case):
    name, device = backend
    if name == "triton" and case.x.dtype == torch.float64:
        with pytest.raises(vq.BackendError, match="float64"):
            vq.prepare_codebook(case.codebook.to(device), metric=metric)
        return
    if name == "triton" and device == "cpu" and not any(words in case.name for words in FEW):
        _check_operand(case, metric)
        return
    prepared = _prepared(case.codebook.to(device), metric)
    codes, distance = vq.nearest(case.x.to(device), prepared)
    true, true_distance = true_nearest(case.x, case.codebook, metric)
    assert torch.equal(codes.cpu(), true)
    absolute = 2.0**-46 if metric == "cosine" else 0.0  # 1 - cos cancels: float64's error of a cosine stays
    torch.testing.assert_close(distance.cpu(), true_distance, rtol=2.0**-22, atol=absolute, equal_nan=True)


def _check_operand(case: Case, metric: str) -> None:
    """What is kept are the bits that the plain search makes; the launches that read them are the same."""
    from vqkernels.kernels import triton_nearest
    from vqkernels.kernels.triton_common import readable

    x, codebook, cosine = readable(case.x)[None], readable(case.codebook).contiguous(), metric == "cosine"
    config = triton_nearest.config_for(x, *codebook.shape)
    kept = _prepared(case.codebook, metric).known_form(("triton", *triton_nearest.codes_key(config)))
    plain = triton_nearest.prepare(x, codebook, cosine, config)
    for name in ("codes", "limits", *(["unit"] if cosine else [])):
        assert torch.equal(*(getattr(each, name).nan_to_num(nan=7.0) for each in (kept, plain))), name


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("coarse_pass", ["byte", "int8", "int16", "float32"])
def test_every_instruction_set_pass_and_thread_count(compiled, monkeypatch, isa: str, coarse_pass: str, metric: str):
    monkeypatch.setenv("VQKERNELS_CPU_ISA", isa)
    if instruction_set() != isa:
        skip_or_fail(isa, f"this CPU has no {isa}")
    monkeypatch.setenv("VQKERNELS_CPU_PASS", coarse_pass)
    large = large_cases()[:: 2 if metric == "euclidean" else 5]
    slow = (coarse_pass == "int8" and isa != "avx512") or (coarse_pass == "byte" and isa == "portable")  # plain loops
    for case in [*cases(metric), *([] if slow else large)]:
        true, _ = true_nearest(case.x, case.codebook, metric)
        prepared = _prepared(case.codebook, metric)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            parts = [vq.nearest(x, prepared)[0] for x in case.x.tensor_split(3)]
            assert torch.equal(torch.cat(parts), true), case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_other_ops_take_it(metric: str, dtype: torch.dtype):
    x, codebook = _randn(3, 11, 7, seed=1, dtype=dtype), _randn(90, 14, seed=2, dtype=dtype)[:, ::2]
    prepared = _prepared(codebook, metric)
    for mine, plain in zip(vq.nearest_k(x, prepared, 5), vq.nearest_k(x, codebook, 5, metric=metric), strict=True):
        assert torch.equal(mine, plain)
    assert torch.equal(vq.lookup(torch.arange(90), prepared), codebook)
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(3)) < 0.7
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = vq.quantize(mine, prepared, mask=mask, gradient="rotation")
    expected = vq.quantize(plain, codebook, metric=metric, mask=mask, gradient="rotation")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    found.quantized.sum().backward()
    expected.quantized.sum().backward()
    assert torch.equal(mine.grad, plain.grad)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_fast_takes_a_pass_of_its_own(backend, metric: str):
    _, device = backend
    x, codebook = _randn(20, 9, seed=4).to(device), _randn(70, 9, seed=5).to(device)
    x[3, 2] = float("nan")
    prepared = vq.prepare_codebook(codebook, metric=metric)
    for precision in ("fast", "exact", "fast"):
        found = vq.nearest(x, prepared, precision=precision)
        expected = vq.nearest(x, codebook, metric=metric, precision=precision)
        assert torch.equal(found[0], expected[0])


def test_half_tokens_and_another_dtype():
    x, codebook = _randn(33, 20, seed=6), _randn(70, 20, seed=7)
    for dtype in (torch.float16, torch.bfloat16):
        narrow = vq.prepare_codebook(codebook, dtype=dtype)
        assert narrow.dtype == dtype
        assert torch.equal(vq.nearest(x.to(dtype), narrow)[0], vq.nearest(x.to(dtype), codebook.to(dtype))[0])
        with pytest.raises(TypeError, match=r"codebook: expected torch\.float32 like x"):
            vq.nearest(x, narrow)
        wide = vq.prepare_codebook(codebook)
        assert torch.equal(vq.nearest(x.to(dtype), wide)[0], vq.nearest(x.to(dtype), codebook)[0])


X, WIDE, META = torch.zeros(2, 4), torch.zeros(2, 4).double(), torch.zeros(2, 4, device="meta")
BAD = {
    "dim": (lambda p: vq.nearest(torch.zeros(2, 3), p), ValueError, r"x: expected \[\.\.\., 4\].*got \[2, 3\]"),
    "dtype": (
        lambda p: vq.nearest(WIDE, p),
        TypeError,
        "codebook: expected torch.float64 like x",
    ),
    "device": (
        lambda p: vq.nearest(META, p),
        ValueError,
        "codebook: expected on meta like x",
    ),
    "metric": (
        lambda p: vq.nearest(X, p, metric="cosine"),
        ValueError,
        "metric: expected 'euclidean', for which codebook was prepared, got 'cosine'",
    ),
    "k": (lambda p: vq.nearest_k(X, p, 7), ValueError, "k: expected an integer from 1 to 6"),
    "no tensor": (lambda p: vq.prepare_codebook([1.0]), TypeError, "codebook: expected a torch.Tensor, got list"),
    "integers": (lambda p: vq.prepare_codebook(X.long()), TypeError, "codebook: expected float32"),
    "rank": (
        lambda p: vq.prepare_codebook(torch.zeros(3)),
        ValueError,
        r"codebook: expected \[K, D\].*got shape \[3\]",
    ),
    "meta": (lambda p: vq.prepare_codebook(META), TypeError, "codebook: expected a dense"),
    "to integers": (lambda p: vq.prepare_codebook(X, dtype=torch.int8), TypeError, "dtype: expected"),
    "l1": (lambda p: vq.prepare_codebook(X, metric="l1"), ValueError, "metric: expected one of"),
    "explain": (lambda p: vq.explain("codebook_stats", X, p), TypeError, "of a prepared codebook"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call, error, message: str):
    prepared = vq.prepare_codebook(_randn(6, 4, seed=8))
    with pytest.raises(error, match=message):
        call(prepared)


def test_a_codebook_that_is_not_finite_is_an_error(backend):
    _, device = backend
    codebook = _randn(9, 4, seed=9).to(device)
    codebook[3, 2] = float("nan")
    if device == "cpu":
        with pytest.raises(ValueError, match="codebook: expected finite values"):
            vq.prepare_codebook(codebook)
    else:
        assert (vq.nearest(codebook, vq.prepare_codebook(codebook))[0] == -1).all()


def test_backends_may_change_after_it_was_prepared(backend):
    _, device = backend
    x, codebook = _randn(20, 6, seed=10).to(device), _randn(40, 6, seed=11).to(device)
    with vq.use_backend("reference"):
        prepared = vq.prepare_codebook(codebook)
    assert torch.equal(vq.nearest(x, prepared)[0], vq.nearest(x, codebook)[0])


def test_explain_says_so(backend):
    name, device = backend
    x = torch.zeros(3, 5, device=device)
    words = vq.explain("nearest", x, vq.prepare_codebook(torch.randn(9, 5, device=device)))
    assert words.startswith("nearest of a prepared codebook")
    assert f"{name:<10} runs here  <- chosen" in words
    assert "prepared codebook" in words.splitlines()[-1] or "prepared codebook" in words.split("<- chosen")[1]


def test_the_pass_is_that_of_its_preparation(compiled, monkeypatch):
    x, codebook = _randn(20, 6, seed=12), _randn(40, 6, seed=13)
    monkeypatch.setenv("VQKERNELS_CPU_PASS", "float32")
    prepared = vq.prepare_codebook(codebook)
    monkeypatch.delenv("VQKERNELS_CPU_PASS")
    monkeypatch.setenv("VQKERNELS_CPU_ISA", "portable")
    assert "VQKERNELS_CPU_PASS=float32" in vq.explain("nearest", x, prepared)
    assert torch.equal(vq.nearest(x, prepared)[0], true_nearest(x, codebook)[0])


def test_copies_and_pickles_search_alike(backend):
    _, device = backend
    x, codebook = _randn(20, 6, seed=14).to(device), _randn(40, 6, seed=15).to(device)
    prepared = vq.prepare_codebook(codebook, metric="cosine")
    expected = vq.nearest(x, prepared)[0]
    for other in (copy.deepcopy(prepared), copy.copy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(vq.nearest(x, other)[0], expected)
    assert repr(prepared).startswith("PreparedCodebook(40 codes of 6 dims, torch.float32, ")


def test_it_is_made_in_inference_mode_and_used_outside():
    with torch.inference_mode():
        codebook = _randn(40, 6, seed=16)
        prepared = vq.prepare_codebook(codebook)
    x = _randn(20, 6, seed=17).requires_grad_()
    vq.quantize(x, prepared).quantized.sum().backward()
    assert x.grad is not None


def test_memory_is_given_back(compiled):
    prepared = vq.prepare_codebook(_randn(40, 6, seed=18))
    number = prepared.known_form(("cpu", "exact")).number
    x = torch.zeros(1, 2, 6)
    torch.ops.vqkernels_C.nearest_of_snapshot(x, number)
    del prepared
    gc.collect()
    with pytest.raises(RuntimeError, match=f"snapshot: expected the number of a codebook that is kept, got {number}"):
        torch.ops.vqkernels_C.nearest_of_snapshot(x, number)


def test_threads_share_it(compiled):
    x, codebook = _randn(60, 12, seed=19), _randn(500, 12, seed=20)
    expected, found = true_nearest(x, codebook)[0], list[bool]()
    prepared = pickle.loads(pickle.dumps(vq.prepare_codebook(codebook)))  # nothing is packed yet

    def work() -> None:
        found.append(torch.equal(vq.nearest(x, prepared)[0], expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_it(compiled):
    torch.set_num_threads(1)  # no OpenMP pool survives a fork
    x, codebook = _randn(30, 8, seed=21), _randn(300, 8, seed=22)
    prepared, expected = vq.prepare_codebook(codebook), true_nearest(x, codebook)[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(vq.nearest(x, prepared)[0], expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(vq.nearest(x, prepared)[0], expected)


def test_in_a_graph_it_is_its_snapshot():
    x, codebook = _randn(20, 6, seed=23), _randn(40, 6, seed=24)
    prepared, nodes = _prepared(codebook), []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    search = torch.compile(lambda x: vq.nearest(x, prepared)[0], fullgraph=True, backend=backend)
    assert torch.equal(search(x), true_nearest(x, codebook)[0])
    assert sum("vqkernels.nearest" in str(node) for node in nodes) == 1
