"""On a CUDA device: a whole quantizer step never waits for the host, and equals the CPU's."""

from __future__ import annotations

import pytest
import torch
from requirements import skip_or_fail

import vqkernels as vq

OPTIONS = {
    "ema": {},
    "cosine": {"metric": "cosine", "gradient": "rotation"},
    "gradient": {"update": "gradient"},
    "revival": {"dead_code_threshold": 0.5, "channels": "first"},
}


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        skip_or_fail("cuda", "no CUDA device")


def _step(layer: vq.VectorQuantizer, x: torch.Tensor) -> torch.Tensor:
    out = layer(x)
    (out.quantized.square().mean() + out.loss).backward()
    layer.update_codebook()
    return out.codes


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["triton", "compiled"])
def test_a_step_waits_for_nobody(name: str, options: dict):
    torch.manual_seed(0)
    shape = (4, 16, 9, 9) if options.get("channels") == "first" else (4, 81, 16)
    layer, x = vq.VectorQuantizer(16, 200, **options).cuda(), torch.randn(shape, device="cuda", requires_grad=True)
    with vq.use_backend(name):
        _step(layer, x)  # compiles and allocates
        torch.cuda.set_sync_debug_mode("error")
        try:
            _step(layer, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["triton", "compiled"])
def test_three_steps_equal_those_on_the_cpu(name: str, options: dict):
    torch.manual_seed(0)
    on_cpu = vq.VectorQuantizer(16, 200, **options)
    on_cuda = vq.VectorQuantizer(16, 200, **options).cuda()
    on_cuda.load_state_dict(on_cpu.state_dict())
    shape = (4, 16, 9, 9) if options.get("channels") == "first" else (4, 81, 16)
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        expected = _step(on_cpu, x.clone().requires_grad_())
        with vq.use_backend(name):
            got = _step(on_cuda, x.cuda().requires_grad_())
        assert torch.equal(got.cpu(), expected)
    torch.testing.assert_close(on_cuda.codebook.detach().cpu(), on_cpu.codebook.detach(), rtol=1e-5, atol=1e-6)
