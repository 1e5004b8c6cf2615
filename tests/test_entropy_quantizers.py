"""LookupFreeQuantizer and IndexPropagationQuantizer as their user sees them."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from host_waits import no_host_waits
from quantizers import assert_same_state, randn, state
from requirements import skip_or_fail
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import vqkernels as vq
from vqkernels import _extension
from vqkernels.nn import EntropyOptions, IndexPropagationQuantizer, LookupFreeQuantizer

K = 32
FORMS = {
    "lfq": (LookupFreeQuantizer, {}),
    "bsq": (LookupFreeQuantizer, {"spherical": True, "group_size": 2}),
    "lfq-projected": (LookupFreeQuantizer, {"codebook_dim": 5}),
    "ibq": (IndexPropagationQuantizer, {"codebook_size": K}),
    "ibq-entropy": (IndexPropagationQuantizer, {"codebook_size": K, "entropy": EntropyOptions(temperature=0.5)}),
    "ibq-cosine": (IndexPropagationQuantizer, {"codebook_size": K, "metric": "cosine", "temperature": 0.1}),
    "ibq-projected": (IndexPropagationQuantizer, {"codebook_size": K, "codebook_dim": 5, "metric": "euclidean"}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def make(form: str, dim: int = 6, **options) -> nn.Module:
    torch.manual_seed(0)
    kind, own = FORMS[form]
    return kind(dim, **{**own, **options})


def step(module: nn.Module, x: Tensor, mask: Tensor | None = None):
    x = x.clone().requires_grad_()
    out = module(x, mask)
    (out.quantized.square().sum() + out.loss).backward()
    return out, x.grad


@every_form
@pytest.mark.parametrize("channels", ["last", "first"])
def test_shapes_types_and_round_trip_through_codes(form: str, channels: str):
    module = make(form, channels=channels).eval()
    x = randn(2, 6, 3, 5) if channels == "first" else randn(2, 3, 5, 6)
    out = module(x)
    quantized, codes, loss = out
    assert quantized.shape == x.shape
    assert codes.shape == (2, 3, 5)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < module.codebook_size
    assert loss.shape == ()
    assert out.entropy_loss == out.token_entropy == 0  # eval
    tolerance = {} if "projected" in form else {"rtol": 0, "atol": 0}  # rows come through bit for bit
    torch.testing.assert_close(module.lookup(codes), quantized, **tolerance)


@every_form
def test_encode_gives_forwards_codes_and_touches_nothing(form: str):
    module, x = make(form), randn(2, 7, 6)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(0)) > 0.3
    x[0, 3, 2] = torch.nan
    before = {name: values.clone() for name, values in module.state_dict().items()}
    codes = module.encode(x, mask)
    assert all(torch.equal(values, before[name]) for name, values in module.state_dict().items())
    assert torch.equal(codes, module(x, mask).codes)
    assert (codes == -1).any()


@every_form
def test_channels_first_equals_channels_last(form: str):
    first, last = make(form, channels="first"), make(form)
    x = randn(2, 6, 3, 5)
    (a, dx), (b, dx_last) = step(first, x), step(last, x.movedim(1, -1))
    assert torch.equal(a.codes, b.codes)
    assert a.quantized.stride() == x.stride() or "projected" in form
    torch.testing.assert_close(a.quantized, b.quantized.movedim(-1, 1))
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(dx, dx_last.movedim(-1, 1))


@every_form
def test_masked_tokens_take_no_part(form: str):
    module = make(form)
    x = randn(40, 6)
    keep = torch.ones(40, dtype=torch.bool)
    keep[[0, 3, 39]] = False
    spoiled = torch.where(keep[:, None], x, torch.nan)
    twin = copy.deepcopy(module)
    out, dx = step(module, spoiled, keep)
    alone, true_dx = step(twin, x[keep])
    assert (out.codes[~keep] == -1).all()
    assert not out.quantized[~keep].any()
    assert not dx[~keep].any()
    torch.testing.assert_close(dx[keep], true_dx)
    for name in ("loss", "commitment_loss", "entropy_loss", "token_entropy", "batch_entropy", "perplexity", "usage"):
        torch.testing.assert_close(getattr(out, name), getattr(alone, name), msg=name)
    assert out.non_finite == 0
    for (name, mine), true in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, true.grad, msg=name)
    assert_same_state(module, twin)


@every_form
def test_a_bad_token_is_counted_and_left_out_of_the_statistics(form: str):
    module = make(form)
    x = randn(40, 6)
    x[5, 2] = torch.inf
    out = module(x)
    assert out.codes[5] == -1
    assert out.non_finite == 1
    assert out.quantized[5].isnan().all()
    assert out.loss.isnan()
    counted = module.window_counts.sum().item()
    groups = 3 if form == "bsq" else 1
    assert counted == 39 * groups


@every_form
def test_nothing_and_everything_masked(form: str):
    module = make(form)
    for x, mask in ((randn(0, 6), None), (randn(7, 6), torch.zeros(7, dtype=torch.bool))):
        out, dx = step(module, x, mask)
        assert out.loss == 0
        assert not dx.any()


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_of_x(form: str, dtype: torch.dtype):
    module = make(form)
    if dtype == torch.float64:
        module.double()
    x = randn(30, 6).to(dtype)
    out, dx = step(module, x)
    assert out.quantized.dtype == dx.dtype == dtype
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype != torch.float64:
        assert torch.equal(out.codes, make(form)(x.float()).codes)


@every_form
def test_a_saved_module_goes_on_where_it_was(form: str):
    module = make(form)
    step(module, randn(40, 6))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    again = make(form)
    again.load_state_dict(torch.load(file))
    assert_same_state(module, again)
    step(module, randn(40, 6, seed=1))
    step(again, randn(40, 6, seed=1))
    assert_same_state(module, again)


# ---- what is theirs alone ----


def test_lfq_is_the_sign_with_a_straight_through_gradient():
    module = make("lfq", commitment_weight=0.5, entropy=EntropyOptions(weight=0.2, temperature=0.7))
    x = randn(50, 6).requires_grad_()
    out = module(x)
    assert torch.equal(out.quantized, torch.where(x > 0, 1.0, -1.0))
    assert torch.equal(torch.autograd.grad(out.quantized.sum(), x, retain_graph=True)[0], torch.ones_like(x))
    entropies = vq.sign_entropy_loss(x, temperature=0.7)
    expected = 0.5 * (x - out.quantized.detach()).square().mean() + 0.2 * entropies.loss
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, x)[0], torch.autograd.grad(expected, x)[0])


def test_bsq_lies_on_the_sphere_and_knows_more_codes_than_memory_holds():
    module = LookupFreeQuantizer(36, spherical=True, group_size=9)
    assert module.codebook_size == 2**36
    assert module.window_counts.shape == (4 * 512,)
    out, dx = step(module, randn(20, 36))
    torch.testing.assert_close(out.quantized.norm(dim=1), torch.ones(20))
    assert dx.isfinite().all()
    assert torch.equal(module.lookup(out.codes), out.quantized)
    assert 1 <= out.perplexity <= 20  # the mean over groups, each of 20 codes at most
    assert out.usage <= 4 * 20 / (4 * 512)


def test_usage_and_perplexity_of_lfq():
    module = make("lfq").eval()
    x = vq.sign_rows(torch.arange(16), 6)
    out = module(x)
    assert out.usage == 16 / 64
    torch.testing.assert_close(out.perplexity, torch.tensor(16.0))
    module.train()
    module(x)
    assert module(x[:1]).usage == 16 / 64  # over the window


def test_ibq_loss_and_gradients_are_the_papers():
    module = make("ibq", entropy=EntropyOptions(weight=0.3, temperature=0.4, eps=1e-5)).double()
    x = randn(50, 6).double().requires_grad_()
    out = module(x)
    codebook = module.codebook.detach().clone().requires_grad_()
    z = x.detach().clone().requires_grad_()
    logits = z @ codebook.T
    soft, hard = logits.softmax(1), F.one_hot(logits.argmax(1), K).double()
    through, chosen = (hard - soft.detach() + soft) @ codebook, hard @ codebook
    loss = (through - z).square().mean() + (chosen.detach() - z).square().mean()
    loss = loss + 0.25 * (chosen - z.detach()).square().mean()
    p = (logits / 0.4).softmax(1)
    loss = loss + 0.3 * (torch.special.entr(p).sum(1).mean() + (p.mean(0) * (p.mean(0) + 1e-5).log()).sum())
    torch.testing.assert_close(out.loss, loss)
    g = randn(50, 6, seed=9).double()
    mine = torch.autograd.grad(out.loss + (out.quantized * g).sum(), (x, module.codebook))
    true = torch.autograd.grad(loss + (through * g).sum(), (z, codebook))
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b)


def test_every_code_of_ibq_learns_from_every_token():
    module = make("ibq")
    step(module, randn(3, 6))
    assert (module.codebook.grad.abs().sum(1) > 0).all()


def test_ibq_codebook_starts_from_tokens():
    module = make("ibq", metric="euclidean")
    tokens = randn(500, 6) + 5
    module.init_codebook(tokens)
    assert (vq.nearest(tokens, module.codebook.detach())[1].mean() < 3).item()
    assert (module.codebook.mean() - 5).abs() < 0.5


def test_half_keeps_the_codebook_of_ibq_wide():
    module = make("ibq").half()
    assert module.codebook.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = step(module, randn(20, 6).bfloat16())
    assert out.loss.dtype == torch.float32


def _everything(x: Tensor, codebook: Tensor, codes: Tensor | None) -> Tensor:
    """All the functions, but for cross-entropy and lookup without codes: on the CPU they look at them."""
    total = vq.soft_assignment(x, codebook).code_sums.square().sum()
    total = total + vq.entropy_loss(x, codebook, metric="cosine", temperature=0.5).loss
    total = total + vq.index_propagation(x, codebook).quantized.square().sum()
    total = total + vq.sign_entropy_loss(x, temperature=0.5, group_size=3).loss
    total = total + vq.sign_rows(vq.sign_codes(x), 6).sum()
    drawn = vq.sample_codes(x, codebook, seed=x.detach().sum().long(), step=3)
    if codes is None:
        return total + drawn.sum()
    return total + vq.code_cross_entropy(x, codebook, codes, metric="dot") + vq.lookup(drawn, codebook).sum()


# ---- no host wait ----


@pytest.mark.parametrize("device", ["cpu", "meta"])
@every_form
def test_no_training_step_waits_for_the_device(form: str, device: str):
    if reason := _extension.cpu_library():  # the reference search is for the CPU, and looks at its candidates
        skip_or_fail("compiled", reason)
    module = make(form, channels="first").to(device)
    x, mask = randn(2, 6, 3, 5).to(device), (randn(2, 3, 5) > -1).to(device)
    with no_host_waits(device):
        step(module, x)
        step(module, x, mask)
        module.eval()(x)


def test_nor_do_the_functions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        sys.modules["vqkernels.ops.sign_codes"], "check_range", lambda *_: None
    )  # looks at tensors on the CPU alone
    x, codebook = randn(20, 6).requires_grad_(), randn(9, 6, seed=1).requires_grad_()
    with no_host_waits():
        _everything(x, codebook, None).backward()


# ---- torch.export, torch.compile ----


@pytest.mark.parametrize("form", ["lfq", "ibq-cosine"])
def test_an_exported_module_survives_saving(form: str):
    module, file = make(form).eval(), io.BytesIO()
    torch.export.save(torch.export.export(module, (randn(3, 5, 6),), dynamic_shapes=({0: Dim.DYNAMIC},)), file)
    file.seek(0)
    x = randn(7, 5, 6)
    for got, expected in zip(vars(torch.export.load(file).module()(x)).values(), vars(module(x)).values(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", ["lfq-projected", "bsq", "ibq-entropy"])
def test_training_and_eval_are_one_graph_and_equal_eager(form: str):
    torch._dynamo.reset()
    eager = make(form, channels="first")
    module = copy.deepcopy(eager)
    fast = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x, mask = randn(2, 6, 3, 5, seed=seed), randn(2, 3, 5) > -1
        (out, dx), (expected, true_dx) = step(fast, x, mask), step(eager, x, mask)
        assert torch.equal(out.codes, expected.codes)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(dx, true_dx)
    for name, value in state(module).items():
        torch.testing.assert_close(value, state(eager)[name], msg=name)
    with torch.no_grad():
        out = fast.eval()(x)
    assert torch.equal(out.codes, eager.eval()(x).codes)


def test_the_functional_ops_are_one_graph():
    torch._dynamo.reset()
    x, codebook = randn(20, 6).requires_grad_(), randn(9, 6, seed=1).requires_grad_()
    codes = torch.randint(-1, 9, (20,))
    fast = torch.compile(_everything, fullgraph=True, backend="aot_eager")
    mine, true = fast(x, codebook, codes), _everything(x, codebook, codes)
    torch.testing.assert_close(mine, true)
    for a, b in zip(*(torch.autograd.grad(v, (x, codebook)) for v in (mine, true)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim: expected an integer >= 1"),
        ({"dim": 63}, "codebook_dim: expected at most 62"),
        ({"dim": 30}, "group_size: expected at most 24, got 30"),
        ({"dim": 6, "group_size": 4}, "group_size: expected a divisor"),
        ({"dim": 6, "channels": "middle"}, "channels: expected one of"),
        ({"dim": 6, "commitment_weight": -1.0}, "commitment_weight: expected >= 0"),
        ({"dim": 6, "code_scale": 0.0}, "code_scale: expected > 0"),
    ],
)
def test_bad_options_of_lookup_free_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LookupFreeQuantizer(**options)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="metric: expected one of"):
        IndexPropagationQuantizer(6, 8, metric="l1")
    with pytest.raises(ValueError, match="temperature: expected a positive"):
        EntropyOptions(temperature=0.0)
    with pytest.raises(ValueError, match="propagation_weight: expected >= 0"):
        IndexPropagationQuantizer(6, 8, propagation_weight=-1.0)
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 6\]"):
        make("lfq")(randn(3, 5))
    with pytest.raises(TypeError, match="codes: expected a tensor of integers"):
        make("lfq").lookup(randn(3))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16])
def test_counts_of_lookup_free_stay_wide(cast):
    module = cast(LookupFreeQuantizer(4, codebook_dim=2))
    assert module.window_counts.dtype == torch.float32
    assert module.project_in.weight.dtype != torch.float32
    assert module.double().window_counts.dtype == torch.float64


def test_grouped_perplexity_is_the_mean_over_groups():
    module = LookupFreeQuantizer(4, group_size=2).eval()
    two = torch.tensor([[1.0, 1, -1, -1], [1, 1, 1, 1]])  # one code in the first group, two in the second
    torch.testing.assert_close(module(two).perplexity, torch.tensor(1.5))
    assert module(two[:0]).perplexity == 1


def test_lookup_free_refuses_codes_that_it_has_not():
    module = LookupFreeQuantizer(3)
    assert torch.equal(module.lookup(torch.tensor([5], dtype=torch.int16)), torch.tensor([[1.0, -1, 1]]))
    for code in (-1, 8):
        with pytest.raises(IndexError, match=r"codes: expected in \[0, 8\)"):
            module.lookup(torch.tensor([code]))


@pytest.mark.parametrize("channels", ["last", "first"])
def test_encode_gives_the_codes_of_forward_and_changes_nothing(channels: str):
    module = LookupFreeQuantizer(4, codebook_dim=3, channels=channels)
    x = torch.randn((2, 5, 4) if channels == "last" else (2, 4, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(10).view(2, 5) % 3 > 0
    before = {name: value.clone() for name, value in module.state_dict().items()}
    codes = module.encode(x, mask)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(codes, module(x, mask).codes)
    assert (codes[~mask] == -1).all()
