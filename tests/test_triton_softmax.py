"""The streaming softmax in Triton, against float64: ragged blocks, splits over programs, tokens that are not finite.

It runs in the interpreter here, or on the GPU where there is one.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace

import pytest
import torch
from requirements import skip_or_fail
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    skip_or_fail("triton", "triton is not installed")

from vqkernels import backends
from vqkernels.kernels import triton_softmax as forward
from vqkernels.kernels import triton_softmax_backward as backward
from vqkernels.kernels import triton_softmax_tiles as tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNDERFLOW = 2.0**-125  # what a probability may lose to the smallest float32
UNIT = 2.0**-24 if DEVICE == "cpu" else 2.0**-21  # of a product: float32 in the interpreter, three tf32 terms on a GPU
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, under the interpreter, on meant overflow


@dataclass
class Case:
    x: Tensor  # [B, T, D]
    codebook: Tensor  # [K, D]
    bias: Tensor | None  # [K]
    scale: float

    def logits(self) -> Tensor:  # float64 [N, K]
        rows = self.x.double().reshape(-1, self.x.shape[-1]) @ self.codebook.double().T * self.scale
        return rows if self.bias is None else rows + self.bias.double()

    def logit_error(self) -> Tensor:  # [N, 1]
        """Largest absolute error of a logit, of the lse that is as large, and of what is left of an exponential."""
        sizes = self.x.double().abs().reshape(-1, self.x.shape[-1]) @ self.codebook.double().abs().T * abs(self.scale)
        bias = 0.0 if self.bias is None else self.bias.double().abs()
        terms = self.x.shape[-1] + 5
        return ((sizes * UNIT * terms + (bias + 8) * 2.0**-22).amax(1) + self.logits().abs().amax(1) * 2.0**-22)[
            :, None
        ]


SHAPES = {  # batch, tokens, codes, dim, channels first, bias, scale
    "ragged": (2, 37, 150, 18, False, True, 1.5),
    "channels first": (3, 30, 70, 40, True, False, 0.3),
    "logits in the hundreds": (1, 20, 90, 8, False, False, 40.0),
    "streamed dims": (1, 20, 66, 140, False, True, 0.2),
    "single": (1, 1, 1, 1, False, True, 2.0),
}


def _case(batch: int, tokens: int, k: int, dim: int, first: bool, bias: bool, scale: float) -> Case:
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(batch, dim, tokens, generator=generator).to(DEVICE).transpose(1, 2)
    codebook = torch.randn(k, dim, generator=generator).to(DEVICE)
    some = -codebook.square().sum(1) * scale / 2 if bias else None
    return Case(x if first else x.contiguous(), codebook, some, scale)


@pytest.fixture(params=[1, 1000], ids=["one split", "every split"])
def _slots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """With a thousand programs to fill, every tile that streams is a program of its own."""
    monkeypatch.setattr(tiles, "slots_of", lambda x, config: request.param)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def case(request: pytest.FixtureRequest, _slots: None) -> Case:
    return _case(*request.param)


def _call(case: Case, fn, *args):
    return fn(case.x, case.codebook, case.bias, case.scale, *args)


def _per_token(case: Case, seed: int) -> Tensor:  # [B, T]
    """Laid out unlike a contiguous tensor."""
    batch, tokens, _ = case.x.shape
    return torch.randn(tokens, batch, generator=torch.Generator().manual_seed(seed)).to(DEVICE).T


def test_log_sum_exp_and_entropy(case: Case):
    lse, entropy = _call(case, forward.softmax_forward)
    logits, error = case.logits(), case.logit_error()[:, 0]
    log_p = logits.log_softmax(1)
    truth = -(log_p.exp() * log_p).sum(1)
    assert lse.shape == entropy.shape == case.x.shape[:2]
    assert ((lse.reshape(-1) - logits.logsumexp(1)).abs() <= error).all()
    # dH = -sum p (log p + H) dl: |dH| <= 2 H max|dl|
    assert ((entropy.reshape(-1) - truth).abs() <= 2 * error * truth + (truth + 2) * 2.0**-21).all()


def test_sums_over_the_tokens(case: Case):
    weight, lse = _per_token(case, 1), case.logits().logsumexp(1).view(case.x.shape[:2]).float()
    sums = _call(case, forward.softmax_code_sums, lse, weight)
    p, weight = case.logits().softmax(1), weight.double().reshape(-1, 1)
    error = (2 * case.logit_error() * p + UNDERFLOW) * weight.abs()
    assert ((sums - (p * weight).sum(0)).abs() <= error.sum(0)).all()


OPTIONS = {"everything": (True, True, True), "entropy": (False, False, True), "tokens alone": (True, False, False)}


def _gradients(case: Case, dlse: Tensor, dentropy: Tensor, weight: Tensor, dsums: Tensor | None, way: Tensor | None):
    """float64 dx, dcodebook, dbias, and the largest error of each."""
    rows, codes = case.x.double().reshape(-1, case.x.shape[-1]), case.codebook.double()
    dlse, dentropy, weight = (t.double().reshape(-1, 1) for t in (dlse, dentropy, weight))
    log_p = case.logits().log_softmax(1)
    p, f, size = log_p.exp(), -dentropy * log_p, dentropy.abs() * (1 - log_p)
    if dsums is not None:
        f, size = f + weight * dsums.double(), size + (weight * dsums.double()).abs()
    if way is not None:
        flat = way.double().reshape(rows.shape)
        f, size = f + flat @ codes.T, size + flat.abs() @ codes.abs().T * (1 + rows.shape[1])
    dl = p * (f - (p * f).sum(1, keepdim=True) + dlse)
    off = (4 * case.logit_error() * p + UNDERFLOW) * (size + (p * size).sum(1, keepdim=True) + dlse.abs())
    truth = dl @ codes * case.scale, dl.T @ rows * case.scale, dl.sum(0)
    return truth, (off @ codes.abs() * case.scale, off.T @ rows.abs() * case.scale, off.sum(0))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradients(case: Case, options: tuple[bool, bool, bool]):
    sums, straight, need_codebook = options
    dlse, dentropy, weight = (_per_token(case, seed) for seed in (1, 2, 3))
    lse = case.logits().logsumexp(1).view(case.x.shape[:2]).float()
    dsums = torch.randn(len(case.codebook), generator=torch.Generator().manual_seed(4)).to(DEVICE) if sums else None
    way = torch.randn_like(case.x.transpose(0, 1)).transpose(0, 1) if straight else None
    got = _call(case, backward.softmax_backward, lse, dlse, dentropy, weight, dsums, way, need_codebook)
    truth, error = _gradients(case, dlse, dentropy, weight, dsums, way)
    assert got[0].stride() == torch.empty_like(case.x).stride()
    assert ((got[0].reshape(truth[0].shape) - truth[0]).abs() <= error[0]).all()
    if need_codebook:
        assert ((got[1] - truth[1]).abs() <= error[1]).all()
        assert ((got[2] - truth[2]).abs() <= error[2]).all()
    else:
        assert got[1].shape == (0, case.x.shape[2])
        assert got[2].shape == (0,)


def test_cross_entropy_alone_needs_no_mean(case: Case):
    """No entropy, no sums, no direction: dx = dlse sum p c."""
    zero, dlse = torch.zeros(case.x.shape[:2], device=DEVICE), _per_token(case, 1)
    lse = case.logits().logsumexp(1).view(case.x.shape[:2]).float()
    dx, _, _ = _call(case, backward.softmax_backward, lse, dlse, zero, zero, None, None, False)
    truth, error = _gradients(case, dlse, zero, zero, None, None)
    assert ((dx.reshape(truth[0].shape) - truth[0]).abs() <= error[0]).all()


def test_samples_lie_where_the_distribution_function_says(case: Case):
    batch, tokens, _ = case.x.shape
    lse = case.logits().logsumexp(1).view(batch, tokens).float()
    uniform = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    uniform.view(-1)[: len(uniform.view(-1)) // 4] = 0.0
    uniform.view(-1)[-1] = 1 - 2.0**-24
    codes = _call(case, forward.softmax_sample, lse, uniform).reshape(-1, 1)
    p, u = case.logits().softmax(1), uniform.double().reshape(-1, 1)
    above = p.cumsum(1).gather(1, codes)
    error = 2 * case.logit_error() + 2.0**-22
    assert (above + error > u).all()
    assert (above - p.gather(1, codes) <= u + error).all()
    assert (p.gather(1, codes) > 0).all()


def test_samples_follow_the_probabilities():
    """A thousand even steps through one token's distribution: the counts are the probabilities, to one each."""
    case = _case(1, 1, 100, 4, False, False, 0.7)
    many = replace(case, x=case.x.expand(1, 1000, 4))
    uniform = torch.arange(1000, device=DEVICE)[None] / 1000
    lse = many.logits().logsumexp(1).view(1, 1000).float()
    counts = torch.bincount(_call(many, forward.softmax_sample, lse, uniform)[0], minlength=100)
    assert ((counts - 1000 * case.logits()[0].softmax(0)).abs() <= 1.1).all()


@pytest.mark.parametrize("size", [9e3, 1e9])
@pytest.mark.usefixtures("_slots")
def test_large_logits_draw_no_code_of_probability_zero(size: float):
    """One code has all the probability, and lse the rounding of its size: 5e-4 at 9000, past any p at 1e9."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(1, 400, 40, generator=generator) + 0.5).to(DEVICE)
    codebook = torch.full((64, 40), 0.5, device=DEVICE)
    codebook[0] = 1.0
    case = Case(x, codebook, None, size / 40)
    lse, _ = _call(case, forward.softmax_forward)
    uniform = 1 - 2.0 ** -torch.arange(400, device=DEVICE).remainder(25)[None]  # 0, 1/2, 3/4 ... 1 - 2^-24
    assert not _call(case, forward.softmax_sample, lse, uniform).any()


@pytest.mark.parametrize(("value", "dim"), [(math.nan, 5), (math.inf, 5), (-math.inf, 70)])
@pytest.mark.usefixtures("_slots")
def test_a_token_that_is_not_finite_spoils_nothing_but_itself(value: float, dim: int):
    case = _case(1, 70, 70, dim, False, True, 3.0 / dim)
    broken = replace(case, x=case.x.clone())
    broken.x[0, 3, 2] = value
    rest = [t for t in range(70) if t != 3]
    lse, entropy = _call(broken, forward.softmax_forward)
    assert lse[0, 3].isnan()
    assert entropy[0, 3].isnan()
    assert lse[0, rest].isfinite().all()
    assert entropy[0, rest].isfinite().all()
    ones = torch.ones_like(lse)
    sums = _call(broken, forward.softmax_code_sums, lse, ones)
    without = replace(case, x=case.x[:, rest])
    torch.testing.assert_close(sums.double(), without.logits().softmax(1).sum(0), rtol=1e-4, atol=1e-6)
    direction = torch.full_like(case.x, value)
    direction[:, rest] = 1.0
    dx, dc, db = _call(broken, backward.softmax_backward, lse, ones, ones, ones, sums, direction, True)
    assert dx[0, 3].isnan().all()
    assert dx[0, rest].isfinite().all()
    truth, error = _gradients(without, *[ones[:, rest]] * 3, sums, direction[:, rest])
    assert ((dc - truth[1]).abs() <= error[1]).all()
    assert ((db - truth[2]).abs() <= error[2]).all()
    codes = _call(broken, forward.softmax_sample, lse, ones * 0.5)
    assert codes[0, 3] == -1
    assert (codes[0, rest] >= 0).all()


def _one_high(k: int, depth: float) -> tuple[Tensor, Tensor, Tensor]:
    """lse and entropy of one token whose last logit is 0 and whose others are -depth; and the true log p."""
    bias = torch.full((k,), -depth, device=DEVICE)
    bias[-1] = 0.0
    lse, entropy = forward.softmax_forward(bias.new_zeros(1, 1, 1), bias.new_zeros(k, 1), bias, 1.0)
    return lse, entropy, bias.double().log_softmax(0)


def test_one_code_with_all_the_weight_leaves_an_entropy():
    """exp(-25) beside 1 is below float32's rounding: 1 / 26 of the entropy would be lost with it."""
    _, entropy, log_p = _one_high(320, 25.0)
    assert entropy.item() == pytest.approx(-(log_p.exp() * log_p).sum().item(), rel=1e-2)


def test_many_small_probabilities_are_not_lost_one_by_one():
    """Hundreds of tiles of exp(-12) each after 1: plain float32 sums lose some 1e-6 of them."""
    lse, _, log_p = _one_high(12000, 12.0)
    assert lse.item() == pytest.approx(-log_p[-1].item(), abs=2.0**-22)


def test_no_tokens():
    case = _case(2, 0, 5, 3, False, False, 1.0)
    none = case.x[..., 0]
    lse, entropy = _call(case, forward.softmax_forward)
    assert lse.shape == entropy.shape == (2, 0)
    assert torch.equal(_call(case, forward.softmax_code_sums, lse, none), torch.zeros(5, device=DEVICE))
    dx, dc, db = _call(case, backward.softmax_backward, lse, none, none, none, None, None, True)
    assert dx.shape == case.x.shape
    assert not dc.any()
    assert not db.any()
    assert dc.shape == (5, 3)
    assert _call(case, forward.softmax_sample, lse, none).shape == (2, 0)


def test_what_it_cannot_take():
    x = torch.zeros(1, 2, 3, dtype=torch.float64, device=DEVICE)
    with backends.use_backend("triton"), pytest.raises(backends.BackendError, match="takes float32, not float64"):
        backends.select("softmax_forward", x, x[0], None, 1.0)
