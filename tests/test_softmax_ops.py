"""Soft assignment, entropy loss, cross-entropy: their formulas, on every backend."""

from __future__ import annotations

import pytest
import torch
from quantizers import randn
from softmax_data import D, K, N, T, assert_near, data, every_metric, float32_error, wide
from softmax_formulas import clamped_entropy, entropy, llamagen_loss, logits
from torch import Tensor
from torch.nn import functional as F

import vqkernels as vq

# ---- soft assignment ----


@every_metric
def test_values_and_gradients_are_the_formulas(backend, metric: str):
    _, device = backend
    x, codebook = data(device=device)
    weight = torch.rand(N, generator=torch.Generator().manual_seed(3))
    out = vq.soft_assignment(x, codebook, metric=metric, temperature=T, weight=weight.to(device))
    x64, codebook64 = wide(x, codebook)
    truth_logits = logits(x64, codebook64, metric, T)
    p = truth_logits.softmax(1)
    truth = truth_logits.logsumexp(1), entropy(p), weight.double() @ p
    error = float32_error(x64, codebook64, metric, T)
    for mine, true in zip(out, truth, strict=True):
        assert mine.dtype == torch.float32
        assert_near(mine, true, error)
    weights = [randn(*value.shape, seed=4 + i) for i, value in enumerate(truth)]
    for i in range(3):  # each output alone, so that none hides behind a larger one
        mine = torch.autograd.grad((out[i] * weights[i].to(device)).sum(), (x, codebook), retain_graph=True)
        true = torch.autograd.grad((truth[i] * weights[i].double()).sum(), (x64, codebook64), retain_graph=True)
        for a, b in zip(mine, true, strict=True):
            assert_near(a, b, 4 * error)


@every_metric
@pytest.mark.parametrize("name", ["reference", "compiled"])
def test_gradients_by_finite_differences(name: str, metric: str):
    if reason := _cannot(name, torch.float64):
        pytest.skip(reason)
    x, codebook = data(torch.float64, n=6, k=7, d=3)
    weight = torch.rand(6, dtype=torch.float64)
    codes = torch.tensor([0, -1, 6, 2, 2, 5])
    options = {"metric": metric, "temperature": T}

    def everything(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        return (
            *vq.soft_assignment(x, codebook, weight=weight, **options),
            *vq.entropy_loss(x, codebook, weight=weight, token_weight=0.3, batch_weight=0.6, **options),
            vq.code_cross_entropy(x, codebook, codes, **options),
        )

    with vq.use_backend(name):
        assert torch.autograd.gradcheck(everything, (x, codebook), fast_mode=True)


def _cannot(name: str, dtype: torch.dtype) -> str | None:
    """None where the backend runs all four kernels in ``dtype``."""
    from vqkernels.backends import candidates

    x, codebook = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    reasons = {c.backend: c.reason for c in candidates("softmax_forward", x, codebook, None, 1.0)}
    return reasons[name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(backend, dtype: torch.dtype):
    name, device = backend
    if name == "triton" and dtype == torch.float64 and (reason := _cannot(name, dtype)):
        pytest.skip(reason)
    x, codebook = data(dtype, device)
    out = vq.entropy_loss(x, codebook, temperature=2.0)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x64, codebook64 = wide(x, codebook)
    p = logits(x64, codebook64, "euclidean", 2.0).softmax(1)
    truth = entropy(p).mean() - entropy(p.mean(0))
    assert_near(out.loss, truth, 1e-12 if dtype == torch.float64 else 1e-4)
    out.loss.backward()
    truth.backward()
    tolerance = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    for mine, true in ((x, x64), (codebook, codebook64)):
        assert mine.grad.dtype == dtype
        assert_near(mine.grad, true.grad, tolerance)


def test_half_tokens_over_a_float32_codebook():
    x, codebook = data()
    half = x.detach().bfloat16()
    mixed = vq.soft_assignment(half, codebook)
    assert torch.equal(mixed.entropy, vq.soft_assignment(half.float(), codebook).entropy)


def test_any_layout(backend):
    """A channels-first map read in place gives what its copy gives, and its gradient has its strides."""
    _, device = backend
    image = randn(2, D, 4, 5).to(device)  # [B, D, H, W]
    _, codebook = data(device=device)
    grads, outs = [], []
    for x in (image.permute(0, 2, 3, 1), image.permute(0, 2, 3, 1).contiguous()):
        x = x.detach().requires_grad_()
        out = vq.soft_assignment(x, codebook)
        assert out.lse.shape == out.entropy.shape == (2, 4, 5)
        (out.entropy.sum() + out.code_sums.square().sum()).backward()
        outs.append(out)
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


@every_metric
def test_no_tokens_and_one_token(backend, metric: str):
    _, device = backend
    x, codebook = data(device=device)
    out = vq.soft_assignment(x[:0], codebook, metric=metric)
    assert out.lse.shape == (0,)
    assert torch.equal(out.code_sums.cpu(), torch.zeros(K))
    loss = vq.entropy_loss(x[:0], codebook, metric=metric)
    assert loss.loss == loss.token_entropy == loss.batch_entropy == 0
    loss.loss.backward()
    one = vq.soft_assignment(x[0], codebook, metric=metric)
    assert one.lse.shape == ()
    torch.testing.assert_close(one.code_sums.sum().cpu(), torch.tensor(1.0))


@every_metric
def test_padding_may_hold_anything_and_bad_tokens_hurt_no_other(backend, metric: str):
    _, device = backend
    x, codebook = data(device=device)
    keep = torch.ones(N, dtype=torch.bool)
    keep[[0, 9, 44]] = False
    spoiled = torch.where(keep[:, None].to(device), x.detach(), torch.nan).requires_grad_()
    clean = x.detach()[keep.to(device)].requires_grad_()
    for use in ("mask", "weight"):
        weight = keep.to(device) if use == "mask" else keep.to(device).float()
        masked = vq.entropy_loss(spoiled, codebook, metric=metric, temperature=T, weight=weight)
        dx, dcodebook = torch.autograd.grad(masked.loss, (spoiled, codebook))
        alone = vq.entropy_loss(clean, codebook, metric=metric, temperature=T)
        true_dx, true_dcodebook = torch.autograd.grad(alone.loss, (clean, codebook))
        error = float32_error(x, codebook, metric, T)
        pairs = ((masked.loss, alone.loss), (dx[keep.to(device)], true_dx), (dcodebook, true_dcodebook))
        for mine, true in pairs:
            assert_near(mine, true.detach().cpu().double(), error)
        assert (dx[~keep.to(device)] == 0).all()
    bad = vq.soft_assignment(spoiled, codebook, metric=metric, temperature=T)  # not masked: NaN there, nowhere else
    assert bad.lse.isnan().tolist() == bad.entropy.isnan().tolist() == (~keep).tolist()
    torch.testing.assert_close(bad.code_sums, vq.soft_assignment(clean, codebook, metric=metric, temperature=T)[2])
    loss = vq.entropy_loss(spoiled, codebook, metric=metric, temperature=T)
    assert loss.token_entropy.isnan()
    torch.testing.assert_close(loss.batch_entropy, alone.batch_entropy)


def test_sharp_and_flat_extremes_stay_finite(backend):
    """Probabilities that underflow, and codes that nobody comes near."""
    _, device = backend
    x, codebook = data(device=device)
    for temperature in (1e-6, 1e6):
        loss = vq.entropy_loss(x, codebook, temperature=temperature)
        dx, dcodebook = torch.autograd.grad(loss.loss, (x, codebook))
        assert dx.isfinite().all()
        assert dcodebook.isfinite().all()
    assert loss.token_entropy.item() == pytest.approx(torch.tensor(float(K)).log().item(), rel=1e-5)  # all alike


def test_an_offset_does_not_cost_the_euclidean_entropy_its_digits(backend):
    """-|x - c|^2 as 2 x c - |c|^2 at 1000 sigma: 1e-2 off in float32; around the mean code a hundredth of it."""
    _, device = backend
    x, codebook = (t.detach() + 1000 for t in data(device=device))
    mine = vq.soft_assignment(x, codebook, temperature=T).entropy
    x64, codebook64 = wide(x, codebook)
    truth = entropy(logits(x64, codebook64, "euclidean", T).softmax(1))
    lengths = (x64 - codebook64.mean(0)).norm(dim=1).max() * codebook64.norm(dim=1).max()
    assert_near(mine, truth, 2 * (D + 6) * 2.0**-24 * lengths.item() / T)


@pytest.mark.parametrize("size", [(700, 50, 6), (30, 3000, 5)])
def test_bitwise_the_same_on_every_run_and_thread_count(backend, size: tuple[int, int, int]):
    name, device = backend
    n, k = (part // 4 if name == "triton" else part for part in size[:2])
    x, codebook = data(device=device, n=n, k=k, d=size[2])
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out = vq.soft_assignment(x, codebook, temperature=T)
        loss = out.entropy.square().sum() + out.code_sums.square().sum() + out.lse.sum()
        results.append([*out, *torch.autograd.grad(loss, (x, codebook))])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- the field's entropy losses ----


def test_llamagen(backend):
    _, device = backend
    x, codebook = (F.normalize(t.detach(), dim=1) for t in data(device=device))
    mine = vq.entropy_loss(x, codebook, temperature=0.01, eps=1e-5)
    x64, codebook64 = wide(x, codebook)
    distance = (x64[:, None] - codebook64).square().sum(-1)
    assert_near(mine.loss, llamagen_loss(-distance), float32_error(x64, codebook64, "dot", 0.005))


def test_ibq(backend):
    _, device = backend
    x, codebook = data(device=device)
    mine = vq.entropy_loss(x, codebook, metric="dot", temperature=0.3, eps=1e-5, token_weight=0.5, batch_weight=2.0)
    x64, codebook64 = wide(x, codebook)
    p = (x64 @ codebook64.T / 0.3).softmax(1)
    mean = p.mean(0)
    truth = 0.5 * entropy(p).mean() - 2.0 * -(mean * (mean + 1e-5).log()).sum()
    assert_near(mine.loss, truth, float32_error(x64, codebook64, "dot", 0.3))


def test_codebook_diversity_of_a_cosine_codebook(backend):
    _, device = backend
    x, codebook = data(device=device)
    mine = vq.entropy_loss(x, codebook, metric="cosine", temperature=1 / 100, token_weight=0.0)
    x64, codebook64 = wide(x, codebook)
    p = (F.normalize(x64, dim=1) @ F.normalize(codebook64, dim=1).T * 100).softmax(1)
    least = p.mean(0).min().item()
    assert least > 0
    truth = -clamped_entropy(p.mean(0), min(least, 1e-5))  # theirs where no code's probability is below its clamp
    assert_near(mine.loss, truth, float32_error(x64, codebook64, "cosine", 0.01))


def test_without_batch_weight_there_is_no_batch_entropy():
    x, codebook = data()
    out = vq.entropy_loss(x, codebook, batch_weight=0.0)
    assert out.batch_entropy == 0
    assert out.loss == out.token_entropy


# ---- cross-entropy ----


@every_metric
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_is_torchs(backend, metric: str, reduction: str):
    _, device = backend
    x, codebook = data(device=device)
    codes = torch.randint(-1, K, (N,), generator=torch.Generator().manual_seed(5))
    codes[:8] = torch.tensor([-1, 3, 3, 3, K - 1, 0, -1, 3])  # a code that several tokens share
    mine = vq.code_cross_entropy(x, codebook, codes.to(device), metric=metric, temperature=T, reduction=reduction)
    x64, codebook64 = wide(x, codebook)
    truth = F.cross_entropy(logits(x64, codebook64, metric, T), codes, ignore_index=-1, reduction=reduction)
    error = float32_error(x64, codebook64, metric, T)
    assert_near(mine, truth, error)
    g = randn(1, *mine.shape, seed=6)[0]
    grads = torch.autograd.grad((mine * g.to(device)).sum(), (x, codebook))
    true_grads = torch.autograd.grad((truth * g.double()).sum(), (x64, codebook64))
    for a, b in zip(grads, true_grads, strict=True):
        assert_near(a, b, 4 * error)


def test_cross_entropy_without_targets_and_with_bad_tokens(backend):
    _, device = backend
    x, codebook = data(device=device)
    none = vq.code_cross_entropy(x, codebook, torch.full((N,), -1, device=device))
    none.backward()
    assert none == 0
    assert not x.grad.any()
    assert not codebook.grad.any()
    spoiled = x.detach().clone()
    spoiled[3] = torch.inf
    codes = torch.zeros(N, dtype=torch.int64, device=device)
    assert vq.code_cross_entropy(spoiled, codebook, codes, reduction="none").isnan().nonzero().tolist() == [[3]]
    codes[3] = -1
    loss = vq.code_cross_entropy(spoiled, codebook, codes)
    assert torch.autograd.grad(loss, codebook)[0].isfinite().all()


def test_a_certain_code_costs_nothing(backend):
    """-log p where lse and the logit are equal but for rounding: never below 0."""
    _, device = backend
    _, codebook = data(device=device)
    codes = torch.arange(K, device=device)
    loss = vq.code_cross_entropy(codebook.detach(), codebook.detach(), codes, temperature=1e-3, reduction="none")
    assert (loss >= 0).all()
    assert loss.max() < 1e-2


def test_the_raw_ops_pass_opcheck():
    x, codebook, bias = randn(1, 6, 3), randn(7, 3, seed=1), randn(7, seed=2)
    logits = (x, codebook, bias, 0.5)
    ops = torch.ops.vqkernels
    with vq.use_backend("reference"):
        lse, _ = ops.softmax_forward(*logits)
        some = [randn(1, 6, seed=3 + i) for i in range(3)]
        calls = [
            (ops.softmax_forward, logits),
            (ops.softmax_code_sums, (*logits, lse, some[0].abs())),
            (ops.softmax_backward, (*logits, lse, *some, randn(7), randn(1, 6, 3), True)),
            (ops.softmax_backward, (x, codebook, None, 0.5, lse, *some, None, None, False)),
            (ops.softmax_sample, (*logits, lse, torch.rand(1, 6))),
            (ops.softmax_bias, (codebook, codebook.mean(0), 0.5)),
            (ops.softmax_choose, (x, codebook, "dot")),
            (ops.sign_code_sums, (randn(6, 1, 3), torch.rand(6))),
            (ops.sign_code_sums_backward, (randn(6, 1, 3), torch.rand(6), randn(1, 8))),
        ]
        for op, args in calls:
            tests = ("test_schema", "test_faketensor", "test_autograd_registration")
            torch.library.opcheck(op.default, args, test_utils=tests)


# ---- errors ----

BAD = {
    "metric": (lambda x, c: vq.soft_assignment(x, c, metric="l1"), "metric: expected one of"),
    "temperature": (lambda x, c: vq.soft_assignment(x, c, temperature=0.0), "temperature: expected a positive"),
    "temperature nan": (lambda x, c: vq.sample_codes(x, c, temperature=float("nan")), "temperature: expected"),
    "weight shape": (lambda x, c: vq.entropy_loss(x, c, weight=torch.ones(3)), r"weight: expected bool or float \[5\]"),
    "weight dtype": (
        lambda x, c: vq.entropy_loss(x, c, weight=torch.ones(5, dtype=torch.int64)),
        "weight: expected bool or float",
    ),
    "weight negative": (
        lambda x, c: vq.entropy_loss(x, c, weight=torch.tensor([1, 0, -0.5, 2, 1])),
        "weight: expected >= 0, got -0.5",
    ),
    "weight negative, signs": (
        lambda x, c: vq.sign_entropy_loss(x, weight=torch.tensor([1, 0, -0.5, 2, 1])),
        "weight: expected >= 0, got -0.5",
    ),
    "eps": (lambda x, c: vq.entropy_loss(x, c, eps=-1.0), "eps: expected >= 0"),
    "token_weight": (lambda x, c: vq.entropy_loss(x, c, token_weight=-1.0), "token_weight: expected >= 0"),
    "mask": (lambda x, c: vq.index_propagation(x, c, mask=torch.ones(5)), "mask: expected bool"),
    "codes dtype": (
        lambda x, c: vq.code_cross_entropy(x, c, torch.zeros(5, dtype=torch.int32)),
        "codes: expected int64",
    ),
    "codes shape": (
        lambda x, c: vq.code_cross_entropy(x, c, torch.zeros(4, dtype=torch.int64)),
        r"codes: expected \[5\]",
    ),
    "codes range": (lambda x, c: vq.code_cross_entropy(x, c, torch.full((5,), 6)), r"codes: expected in \[-1, 6\)"),
    "reduction": (
        lambda x, c: vq.code_cross_entropy(x, c, torch.zeros(5, dtype=torch.int64), reduction="median"),
        "reduction: expected one of",
    ),
    "x": (lambda x, c: vq.soft_assignment(x[:, :3], c), r"x: expected \[..., 4\]"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        call(torch.randn(5, 4), torch.randn(6, 4))


def test_a_negative_weight_in_a_compiled_graph_makes_the_loss_nan():
    x, codebook, weight = randn(5, 4), randn(6, 4, seed=1), torch.tensor([1, 0, -0.5, 2, 1])
    for loss in (lambda w: vq.entropy_loss(x, codebook, weight=w), lambda w: vq.sign_entropy_loss(x, weight=w)):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert compiled(weight).loss.isnan()
        torch.testing.assert_close(compiled(weight.abs()).loss, loss(weight.abs()).loss)


def test_a_product_that_is_nan_does_not_hide_the_largest():
    huge = torch.finfo(torch.float32).max
    x, codebook = torch.tensor([[4.0, 4.0]]), torch.tensor([[1.0, 0], [huge, -huge], [2.0, 0]])
    assert vq.index_propagation(x, codebook).codes.item() == 2


def test_one_channel_does_not_depend_on_the_threads_either():
    x, codebook = data(n=2, k=200_000, d=1)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(vq.soft_assignment(x, codebook, temperature=T))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
