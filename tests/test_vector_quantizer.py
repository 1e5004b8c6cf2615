"""VectorQuantizer as its user sees it: layouts, losses, masks, precision, saving, errors."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from quantizers import assert_same_state, every_option, make, randn, state, train_step
from torch import Tensor, nn

import vqkernels as vq
from vqkernels.nn import VectorQuantizer

# ---- what comes out ----


@every_option
@pytest.mark.parametrize("channels", ["last", "first"])
def test_shapes_types_and_round_trip_through_codes(options: dict, channels: str):
    module = make(channels=channels, **options)
    x = randn(2, 8, 5, 6) if channels == "first" else randn(2, 5, 6, 8)
    module(x)
    module.eval()
    out = module(x)
    quantized, codes, loss = out
    assert quantized.shape == x.shape
    assert quantized.dtype == x.dtype
    assert codes.shape == (2, 5, 6)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert out.non_finite == 0
    tolerance = {} if "codebook_dim" in options else {"rtol": 0, "atol": 0}  # code rows come through bit for bit
    torch.testing.assert_close(module.lookup(codes), quantized, **tolerance)


def test_channels_first_equals_channels_last_on_the_permuted_tensor():
    first, last = make(channels="first"), make()
    x = randn(2, 8, 5, 6)
    a, b = first(x), last(x.movedim(1, -1))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.quantized, b.quantized.movedim(-1, 1))
    assert torch.equal(a.loss, b.loss)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_map_is_not_copied_and_keeps_its_strides(memory_format: torch.memory_format):
    module = make(channels="first")
    x = randn(2, 8, 5, 6).to(memory_format=memory_format)
    tokens, _ = module._tokens(x, None)
    assert tokens.data_ptr() == x.data_ptr()
    assert tokens.shape == (2, 30, 8)
    assert module(x).quantized.stride() == x.stride()


@pytest.mark.parametrize("shape", [(7, 8), (2, 7, 8), (2, 1, 3, 4, 8), (0, 8), (2, 0, 8)])
def test_any_leading_dimensions(shape: tuple[int, ...]):
    module = make()
    out = module(randn(*shape))
    assert out.quantized.shape == shape
    assert out.codes.shape == shape[:-1]
    assert torch.isfinite(out.loss)


@every_option
def test_encode_gives_forwards_codes_and_touches_nothing(options: dict):
    module = make(**options)
    module(randn(3, 20, 8))
    x, mask = randn(3, 20, 8, seed=1), randn(3, 20, seed=2) > 0
    x[1, 4] = float("nan")
    before = copy.deepcopy(module)
    codes = module.encode(x, mask)  # in training mode, with statistics pending
    assert_same_state(module, before)
    tokens, metric = module._tokens(x, mask)[0], module.options.metric
    assert torch.equal(codes, vq.quantize(tokens, module._rows(), mask=mask, metric=metric).codes)
    module.eval()
    assert torch.equal(module.encode(x, mask), module(x, mask).codes)


def test_three_spatial_dimensions_channels_first():
    out = make(channels="first")(randn(2, 8, 3, 4, 5))
    assert out.quantized.shape == (2, 8, 3, 4, 5)
    assert out.codes.shape == (2, 3, 4, 5)


def test_codes_are_the_nearest_and_cosine_codes_have_length_one():
    x = randn(50, 8)
    module = make().eval()
    assert torch.equal(module(x).codes, vq.nearest(x, module.codebook)[0])
    for update in ("ema", "gradient"):
        cosine = make(metric="cosine", update=update)
        for seed in range(5):
            cosine(randn(50, 8, seed=seed) * 100)
        cosine.eval()
        out = cosine(x)
        torch.testing.assert_close(out.quantized.norm(dim=-1), torch.ones(50))
        assert torch.equal(out.codes, vq.nearest(x, cosine.codebook, metric="cosine")[0])
        assert torch.equal(out.codes, cosine(x * 1e30).codes)
        assert torch.equal(out.codes, cosine(x * 1e-30).codes)


def test_output_unpacks_into_three_and_is_a_pytree():
    out = make()(randn(4, 8))
    assert len(list(out)) == 3
    doubled = torch.utils._pytree.tree_map(lambda t: t * 2, out)
    assert torch.equal(doubled.perplexity, out.perplexity * 2)


# ---- losses and gradients ----


def test_beta_is_on_the_commitment_term():
    x = randn(20, 8).requires_grad_()
    module = make(commitment_weight=0.3)
    _, codes, loss = module(x)
    expected = (x - module.codebook[codes]).square().mean()
    torch.testing.assert_close(loss, 0.3 * expected)
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, 0.3 * 2 * (x - module.codebook[codes]) / x.numel())


def test_gradient_codebook_gets_the_mirror_image():
    x = randn(20, 8).requires_grad_()
    module = make(update="gradient", commitment_weight=0.3, codebook_weight=0.7)
    out = module(x)
    rows = module.codebook[out.codes]
    torch.testing.assert_close(out.loss, 1.0 * (x.detach() - rows.detach()).square().mean())
    dx, dcodebook = torch.autograd.grad(out.loss, [x, module.codebook])
    torch.testing.assert_close(dx, 0.3 * 2 * (x - rows).detach() / x.numel())
    (expected,) = torch.autograd.grad(0.7 * (x.detach() - rows).square().mean(), module.codebook)
    torch.testing.assert_close(dcodebook, expected)
    assert out.codebook_loss == out.commitment_loss


def test_ema_codebook_has_no_codebook_loss_and_no_parameters():
    module = make()
    assert module(randn(5, 8)).codebook_loss == 0
    assert not list(module.parameters())


def test_straight_through_and_rotation_gradients():
    x, g = randn(20, 8), randn(20, 8, seed=1)
    for gradient in ("straight_through", "rotation"):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        module = make(gradient=gradient).eval()
        (got,) = torch.autograd.grad(module(a).quantized, a, g)
        (want,) = torch.autograd.grad(vq.quantize(b, module.codebook, gradient=gradient).quantized, b, g)
        assert torch.equal(got, want)
        assert torch.equal(got, g) == (gradient == "straight_through")


def test_cosine_gradient_flows_through_the_normalisation():
    x = randn(20, 8).requires_grad_()
    module = make(metric="cosine").eval()
    out = module(x)
    (dx,) = torch.autograd.grad(out.commitment_loss, x)
    unit = nn.functional.normalize(x, dim=-1)
    (want,) = torch.autograd.grad((unit - module.codebook[out.codes]).square().mean(), x)
    torch.testing.assert_close(dx, want)
    torch.testing.assert_close((dx * x).sum(-1), torch.zeros(20), atol=1e-7, rtol=0)  # the length has no gradient


def test_a_zero_token_has_a_finite_gradient_under_cosine():
    x = randn(6, 8)
    x[2] = 0
    assert torch.isfinite(train_step(make(metric="cosine"), x)).all()


def test_losses_are_the_same_in_eval_and_nothing_changes():
    module = make(dead_code_threshold=0.5)
    module(randn(50, 8))
    module.update_codebook()
    reference = copy.deepcopy(module)(randn(50, 8, seed=1))
    module.eval()
    before = copy.deepcopy(module)
    out = module(randn(50, 8, seed=1))
    assert torch.equal(out.loss, reference.loss)
    assert torch.equal(out.codes, reference.codes)
    assert_same_state(module, before)


# ---- masks and bad tokens ----


@every_option
def test_masked_tokens_count_for_nothing(options: dict):
    short, x = randn(3, 4, 8), torch.full((3, 6, 8), float("nan"))
    x[:, :4] = short
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[:, :4] = True
    padded, plain = make(**options), make(**options)
    padded_grad, plain_grad = train_step(padded, x, mask), train_step(plain, short)
    torch.testing.assert_close(padded_grad[:, :4], plain_grad)
    assert (padded_grad[:, 4:] == 0).all()
    for a, b in zip(padded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    out, expected = padded(x, mask), plain(short)
    assert torch.equal(out.codes[:, :4], expected.codes)
    assert (out.codes[:, 4:] == -1).all()
    assert (out.quantized[:, 4:] == 0).all()
    assert out.non_finite == 0
    torch.testing.assert_close(out.loss, expected.loss)
    for name, value in state(plain).items():
        torch.testing.assert_close(state(padded)[name], value, msg=name)


@every_option
def test_a_batch_without_real_tokens_has_loss_zero_and_teaches_nothing(options: dict):
    module = make(**{**options, "kmeans_init": False})
    before = module.codebook.detach().clone()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    out = module(randn(2, 5, 8), mask)
    assert out.loss == 0
    assert out.usage == 0
    assert out.perplexity == 1
    assert torch.equal(out.quantized, torch.zeros(2, 5, 8))
    assert (out.codes == -1).all()
    module.update_codebook()
    assert torch.equal(module.codebook, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_option
def test_a_bad_token_shows_and_stays_out_of_every_statistic(options: dict, bad: float):
    good, x = randn(20, 8), randn(21, 8)
    x[:20] = good
    x[20, 3] = bad
    with_bad, without = make(**options), make(**options)
    out, expected = with_bad(x), without(good)
    assert out.non_finite == 1
    assert out.codes[20] == -1
    assert out.quantized[20].isnan().all()
    assert out.loss.isnan()
    torch.testing.assert_close(out.quantized[:20], expected.quantized)
    for name, value in state(without).items():
        torch.testing.assert_close(state(with_bad)[name], value, msg=name)


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_option
def test_half_precision_input_loses_nothing_inside(options: dict, dtype: torch.dtype):
    x = randn(3, 40, 8).to(dtype)
    half, full = make(**options), make(**options)
    for _ in range(2):
        a, b = half(x), full(x.float())
        assert a.quantized.dtype == dtype
        assert a.loss.dtype == torch.float32
        assert torch.equal(a.codes, b.codes)
        torch.testing.assert_close(a.quantized, b.quantized.to(dtype))
    for name, value in state(full).items():
        torch.testing.assert_close(state(half)[name], value, msg=name)


@every_option
def test_autocast_changes_nothing(options: dict):
    inside, outside = make(**options), make(**options)
    for seed in range(3):
        x = randn(3, 40, 8, seed=seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a = inside(x)
            looked_up = inside.lookup(a.codes)
        b = outside(x)
        assert torch.equal(a.quantized, b.quantized)
        assert torch.equal(a.loss, b.loss)
        assert torch.equal(looked_up, outside.lookup(b.codes))
    assert_same_state(inside, outside)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_casting_the_module_keeps_the_codebook_in_float32(update: str):
    module = make(codebook_dim=4, update=update)
    before = module.codebook.detach().clone()
    module.half().bfloat16()
    assert module.codebook.dtype == torch.float32
    assert torch.equal(module.codebook, before)
    assert module.project_in.weight.dtype == torch.bfloat16
    out = module(randn(5, 8).bfloat16())
    assert out.quantized.dtype == torch.bfloat16
    assert torch.isfinite(out.loss)
    (out.quantized.float().sum() + out.loss).backward()
    module.state_dict()


def test_double_widens_everything():
    module = make(dead_code_threshold=0.5, metric="cosine").double()
    for seed in range(3):
        out = module(randn(50, 8, seed=seed).double())
    assert module.codebook.dtype == module.cluster_size.dtype == out.quantized.dtype == torch.float64
    assert module(randn(50, 8)).quantized.dtype == torch.float32


# ---- saving, copying ----


@every_option
def test_resume_is_exact(options: dict):
    original = make(**options)
    for seed in range(3):
        original(randn(60, 8, seed=seed))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    resumed = VectorQuantizer(8, 32, **options)
    resumed(randn(60, 8, seed=50))  # what it collected is forgotten on load
    resumed.load_state_dict(torch.load(file))
    for seed in range(3, 6):
        x = randn(60, 8, seed=seed)
        a, b = original(x), resumed(x)
        assert all(torch.equal(p, q) for p, q in zip(vars(a).values(), vars(b).values(), strict=True))
    assert_same_state(original, resumed)


@every_option
def test_copies_go_on_alike(options: dict):
    original = make(**options)
    original(randn(60, 8))
    copies = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    for each in [original, *copies]:
        each(randn(60, 8, seed=1))
    for each in copies:
        assert_same_state(original, each)


def test_state_dict_holds_what_the_next_step_needs_and_no_scratch():
    keys = set(make().state_dict())
    usage = {"window_counts", "last_used", "step", "seed", "initialized"}
    assert keys == {"codebook", "cluster_size", "embed_sum"} | usage
    assert set(make(update="gradient").state_dict()) == {"codebook"} | usage


def test_options_show_in_the_repr_and_can_be_replaced():
    module = make(metric="cosine")
    assert "codebook_size=32" in repr(module)
    assert "metric='cosine'" in repr(module)
    module.options = replace(module.options, ema_decay=0.5)
    module(randn(5, 8))
    with pytest.raises(ValueError, match="ema_decay"):
        replace(module.options, ema_decay=2.0)


# ---- errors ----

CONSTRUCTION = [
    ({"dim": 0}, "dim: expected an integer >= 1, got 0"),
    ({"codebook_size": 2.5}, "codebook_size: expected an integer >= 1, got 2.5"),
    ({"codebook_dim": 0}, "codebook_dim: expected an integer >= 1, got 0"),
    ({"metric": "dot"}, "metric: expected one of"),
    ({"channels": "middle"}, "channels: expected one of"),
    ({"update": "sgd"}, "update: expected one of"),
    ({"gradient": "none"}, "gradient: expected one of"),
    ({"precision": "half"}, "precision: expected one of"),
    ({"ema_decay": 1.0}, r"ema_decay: expected in \[0, 1\), got 1.0"),
    ({"eps": 0.0}, "eps: expected > 0"),
    ({"commitment_weight": -1.0}, "commitment_weight: expected >= 0"),
    ({"codebook_weight": -1.0}, "codebook_weight: expected >= 0"),
    ({"dead_code_threshold": -1.0}, "dead_code_threshold: expected >= 0"),
    ({"dead_code_threshold": 1.0, "update": "gradient"}, "dead_code_threshold: expected 0 unless update='ema'"),
    ({"usage_window": 0}, "usage_window: expected an integer >= 1"),
]


@pytest.mark.parametrize(("options", "message"), CONSTRUCTION, ids=[str(case[0]) for case in CONSTRUCTION])
def test_bad_options_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**{"dim": 8, "codebook_size": 16, **options})


FORWARD = [
    ("last", (5, 7), None, ValueError, r"x: expected \[..., 8\] for channels='last', got shape \[5, 7\]"),
    ("last", (8,), None, ValueError, r"x: expected \[..., 8\]"),
    ("last", (2, 8, 5, 6), None, ValueError, r"x: expected \[..., 8\] for channels='last'"),
    ("first", (2, 5, 6, 8), None, ValueError, r"x: expected \[B, 8, \*spatial\] for channels='first'"),
    ("first", (2, 8), None, ValueError, r"x: expected \[B, 8, \*spatial\]"),
    ("last", (2, 5, 8), torch.ones(2, 4, dtype=torch.bool), ValueError, r"mask: expected bool \[2, 5\], got"),
    ("last", (2, 5, 8), torch.ones(2, 5), ValueError, r"mask: expected bool \[2, 5\], got torch.float32"),
    ("first", (2, 8, 5), torch.ones(2, 8, 5, dtype=torch.bool), ValueError, r"mask: expected bool \[2, 5\]"),
]


@pytest.mark.parametrize(("channels", "shape", "mask", "error", "message"), FORWARD)
def test_bad_inputs_are_named(channels: str, shape: tuple, mask: Tensor | None, error: type, message: str):
    with pytest.raises(error, match=message):
        make(channels=channels)(randn(*shape), mask)


def test_bad_types_and_devices_are_named():
    module = make()
    with pytest.raises(TypeError, match="x: expected a tensor of float32"):
        module(torch.ones(3, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x: expected a tensor .* got list"):
        module([1.0])
    with pytest.raises(ValueError, match=r"x: expected torch.float32 or half precision like the codebook"):
        module(randn(3, 8).double())
    with pytest.raises(ValueError, match="codebook: expected on meta like x, got cpu"):
        module(torch.empty(3, 8, device="meta"))
    module.codebook = module.codebook.half()
    with pytest.raises(ValueError, match="codebook: expected float32 or float64"):
        module(randn(3, 8))


def test_bad_codes_are_named():
    module = make()
    with pytest.raises(IndexError, match=r"codes: expected in \[0, 32\)"):
        module.lookup(torch.tensor([0, 32]))
    with pytest.raises(TypeError, match="codes: expected integers"):
        module.lookup(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="codes: expected"):
        make(channels="first").lookup(torch.tensor([1]))


def test_a_codebook_with_nan_is_an_error():
    module = make()
    module.codebook[3, 1] = float("nan")
    with pytest.raises((ValueError, RuntimeError), match="codebook"):
        module(randn(3, 8))
