"""What is particular to the Triton kernels: the split search, both tiles, exact arithmetic, no waiting for the device.

That their results are right is checked beside every other backend's, in test_nearest.py and test_training_ops.py.
They run in the interpreter here, or on the GPU where there is one.
"""

from __future__ import annotations

import importlib.util
from fractions import Fraction

import pytest
import torch
from adversarial import Case, cases, true_nearest
from formulas import code_sums
from host_waits import no_host_waits
from requirements import skip_or_fail
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    skip_or_fail("triton", "triton is not installed")

import triton
import triton.language as tl

from vqkernels.kernels import reference_training as reference
from vqkernels.kernels import (
    triton_codebook,
    triton_common,
    triton_configs,
    triton_nearest,
    triton_softmax,
    triton_softmax_backward,
    triton_training,
)
from vqkernels.kernels.triton_arithmetic import compare_codes, cosine_of, row_dot
from vqkernels.testing import sum_tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, under the interpreter, on meant overflow


def _check_nearest(case: Case, metric: str) -> None:
    codes, _ = triton_nearest.nearest(case.x[None].to(DEVICE), case.codebook.to(DEVICE), metric, "exact")
    assert torch.equal(codes[0].cpu(), true_nearest(case.x, case.codebook, metric)[0])


def _hard(metric: str) -> list[Case]:
    """The cases that leave most to the state of the coarse pass, of more than one tile of codes."""
    names = ("duplicates", "outlier-code", "mixed-scales", "gauss-33x129x18")
    return [c for c in cases(metric) if any(name in c.name for name in names)]


@pytest.mark.parametrize(("metric", "case"), [(m, c) for m in ("euclidean", "cosine") for c in _hard(m)], ids=str)
def test_search_split_over_the_codes(monkeypatch, metric: str, case: Case):
    """Few tokens: every tile of codes is a program of its own, and their results are merged."""
    monkeypatch.setattr(triton_nearest, "program_slots", lambda x, config: 1000)
    _check_nearest(case, metric)


@pytest.mark.parametrize("config", triton_configs.CONFIGS, ids=str)
@pytest.mark.parametrize("dim", [1, 33])
def test_every_search_configuration_at_every_kind_of_dim(monkeypatch, config, dim: int):
    """|c|^2 as columns and as a vector, on data with ties."""
    monkeypatch.setattr(triton_nearest, "config_for", lambda x, k, dim: config)
    generator = torch.Generator().manual_seed(dim)
    x, codebook = torch.randn(70, dim, generator=generator), torch.randn(75, dim, generator=generator)
    codebook[::3] = codebook[::3].round(decimals=1)  # not all: the interpreter takes a second for each tie
    _check_nearest(Case("config", x, codebook), "euclidean")


def test_parallel_codes_of_any_length_tie():
    """Multiples by 3, 5, 7 ...: equal cosines whose double-double values differ in the last bits."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-9, 10, (6, 7), generator=generator).float()
    codes = torch.randint(-9, 10, (9, 1, 7), generator=generator) * torch.tensor([7, 3, 11, 1, 5, 13])[:, None]
    _check_nearest(Case("parallel", x, codes.reshape(54, 7).float()), "cosine")


def test_fast_search_split_over_the_codes(monkeypatch):
    monkeypatch.setattr(triton_nearest, "program_slots", lambda x, config: 1000)
    codebook = torch.randn(300, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    codes, distance = triton_nearest.nearest(codebook[None, 7::50], codebook, "euclidean", "fast")
    assert codes[0].tolist() == list(range(7, 300, 50))
    assert (distance == 0).all()


@triton.jit
def order_kernel(x_ptr, codes_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    sign = compare_codes(x_ptr, pair * D, 1, codes_ptr, 2 * pair, 2 * pair + 1, D, BLOCK_D)
    tl.store(out_ptr + pair, sign)


@triton.jit
def cosine_kernel(x_ptr, codes_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    x_high, x_low = row_dot(x_ptr, pair * D, 1, x_ptr, pair * D, 1, D, BLOCK_D)
    c_high, c_low = row_dot(codes_ptr, pair * D, 1, codes_ptr, pair * D, 1, D, BLOCK_D)
    dot_high, dot_low = row_dot(x_ptr, pair * D, 1, codes_ptr, pair * D, 1, D, BLOCK_D)
    high, low = cosine_of(dot_high, dot_low, x_high, x_low, c_high, c_low)
    tl.store(out_ptr + 2 * pair, high)
    tl.store(out_ptr + 2 * pair + 1, low)


def _hard_pairs(dim: int) -> tuple[Tensor, Tensor]:  # x [P, D], codes [P, 2, D]
    """Equal distances, and distances that differ in one bit of one term, at every scale of float32."""
    generator = torch.Generator().manual_seed(dim)
    x, codes = [], []
    for exponents in ((0, 1), (-3, 4), (-40, 40), (-149, -120), (90, 120), (-149, 120)):
        scale = torch.randint(*exponents, (dim,), generator=generator).double().exp2()
        first = (torch.randn(dim, generator=generator).double() * scale).float()
        middle = torch.randn(dim, generator=generator).float()
        mirror = torch.where(torch.rand(dim, generator=generator) < 0.5, -first, first)
        nudged = mirror.clone()
        nudged[dim // 2] = torch.nextafter(nudged[dim // 2], torch.tensor(torch.inf))
        order = torch.randperm(dim, generator=generator)
        x += [torch.zeros(dim), torch.zeros(dim), torch.ones(dim) * 0.3, middle, middle]
        codes += [(first, mirror), (first, nudged), (first, first[order]), (first, mirror), (nudged, mirror)]
    if dim > 8:  # 1 - 1 + 2^-34 against many squares of 0.9 x 2^-35: each is below the first digit, their sum is not
        first, second = torch.zeros(dim), torch.full((dim,), 0.95 * 2.0**-17.5)
        first[:3], second[:3] = torch.tensor([1.0, 0.0, 2.0**-17]), torch.tensor([0.0, 1.0, 0.0])
        x, codes = [*x, torch.zeros(dim)], [*codes, (first, second)]
    return torch.stack(x), torch.stack([torch.stack(pair) for pair in codes])


def _fractions(row: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in row.tolist()]


@pytest.mark.parametrize("dim", [1, 5, 70])
def test_the_order_of_two_codes_is_exact(dim: int):
    x, codes = _hard_pairs(dim)
    out = torch.empty(len(x), dtype=torch.int64, device=DEVICE)
    order_kernel[(len(x),)](x.to(DEVICE), codes.to(DEVICE), out, dim, BLOCK_D=32)
    for token, (a, b), sign in zip(x, codes, out.sign().tolist(), strict=True):
        t, a, b = _fractions(token), _fractions(a), _fractions(b)
        gap = sum((p - q) ** 2 for p, q in zip(t, a, strict=True)) - sum(
            (p - q) ** 2 for p, q in zip(t, b, strict=True)
        )
        assert sign == (gap > 0) - (gap < 0)


@pytest.mark.parametrize("dim", [1, 5, 70])
def test_cosines_keep_100_bits(dim: int):
    x, codes = _hard_pairs(dim)
    x, codes = x[3:30:5].contiguous(), codes[3:30:5, 0].contiguous()
    out = torch.empty(len(x), 2, dtype=torch.float64, device=DEVICE)
    cosine_kernel[(len(x),)](x.to(DEVICE), codes.to(DEVICE), out, dim, BLOCK_D=32)
    for token, code, (high, low) in zip(x, codes, out.tolist(), strict=True):
        t, c = _fractions(token), _fractions(code)
        dot = sum(p * q for p, q in zip(t, c, strict=True))
        square = dot * dot / sum(p * p for p in t) / sum(q * q for q in c)
        mine = Fraction(high) + Fraction(low)
        assert (mine > 0) == (dot > 0)
        assert abs(mine * mine - square) < Fraction(2) ** -99


def test_nothing_waits_for_the_device():
    x, codebook = torch.randn(2, 20, 6, device=DEVICE), torch.randn(9, 6, device=DEVICE)
    config = triton_nearest.config_for(x, 9, 6)
    derror, sizes, revive = x[..., 0].contiguous(), codebook[:, 0].exp(), codebook[:, 0] > 0
    with no_host_waits(DEVICE, methods=False):
        codes, _ = triton_nearest.search(x, codebook, False, config)
        quantized, _ = triton_training.gather(x, codebook, codes)
        triton_training.quantize_backward(x, quantized, codes, x, derror, True)
        counts, sums = triton_codebook.codebook_stats(x, codes, 9)
        triton_codebook.ema_update_(codebook, sizes, codebook.clone(), counts, sums, revive, 0.9, 1e-5, 1.0, True)
        logits = (x, codebook, sizes, 1.0)
        lse, entropy = triton_softmax.softmax_forward(*logits)
        each = triton_softmax.softmax_code_sums(*logits, lse, entropy)
        triton_softmax_backward.softmax_backward(*logits, lse, lse, entropy, lse, each, x, True)
        triton_softmax.softmax_sample(*logits, lse, entropy)


SHAPES = {  # batch, tokens, dim, codes, channels first
    "ragged": (2, 37, 18, 5, False),
    "channels-first": (3, 20, 65, 40, True),
    "single": (1, 1, 1, 1, False),
    "no tokens": (2, 0, 4, 3, False),
}


def _tensor(batch: int, tokens: int, dim: int, first: bool, dtype: torch.dtype) -> Tensor:  # [B, T, D]
    generator = torch.Generator().manual_seed(dim)
    flat = torch.randn(batch, dim, tokens, generator=generator).to(DEVICE, dtype)
    return flat.transpose(1, 2) if first else flat.transpose(1, 2).contiguous()


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_token_kernels_agree_with_the_reference(shape, dtype: torch.dtype):
    batch, tokens, dim, k, first = shape
    x = _tensor(batch, tokens, dim, first, dtype)
    g = _tensor(tokens, batch, dim, False, dtype).transpose(0, 1)  # strides unlike x's
    codebook = _tensor(1, k, dim, True, dtype)[0]
    codes = torch.randint(-1, k, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    quantized, error = triton_training.gather(x, codebook, codes)
    expected, expected_error = reference.gather(x, codebook, codes)
    assert quantized.stride() == expected.stride()
    assert torch.equal(quantized.nan_to_num(nan=77.0), expected.nan_to_num(nan=77.0))
    torch.testing.assert_close(error, expected_error, rtol=2 * (dim + 2) * 2.0**-24, atol=0, equal_nan=True)
    for rotation in (False, True):
        dx = triton_training.quantize_backward(x, quantized, codes, g, error.nan_to_num(), rotation)
        truth = reference.quantize_backward(x, quantized, codes, g, error.nan_to_num(), rotation)
        assert dx.stride() == truth.stride()
        # one rounding to dtype each, of float32 results that differ by the order of a few sums over D
        atol = 4 * (dim + 8) * 2.0**-24 * truth.nan_to_num().abs().amax(-1, keepdim=True)  # [B, T, 1]
        off = (dx.float() - truth.float()).abs() - torch.finfo(dtype).eps * truth.float().abs()
        assert (off.nan_to_num() <= atol).all()
        assert torch.equal(dx.isnan(), truth.isnan())


@pytest.mark.parametrize("popular", [0.0, 0.9, 1.0])
def test_statistics_of_popular_codes(popular: float):
    """A code with most of the tokens is summed in pieces, joined in order."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 3000, 20, generator=generator).to(DEVICE)
    codes = torch.randint(-1, 90, (1, 3000), generator=generator)
    codes[torch.rand(1, 3000, generator=generator) < popular] = 5
    counts, sums = triton_codebook.codebook_stats(x, codes.to(DEVICE), 90)
    kept = codes[0] >= 0
    truth = code_sums(x, codes, 90)
    assert torch.equal(counts.cpu().long(), torch.bincount(codes[0][kept], minlength=90))
    assert (sums.cpu() - truth).abs().max() <= sum_tolerance(3000, torch.float32, x.abs().max().item())


def test_ema_update_over_several_blocks_of_codes():
    generator = torch.Generator().manual_seed(4)
    k = 2 * triton_codebook.SUM_BLOCK + 7
    state = [torch.randn(k, 3, generator=generator), torch.rand(k, generator=generator), torch.randn(k, 3)]
    counts = torch.randint(0, 4, (k,), generator=generator).float()
    sums, revive = torch.randn(k, 3, generator=generator), torch.rand(k, generator=generator) < 0.2
    mine = [t.clone().to(DEVICE) for t in state]
    truth = [t.double() for t in state]
    options = (0.9, 1e-5, 2.0, True)
    triton_codebook.ema_update_(*mine, counts.to(DEVICE), sums.to(DEVICE), revive.to(DEVICE), *options)
    reference.ema_update_(*truth, counts.double(), sums.double(), revive, *options)
    for got, expected in zip(mine, truth, strict=True):
        torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-6)


def test_reasons_are_given_for_what_it_cannot_take(monkeypatch):
    x, codebook = torch.zeros(1, 2, 3), torch.zeros(4, 3)
    assert "float64" in triton_common.unsupported(x.double())
    assert "65536" in triton_nearest._supports(x, codebook[:, :1].expand(4, 1 << 17), "euclidean", "exact")
    assert "CUDA" in triton_common.unsupported(x.to("meta"))
    monkeypatch.setattr(triton_common, "INTERPRETED", False)
    assert "TRITON_INTERPRET" in triton_common.unsupported(x)
