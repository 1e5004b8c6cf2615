"""``vqkernels.nearest_both``: rows and columns of one sweep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adversarial import Case, cases, true_nearest
from quantizers import randn
from test_columns import truth
from torch import Tensor

import vqkernels as vq
from vqkernels._extension import instruction_set

ALL = [(metric, case) for metric in ("euclidean", "cosine") for case in cases(metric)]


def check_distance(found: Tensor, true: Tensor, metric: str) -> None:
    absolute = 2.0**-46 if metric == "cosine" else 0.0
    torch.testing.assert_close(found.cpu(), true, rtol=2.0**-22, atol=absolute, equal_nan=True)


@pytest.mark.parametrize(("metric", "case"), ALL, ids=str)
def test_both_are_the_true_ones(backend, metric: str, case: Case):
    name, device = backend
    one_by_one = device == "cpu" and case.name == "cosine-dim-1"  # all of them tie, which takes the interpreter long
    large = case.x.numel() * len(case.codebook) > 600 or one_by_one
    if name == "triton" and (case.x.dtype == torch.float64 or large):
        return  # two searches there, of which test_nearest.py and test_columns.py run larger cases
    codes, distance, tokens, token_distance = vq.nearest_both(
        case.x.to(device), case.codebook.to(device), metric=metric
    )
    true, true_distance = true_nearest(case.x, case.codebook, metric)
    assert torch.equal(codes.cpu(), true)
    check_distance(distance, true_distance, metric)
    true, true_distance = truth(case, case.x.isfinite().all(1), metric)
    assert torch.equal(tokens.cpu(), true)
    check_distance(token_distance, true_distance, metric)


def mask_of(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(0)) > 0.1


def gaussian(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return randn(n, d), randn(k, d, seed=1)


def approaching(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Every token is nearer to every code than the one before: more candidates than are kept."""
    x = randn(1, d) * torch.linspace(9, 3, n)[:, None]
    return x, randn(k, d, seed=1) * 1e-3


def doubled(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Few different tokens: every group of them ties with every other."""
    x, codebook = gaussian(n, k, d)
    return x[torch.arange(n) % 5], codebook


def lattice(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    x, codebook = gaussian(n, k, d)
    return x.round(), codebook.round()


def scales(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Codes that share no scale, and tokens of all of them."""
    x, codebook = gaussian(n, k, d)
    return x * 10.0 ** (torch.arange(n) % 7 - 2)[:, None], codebook * 10.0 ** (torch.arange(k) % 4)[:, None]


def huge(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Tokens beyond what the coarse pass takes."""
    x, codebook = gaussian(n, k, d)
    x[3::50] *= 1e25
    return x, codebook


def huge_but_masked(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    x, codebook = gaussian(n, k, d)
    x[~mask_of(n)] *= 1e25
    return x, codebook


def far(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    x, codebook = gaussian(n, k, d)
    return x + 1e3, codebook


SHAPES = [(1500, 300, 8), (330, 2100, 17), (260, 2100, 64), (500, 150, 130), (20, 5000, 4), (7, 3, 1)]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "inputs", [gaussian, approaching, doubled, lattice, scales, huge, huge_but_masked, far], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(("isa", "coarse_pass"), [("", ""), ("", "float32"), ("", "int8"), ("portable", "")])
def test_they_are_those_of_two_searches(
    monkeypatch: pytest.MonkeyPatch, isa: str, coarse_pass: str, inputs: Callable, shape: tuple, metric: str
):
    monkeypatch.setenv("VQKERNELS_CPU_ISA", isa)
    monkeypatch.setenv("VQKERNELS_CPU_PASS", coarse_pass)
    x, codebook = inputs(*shape)
    codebook[len(codebook) // 2] = 0
    x[len(x) // 2] = 0
    mask = mask_of(len(x))
    x[-1, 0] = torch.nan
    with vq.use_backend("compiled"):
        expected = (*vq.nearest(x, codebook, metric=metric), *vq.nearest_tokens(x, codebook, metric=metric, mask=mask))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = vq.nearest_both(x, codebook, metric=metric, mask=mask)
            for mine, other in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_strides_types_and_instruction_sets(monkeypatch: pytest.MonkeyPatch, isa: str):
    from requirements import skip_or_fail

    monkeypatch.setenv("VQKERNELS_CPU_ISA", isa)
    if instruction_set() != isa:
        skip_or_fail(isa, f"this CPU has no {isa}")
    image, codebook = randn(2, 8, 9, 7), randn(300, 8, seed=1)
    mask = image[:, 0] > -1
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x, book = image.to(dtype).permute(0, 2, 3, 1), codebook.to(dtype).T.contiguous().T
        codes, _, tokens, _ = vq.nearest_both(x, book, mask=mask)
        assert codes.shape == x.shape[:-1]
        assert torch.equal(codes.flatten(), true_nearest(x.reshape(-1, 8), book)[0])
        true, _ = truth(Case("strides", x.reshape(-1, 8), book), mask.flatten(), "euclidean")
        assert torch.equal(tokens, true)
    tokens = vq.nearest_both(image.bfloat16().permute(0, 2, 3, 1), codebook)[2]
    true, _ = true_nearest(codebook, image.bfloat16().float().permute(0, 2, 3, 1).reshape(-1, 8))
    assert torch.equal(tokens, true)


def test_no_token_and_a_codebook_that_is_not_finite(backend):
    _, device = backend
    x, codebook = randn(6, 4).to(device), randn(5, 4, seed=1).to(device)
    nobody = torch.zeros(6, dtype=torch.bool, device=device)
    for tokens, mask in ((x[:0], None), (x, nobody), (x * float("nan"), None)):
        codes, _, index, distance = vq.nearest_both(tokens, codebook, mask=mask)
        assert torch.equal(codes, vq.nearest(tokens, codebook)[0])
        assert (index == -1).all()
        assert distance.isnan().all()
        assert (codes.dtype, distance.dtype) == (torch.int64, torch.float32)
    codebook[2, 1] = float("inf")
    if device == "cpu":
        with pytest.raises(ValueError, match="codebook: expected finite values"):
            vq.nearest_both(x, codebook)


def test_the_op_and_what_explain_says():
    from vqkernels.ops import nearest_both as op

    module = __import__("sys").modules[op.__module__]
    x, codebook, mask = randn(2, 20, 4), randn(7, 4, seed=1), randn(2, 20) > 0
    torch.library.opcheck(module._nearest_both, (x, codebook, mask, "euclidean"))
    compiled = torch.compile(lambda x: op(x, codebook, mask=mask)[2], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), op(x, codebook, mask=mask)[2])
    with vq.use_backend("compiled"):
        assert "one sweep" in vq.explain("nearest_both", x, codebook)
        assert "two searches" in vq.explain("nearest_both", x.double(), codebook.double())
    with vq.use_backend("reference"):
        assert "two searches" in vq.explain("nearest_both", x, codebook)


def test_bad_arguments_are_named():
    x, codebook = randn(5, 4), randn(3, 4)
    with pytest.raises(ValueError, match=r"mask: expected bool \[5\]"):
        vq.nearest_both(x, codebook, mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="metric: expected one of"):
        vq.nearest_both(x, codebook, metric="dot")
    with pytest.raises(TypeError, match="codebook: expected"):
        vq.nearest_both(x, codebook.half())
