"""On a CUDA device: a whole quantizer step never waits for the host, can be captured in a graph, and equals the CPU's.

What of this needs no GPU is in test_host_waits.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from host_waits import no_host_waits
from quantizers import state
from requirements import skip_or_fail
from torch import Tensor, nn

import vqkernels as vq
from vqkernels.nn import defer_codebook_update

OPTIONS = {
    "ema": {},
    "cosine": {"metric": "cosine", "gradient": "rotation"},
    "gradient": {"update": "gradient"},
    "projected": {"codebook_dim": 8},
    "revival": {"dead_code_threshold": 0.5, "channels": "first"},
    "kmeans": {"kmeans_init": True, "dead_code_threshold": 0.5},
}
both_backends = pytest.mark.parametrize("name", ["triton", "compiled"])
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        skip_or_fail("cuda", "no CUDA device")


def make(options: dict) -> vq.VectorQuantizer:
    torch.manual_seed(0)
    return vq.VectorQuantizer(16, 200, **options)


def batch(options: dict, seed: int) -> Tensor:
    shape = (4, 16, 9, 9) if options.get("channels") == "first" else (4, 81, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(layer: vq.VectorQuantizer, x: Tensor) -> dict[str, Tensor]:
    """Forward, backward and update; the gradients are new tensors."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    out = layer(x)
    (out.quantized.square().mean() + out.loss).backward()
    layer.update_codebook()
    gradients = {f"d{name}": p.grad for name, p in layer.named_parameters()}
    return {name: value.detach() for name, value in (*vars(out).items(), ("dx", x.grad), *gradients.items())}


@both_backends
@every_option
def test_no_step_waits_for_the_host(name: str, options: dict):
    layers = [make(options).cuda() for _ in range(2)]
    batches = [batch(options, seed).cuda().requires_grad_() for seed in range(4)]
    with vq.use_backend(name):
        step(layers[0], batches[0])  # compiles the kernels and allocates
        with no_host_waits("cuda"):
            step(layers[1], batches[0])  # the first one, with k-means
            step(layers[1], batches[1])
            with defer_codebook_update(layers[1]):
                step(layers[1], batches[2])
                step(layers[1], batches[3])


class Captured:
    """A training step as a CUDA graph: every call is one replay, on the memory that was captured."""

    def __init__(self, layer: vq.VectorQuantizer, x: Tensor) -> None:
        self.x = x.clone().requires_grad_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), no_host_waits("cuda"):
            self.results = step(layer, self.x)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        with no_host_waits("cuda"), torch.no_grad():
            self.x.copy_(x)
            self.graph.replay()
        return self.results


def warmed_up(layer: vq.VectorQuantizer, batches: list[Tensor]) -> None:
    """A few steps on a stream of their own, as torch asks for before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in batches:
            step(layer, x.clone().requires_grad_())
    torch.cuda.current_stream().wait_stream(stream)


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], exact: bool) -> None:
    """Bit for bit, but for what cuBLAS adds: it may choose another algorithm inside a graph."""
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, equal_nan=True, msg=key, **tolerance)


@both_backends
@every_option
def test_a_captured_step_replays_like_the_eager_one(name: str, options: dict):
    eager = make(options).cuda()
    batches = [batch(options, seed).cuda() for seed in range(8)]
    exact = "codebook_dim" not in options
    with vq.use_backend(name):
        warmed_up(eager, batches[:4])
        layer = copy.deepcopy(eager)
        replay = Captured(layer, batches[0])  # a capture records the work and does none of it
        assert_equal(state(layer), state(eager), exact)
        for x in batches[4:]:
            expected = step(eager, x.clone().requires_grad_())
            assert_equal(replay(x), expected, exact)
            assert_equal(state(layer), state(eager), exact)


@both_backends
def test_the_first_step_can_be_captured_too(name: str):
    """k-means, then the step on its codebook: the second replay finds the codebook initialised and leaves it."""
    options = OPTIONS["kmeans"]
    x = batch(options, 0).cuda()
    eager, layer = make(options).cuda(), make(options).cuda()
    with vq.use_backend(name):
        warmed_up(make(options).cuda(), [x])
        replay = Captured(layer, x)
        assert not layer.initialized
        assert_equal(replay(x), step(eager, x.clone().requires_grad_()), exact=True)
        assert layer.initialized
        assert_equal(state(layer), state(eager), exact=True)
        other = batch(options, 1).cuda()
        assert_equal(replay(other), step(eager, other.clone().requires_grad_()), exact=True)
        assert_equal(state(layer), state(eager), exact=True)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_equal_the_eager_ones(mode: str):
    """ "reduce-overhead" puts inductor's code into CUDA graphs."""
    torch._dynamo.reset()
    options = {"dead_code_threshold": 0.5}
    eager = make(options).cuda()
    module = copy.deepcopy(eager)
    fast: nn.Module = torch.compile(module, fullgraph=True, mode=mode)
    for seed in range(4):
        x = batch(options, seed).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        codes = fast(x).codes.clone()
        assert torch.equal(codes, eager(x).codes)
    for key, value in state(eager).items():
        torch.testing.assert_close(state(module)[key], value, msg=key)


@both_backends
@pytest.mark.parametrize("option", ["ema", "cosine", "gradient", "revival"])
def test_three_steps_equal_those_on_the_cpu(name: str, option: str):
    """Of the options whose codes depend on no sum that torch adds in another order on each device."""
    options = OPTIONS[option]
    on_cpu, on_cuda = make(options), make(options).cuda()
    for seed in range(3):
        x = batch(options, seed)
        expected = step(on_cpu, x.clone().requires_grad_())
        with vq.use_backend(name):
            got = step(on_cuda, x.cuda().requires_grad_())
        assert torch.equal(got["codes"].cpu(), expected["codes"])
    torch.testing.assert_close(on_cuda.codebook.detach().cpu(), on_cpu.codebook.detach(), rtol=1e-5, atol=1e-6)
