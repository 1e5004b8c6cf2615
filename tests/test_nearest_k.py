"""``vqkernels.nearest_k``: the k true nearest codes in order."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from adversarial import Case, cases, large_cases, true_nearest
from quantizers import randn
from requirements import skip_or_fail

import vqkernels as vq
from vqkernels._extension import cpu_library, instruction_set
from vqkernels.backends import BackendError, candidates, requested_backend

HAS_CUDA = torch.cuda.is_available()
BACKENDS = [("reference", "cpu"), ("compiled", "cpu"), ("triton", "cuda" if HAS_CUDA else "cpu")]
ALL = [(metric, case) for metric in ("euclidean", "cosine") for case in cases(metric)]
TOKENS = 3  # of each case that the oracle answers
SIZES = re.compile(r"gauss-\d+x|cosine-(\d+x|dim-)")  # cases that are plain but for their size
INTERPRETED_SIZES = {"gauss-0x5x4", "gauss-1x1x1", "gauss-17x33x3", "gauss-7x68x257", "cosine-1x2", "cosine-dim-33"}
INTERPRETED_SIZES |= {"cosine-dim-1"}  # where all codes tie


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, under the interpreter, on meant overflow


@pytest.fixture(params=BACKENDS, ids=lambda run: run[0])
def place(request: pytest.FixtureRequest):
    """Puts one backend in force and gives its device."""
    name, device = request.param
    probe = torch.zeros(1, 1, 1, device=device)
    reason = {c.backend: c.reason for c in candidates("nearest_k", probe, probe[0], 1, "euclidean")}[name]
    if reason is not None:
        skip_or_fail(name, reason)
    with vq.use_backend(name):
        yield device


def interpreted() -> bool:
    """Whether the backend in force is Triton's interpreter, which takes its time."""
    return requested_backend() == "triton" and not HAS_CUDA


def few(x: torch.Tensor) -> torch.Tensor:  # [N, D] -> [n, D]
    """As many as the oracle answers where the interpreter runs; all of them elsewhere."""
    return x[:TOKENS] if interpreted() else x


def truth(case: Case, k: int, metric: str) -> tuple[torch.Tensor, torch.Tensor]:  # [n, k] each
    """By its definition: k times the oracle of ``nearest``, every time without the codes found before."""
    x = case.x[:TOKENS]
    codes = torch.full((len(x), k), -1)
    distance = torch.full((len(x), k), float("nan"))
    for n, token in enumerate(x):
        left = torch.arange(len(case.codebook))
        for j in range(k if token.isfinite().all() else 0):
            place, distance[n, j] = (found[0] for found in true_nearest(token[None], case.codebook[left], metric))
            codes[n, j] = left[place]
            left = left[left != left[place]]
    return codes, distance


@pytest.mark.parametrize(("metric", "case"), ALL, ids=str)
def test_the_codes_are_the_true_ones_in_order(place: str, metric: str, case: Case):
    if interpreted() and SIZES.match(case.name) and case.name not in INTERPRETED_SIZES:
        pytest.skip("takes the interpreter seconds; test_triton_nearest_k.py has every configuration at such sizes")
    k, x, codebook = min(5, len(case.codebook)), few(case.x).to(place), case.codebook.to(place)
    if requested_backend() == "triton" and x.dtype == torch.float64:
        with pytest.raises(BackendError, match="not float64"):
            vq.nearest_k(x, codebook, k, metric=metric)
        return
    codes, distance = (found.cpu() for found in vq.nearest_k(x, codebook, k, metric=metric))
    true, true_distance = truth(case, k, metric)
    assert torch.equal(codes[:TOKENS], true)
    absolute = 2.0**-46 if metric == "cosine" else 0.0
    torch.testing.assert_close(distance[:TOKENS], true_distance, rtol=2.0**-22, atol=absolute, equal_nan=True)
    if len(x) > TOKENS:  # beyond those of the oracle
        first, first_distance = (found.cpu() for found in vq.nearest(x, codebook, metric=metric))
        assert torch.equal(codes[:, 0], first)
        torch.testing.assert_close(distance[:, 0], first_distance, rtol=2.0**-22, atol=absolute, equal_nan=True)
    ascending = distance.diff(dim=1)
    assert ((ascending >= 0) | ascending.isnan()).all()


LARGE = {case.name: case for case in large_cases()}


@cache
def reference(name: str, metric: str) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    x = LARGE[name].x[:3]
    with vq.use_backend("reference"):
        return x, vq.nearest_k(x, LARGE[name].codebook, 9, metric=metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("case", LARGE.values(), ids=str)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_thousands_of_codes_on_every_instruction_set(monkeypatch, isa: str, case: Case, metric: str):
    """The C++ kernel against the reference, each coarse pass, one and two threads."""
    if (reason := cpu_library()) is not None:
        skip_or_fail("compiled", reason)
    x, true = reference(case.name, metric)
    monkeypatch.setenv("VQKERNELS_CPU_ISA", isa)
    if instruction_set() != isa:
        skip_or_fail(isa, f"this CPU has no {isa}")
    for coarse_pass, threads in (("int16", 1), ("float32", 2), ("int8", 1), ("byte", 1)):
        monkeypatch.setenv("VQKERNELS_CPU_PASS", coarse_pass)
        torch.set_num_threads(threads)
        with vq.use_backend("compiled"):
            codes, distance = vq.nearest_k(x, case.codebook, 9, metric=metric)
        assert torch.equal(codes, true[0])
        torch.testing.assert_close(distance, true[1], rtol=2.0**-22, atol=2.0**-46, equal_nan=True)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_all_codes_in_order(place: str, metric: str):
    size = 24 if interpreted() else 40
    x, codebook = few(randn(20, 6)), randn(size, 6, seed=1)
    codebook[size // 2 :] = codebook[: size // 2].clone()  # all of them twice
    for k in (size,) if interpreted() else (1, size - 1, size):
        codes = vq.nearest_k(x.to(place), codebook.to(place), k, metric=metric)[0].cpu()
        assert torch.equal(codes[:TOKENS], truth(Case("", x, codebook), k, metric)[0])
    assert torch.equal(codes.sort(dim=1).values, torch.arange(size).expand(len(x), size))


@pytest.mark.parametrize(("tokens", "size", "dim", "k"), [(150, 3000, 16, 20), (97, 5000, 40, 3), (50, 900, 130, 50)])
def test_the_kernel_equals_the_reference_where_it_works_by_blocks(tokens: int, size: int, dim: int, k: int):
    if (reason := cpu_library()) is not None:
        skip_or_fail("compiled", reason)
    x, codebook = randn(tokens, dim), randn(size, dim, seed=1)
    codebook[::7] *= 100  # several scales
    codebook[1:5] = codebook[5]
    x[3, 1], x[5], x[6] = float("inf"), 0, x[6] * 1e30
    for metric in ("euclidean", "cosine"):
        found = {}
        for name, threads in (("reference", 2), ("compiled", 1), ("compiled", 2)):
            torch.set_num_threads(threads)
            with vq.use_backend(name):
                found[name, threads] = vq.nearest_k(x, codebook, k, metric=metric)
        assert torch.equal(found["reference", 2][0], found["compiled", 1][0])
        for one, two in zip(found["compiled", 1], found["compiled", 2], strict=True):
            assert torch.equal(one.nan_to_num(-9), two.nan_to_num(-9))


def test_strides_shapes_and_half_tokens(place: str):
    x = randn(2, 8, 5, 3).bfloat16().permute(0, 2, 3, 1).to(place)
    codebook = randn(24, 16, seed=1).to(place)[::2, ::2]
    codes, distance = vq.nearest_k(x, codebook, 4)
    assert codes.shape == distance.shape == (2, 5, 3, 4)
    flat = x.reshape(-1, 8).float().contiguous()
    assert torch.equal(codes.view(-1, 4), vq.nearest_k(flat, codebook.contiguous(), 4)[0])
    assert vq.nearest_k(flat[0], codebook, 2)[0].shape == (2,)
    assert vq.nearest_k(flat[:0], codebook, 2)[0].shape == (0, 2)


def test_it_compiles():
    from vqkernels.ops.nearest_k import _nearest_k

    x, codebook = randn(2, 20, 4), randn(7, 4, seed=1)
    torch.library.opcheck(_nearest_k, (x, codebook, 3, "euclidean"))
    compiled = torch.compile(lambda x: vq.nearest_k(x, codebook, 3)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), vq.nearest_k(x, codebook, 3)[0])


def test_bad_arguments_are_named(place: str):
    x, codebook = randn(5, 4).to(place), randn(3, 4).to(place)
    for k in (0, 4, True, 1.0):
        with pytest.raises(ValueError, match="k: expected an integer from 1 to 3"):
            vq.nearest_k(x, codebook, k)
    with pytest.raises(ValueError, match="metric: expected one of"):
        vq.nearest_k(x, codebook, 1, metric="dot")
    codebook[1, 1] = float("nan")
    if place == "cpu":
        with pytest.raises(ValueError, match="codebook: expected finite values"):
            vq.nearest_k(x, codebook, 1)
    else:
        assert (vq.nearest_k(x, codebook, 1)[0] == -1).all()
