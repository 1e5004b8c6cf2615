"""The ops are good citizens of torch: schemas, fakes, autograd, compile, autocast."""

from __future__ import annotations

import pytest
import torch

import vqkernels as vq


def _ops():
    x, codebook = torch.randn(2, 9, 5), torch.randn(7, 5)
    codes, _ = vq.nearest(x, codebook)
    mask = torch.rand(2, 9) > 0.3
    error = torch.rand(2, 9)
    size = torch.rand(7)
    revive = torch.arange(7) == 3
    ops = torch.ops.vqkernels
    return {
        "nearest": (ops.nearest.default, (x, codebook, "euclidean", "exact")),
        "nearest cosine": (ops.nearest.default, (x.transpose(0, 1), codebook, "cosine", "fast")),
        "quantize": (ops.quantize.default, (x, codebook, None, "euclidean", "exact")),
        "quantize masked": (ops.quantize.default, (x, codebook, mask, "euclidean", "exact")),
        "quantize_backward": (ops.quantize_backward.default, (x, codebook[codes], codes, x, error, True)),
        "quantize_backward of the error": (
            ops.quantize_backward.default,
            (x, codebook[codes], codes, None, error, False, mask),
        ),
        "codebook_gradient": (ops.codebook_gradient.default, (x, codebook[codes], codes, error, 7)),
        "add_statistics_": (ops.add_statistics_.default, (x, codes, size.clone(), codebook.clone())),
        "add_statistics_ counts": (ops.add_statistics_.default, (x, codes, size.clone(), None)),
        "codebook_stats": (ops.codebook_stats.default, (x, codes, 7)),
        "ema_step_": (
            ops.ema_step_.default,
            (x, codes, codebook.clone(), size.clone(), codebook.clone(), 0.9, 1e-5, False),
        ),
        "ema_update_": (
            ops.ema_update_.default,
            (
                codebook.clone(),
                size,
                codebook.clone(),
                size.clone(),
                codebook.clone(),
                revive,
                0.9,
                1e-5,
                1.0,
                False,
            ),
        ),
    }


@pytest.mark.parametrize("name", list(_ops()))
def test_opcheck(name: str):
    op, args = _ops()[name]
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_gradcheck_of_the_errors(backend, metric: str):
    name, device = backend
    if name == "triton":
        pytest.skip("Triton kernels take no float64; their gradients are held to the formulas in test_training_ops.py")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64, generator=generator).to(device).requires_grad_()
    codebook = torch.randn(6, 4, dtype=torch.float64, generator=generator).to(device).requires_grad_()
    frozen_x, frozen_codebook = x.detach(), codebook.detach()
    assert torch.autograd.gradcheck(lambda t: vq.quantize(t, frozen_codebook, metric=metric).commitment_error, (x,))
    assert torch.autograd.gradcheck(lambda c: vq.quantize(frozen_x, c, metric=metric).codebook_error, (codebook,))


def test_each_error_reaches_its_own_argument_only():
    x, codebook = torch.randn(8, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    out = vq.quantize(x, codebook)
    gx, gc = torch.autograd.grad(out.commitment_error.sum(), (x, codebook), retain_graph=True, allow_unused=True)
    assert gx is not None
    assert gc is None or not gc.any()
    gx, gc = torch.autograd.grad(out.codebook_error.sum(), (x, codebook), allow_unused=True)
    assert gx is None or not gx.any()
    assert gc is not None


def test_a_second_derivative_is_refused_not_invented():
    x, codebook = torch.randn(8, 3, requires_grad=True), torch.randn(4, 3)
    out = vq.quantize(x, codebook)
    (gx,) = torch.autograd.grad(out.commitment_error.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gx.sum().backward()


def _step(x, codebook, size, embed):
    out = vq.quantize(x, codebook, gradient="rotation")
    counts, sums = vq.codebook_stats(x, out.codes, codebook.shape[0])
    vq.ema_update_(codebook, size, embed, counts, sums, decay=0.9)
    return out.quantized, out.codes, out.commitment_error.mean()


def test_compiled_in_one_graph_and_equal_to_eager(backend):
    _, device = backend
    torch._dynamo.reset()
    data = torch.randn(30, 6, device=device), torch.randn(11, 6, device=device)
    results = []
    for fn in (_step, torch.compile(_step, fullgraph=True, backend="aot_eager")):
        x, codebook = data[0].clone().requires_grad_(), data[1].clone()
        size, embed = torch.ones(11, device=device), codebook.clone()
        quantized, codes, loss = fn(x, codebook, size, embed)
        (quantized.sum() + loss).backward()
        results.append((quantized.detach(), codes, loss.detach(), x.grad, codebook, size, embed))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_autocast_keeps_precision_and_dtype():
    x, codebook = torch.randn(40, 8), torch.randn(16, 8)
    plain = vq.quantize(x, codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = vq.quantize(x, codebook)
        half = vq.quantize(x.bfloat16(), codebook)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert half.quantized.dtype == torch.bfloat16
    assert torch.equal(half.quantized, codebook[half.codes].bfloat16())
