"""VectorQuantizer's entropy loss and its drawn codes."""

from __future__ import annotations

import pytest
import torch
from quantizers import assert_same_state, make, randn
from torch.utils.checkpoint import checkpoint

import vqkernels as vq

ENTROPY = vq.EntropyOptions(weight=0.3, temperature=0.5)


@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"update": "gradient"}], ids=str)
def test_entropy_is_part_of_the_loss_and_of_the_gradient(options: dict):
    module, bare = make(entropy=ENTROPY, **options), make(**options)
    x = randn(40, 8).requires_grad_()
    mask = torch.arange(40) % 5 > 0
    out, without = module(x, mask), bare(x, mask)
    assert isinstance(out, vq.EntropyQuantizerOutput)
    assert isinstance(out, vq.QuantizerOutput)
    tokens = x / x.norm(dim=-1, keepdim=True) if options.get("metric") == "cosine" else x
    truth = vq.entropy_loss(
        tokens, bare.codebook, metric=options.get("metric", "euclidean"), temperature=0.5, weight=mask
    )
    torch.testing.assert_close(out.entropy_loss, truth.loss)
    torch.testing.assert_close(out.loss, without.loss + 0.3 * truth.loss)
    (gradient,) = torch.autograd.grad(out.loss, x)
    (expected,) = torch.autograd.grad(without.loss + 0.3 * truth.loss, x)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[~mask] == 0).all()
    if options.get("update") == "gradient":
        module(x, mask).entropy_loss.backward()
        assert module.codebook.grad.abs().sum() > 0


def test_entropy_is_not_computed_in_eval():
    module = make(entropy=ENTROPY)
    out = module.eval()(randn(10, 8))
    assert out.entropy_loss == 0
    assert torch.equal(out.loss, make().eval()(randn(10, 8)).loss)


def test_drawn_codes_are_near_ones_and_the_nearest_at_temperature_zero():
    x = randn(3000, 8)
    cold, warm = (make(codebook_size=16, sampling=vq.SamplingOptions(t)) for t in (1e-6, 0.7))
    nearest, _ = vq.nearest(x, cold.codebook)
    assert torch.equal(cold(x).codes, nearest)
    expected = torch.softmax(-torch.cdist(x, warm.codebook).square() / 0.7, dim=1).mean(0)
    out = warm(x)
    share = torch.bincount(out.codes, minlength=16) / 3000
    assert (share - expected).abs().max() < 5 * (expected.max() / 3000).sqrt()  # five standard deviations
    assert 0.1 < (out.codes != nearest).float().mean() < 0.99
    assert torch.equal(out.quantized, vq.lookup(out.codes, warm.codebook))
    assert torch.equal(warm.pending_counts, torch.bincount(out.codes, minlength=16).float())
    assert not torch.equal(warm(x).codes, out.codes)  # the next step draws anew
    assert torch.equal(warm.eval()(x).codes, vq.nearest(x, warm.codebook)[0])


@pytest.mark.parametrize("options", [{"sampling": vq.SamplingOptions(0.5)}, {"entropy": ENTROPY}], ids=["drawn", "ent"])
def test_recomputed_and_compiled_forwards_are_the_plain_one(options: dict):
    plain, again, fast = (make(**options) for _ in range(3))
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = randn(50, 8, seed=step)
        inputs = [x.clone().requires_grad_() for _ in range(3)]
        outs = [
            tuple(plain(inputs[0])),
            checkpoint(lambda x: tuple(again(x)), inputs[1], use_reentrant=False),
            tuple(compiled(inputs[2])),
        ]
        for quantized, _, loss in outs:
            (quantized.square().sum() + loss).backward()
        assert torch.equal(outs[0][1], outs[1][1])
        assert torch.equal(outs[0][1], outs[2][1])
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        torch.testing.assert_close(inputs[2].grad, inputs[0].grad)
    assert_same_state(plain, again)


def test_drawn_codes_leave_masked_tokens_out():
    module = make(sampling=vq.SamplingOptions(1.0))
    x, mask = randn(20, 8), torch.arange(20) > 4
    x[:5] = float("nan")
    out = module(x, mask)
    assert (out.codes[:5] == -1).all()
    assert (out.codes[5:] >= 0).all()
    assert (out.quantized[:5] == 0).all()
    assert out.loss.isfinite()
    assert out.non_finite == 0


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="temperature: expected a positive finite number, got 0"):
        vq.SamplingOptions(0.0)
    with pytest.raises(ValueError, match="codes: expected int64"):
        vq.quantize(randn(4, 8), randn(5, 8), codes=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("options", [{"entropy": 0.1}, {"entropy": {"weight": 0.1}}, {"sampling": 0.1}])
def test_options_of_another_type_are_named_at_once(options: dict):
    with pytest.raises(TypeError, match=f"{next(iter(options))}: expected"):
        vq.VectorQuantizer(4, 8, **options)


def test_the_representation_tells_the_options():
    module = vq.VectorQuantizer(4, 8, entropy=vq.EntropyOptions(weight=0.3), smoothing="plain")
    assert "weight=0.3" in repr(module)
    assert "smoothing='plain'" in repr(module)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("entropy", [None, vq.nn.EntropyOptions(weight=1.0, temperature=0.5)], ids=["plain", "entropy"])
def test_an_update_between_forward_and_backward_changes_no_gradient(metric: str, entropy: object):
    def gradient(update: bool) -> torch.Tensor:
        module = make(metric=metric, entropy=entropy)
        x = randn(4, 9, 8, seed=5).requires_grad_()
        out = module(x)
        if update:
            module.update_codebook()
        (out.loss + out.quantized.sum()).backward()
        return x.grad

    assert torch.equal(gradient(True), gradient(False))


def test_autograd_notices_that_a_saved_codebook_was_overwritten():
    x, codebook = randn(9, 8, seed=1).requires_grad_(), randn(5, 8, seed=2)
    loss = vq.entropy_loss(x, codebook, temperature=1.0).loss
    size = torch.ones(5)
    vq.ema_update_(codebook, size, codebook.clone(), size.clone(), randn(5, 8, seed=3), decay=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
