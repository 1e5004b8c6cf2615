"""VectorQuantizer under torch.compile and torch.export: one graph, the same numbers, the same state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing  # nothing else imports it for certain
from quantizers import OPTIONS, assert_same_state, every_training_option, make, randn, state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqkernels.nn import QuantizerOutput, VectorQuantizer, defer_codebook_update, kmeans, passes, statistics


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def compiled(module: nn.Module, backend: str = "aot_eager") -> nn.Module:
    """Fails on any graph break."""
    return torch.compile(module, fullgraph=True, backend=backend)


def step(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> tuple[QuantizerOutput, Tensor]:
    """Forward and backward."""
    x = x.clone().requires_grad_()
    out = module(x, mask)
    (out.quantized.square().sum() + out.loss).backward()
    assert x.grad is not None
    return out, x.grad


def assert_same_outputs(a: QuantizerOutput, b: QuantizerOutput) -> None:
    assert torch.equal(a.codes, b.codes)
    for name, value in vars(a).items():
        torch.testing.assert_close(value, getattr(b, name), equal_nan=True, msg=name)


def assert_close_state(a: nn.Module, b: nn.Module) -> None:
    for name, value in state(a).items():
        torch.testing.assert_close(value, state(b)[name], msg=name)


@pytest.mark.parametrize(
    ("name", "masked"), [*((name, False) for name in OPTIONS), ("plain", True), ("projected", True)]
)
def test_training_and_eval_are_one_graph_and_equal_eager(name: str, masked: bool):
    eager = make(channels="first", **OPTIONS[name])
    module = copy.deepcopy(eager)
    fast = compiled(module)
    mask = randn(2, 5, 6) > 0 if masked else None
    for seed in range(3):
        x = randn(2, 8, 5, 6, seed=seed)
        (out, dx), (expected, dx_expected) = step(fast, x, mask), step(eager, x, mask)
        assert_same_outputs(out, expected)
        torch.testing.assert_close(dx, dx_expected)
    assert_close_state(module, eager)
    module.eval()
    eager.eval()
    with torch.no_grad():
        assert_same_outputs(fast(x, mask), eager(x, mask))


def test_inductor_equals_eager():
    eager = make(codebook_dim=5, metric="cosine", dead_code_threshold=0.5, gradient="rotation")
    module = copy.deepcopy(eager)
    fast = compiled(module, "inductor")
    for seed in range(3):
        x = randn(4, 30, 8, seed=seed)
        (out, dx), (expected, dx_expected) = step(fast, x), step(eager, x)
        assert_same_outputs(out, expected)
        torch.testing.assert_close(dx, dx_expected)
    assert_close_state(module, eager)


def test_accumulation_works_compiled():
    eager = make()
    module = copy.deepcopy(eager)
    fast = compiled(module)
    for seed in range(3):
        for each, owner in ((fast, module), (eager, eager)):
            with defer_codebook_update(owner):
                step(each, randn(30, 8, seed=seed))
                step(each, randn(30, 8, seed=10 + seed))
    assert_same_state(module, eager)


class Model(nn.Module):
    """A quantizer inside a model, unpacked there."""

    def __init__(self, recompute: bool = False, **options) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 8), nn.Linear(8, 8)
        self.vq = make(dead_code_threshold=0.5, **options)
        self.recompute = recompute

    def body(self, x: Tensor) -> Tensor:  # [N, 8] -> []
        quantized, _, loss = self.vq(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + loss

    def forward(self, x: Tensor) -> Tensor:  # [N, 8] -> []
        return checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)


FIRST_STEPS = {"": {}, "kmeans": {"kmeans_init": True, "metric": "cosine", "codebook_dim": 5}}


@pytest.mark.parametrize("options", FIRST_STEPS.values(), ids=FIRST_STEPS)
@pytest.mark.parametrize("where", ["none", "inside", "around"])
def test_a_compiled_model_with_activation_checkpointing_trains_like_the_eager_one(where: str, options: dict):
    torch.manual_seed(0)
    eager = Model(**options)
    model = copy.deepcopy(eager)
    model.recompute = where == "inside"
    fast = compiled(model)
    for seed in range(4):
        x = randn(40, 8, seed=seed)
        loss = checkpoint(fast, x, use_reentrant=False) if where == "around" else fast(x)
        expected = eager(x)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert_close_state(model, eager)


@pytest.mark.parametrize("name", ["plain", "projected", "gradient-cosine"])
def test_export_in_eval_changes_no_state(name: str):
    module = make(**OPTIONS[name])
    module(randn(60, 8))
    module.eval()
    x = randn(2, 9, 8)
    program = torch.export.export(module, (x,))
    assert not program.graph_signature.buffers_to_mutate
    assert_same_outputs(program.module()(x), module(x))


def test_the_ops_pass_opcheck():
    module = make(dead_code_threshold=2.0)
    tokens = randn(2, 30, 8)
    codes = module(tokens).codes
    pending = (module.pending_counts, module.pending_sums, module.pending_revive)
    usage = (module.window_counts, module.last_used, module.step)
    own, rest = (module.seed, module.owner), (0.9, 1e-5, 1.0, False, False, False)
    calls = [
        (
            statistics.apply_pending_,
            (module.codebook, module.cluster_size, module.embed_sum, *pending, module.owner, *rest),
        ),
        (statistics.collect_, (tokens, codes, module.cluster_size, *own, *pending, *usage, 2.0, False, 10)),
        (statistics.observe_, (tokens, codes, *usage, 10)),
        (statistics.synchronize_, ([module.codebook, module.step], module._number)),
        (passes.finish_first_forward_, (module.initialized, module._number)),
        (
            kmeans.initialize_,
            (tokens, None, module.codebook, module.initialized, module.seed, "euclidean", "exact", module._number),
        ),
    ]
    for op, args in calls:
        torch.library.opcheck(op, copy.deepcopy(args))


@every_training_option
def test_explain_finds_no_graph_break(options: dict):
    module = make(**options)
    for training in (True, False):
        module.train(training)
        found = torch._dynamo.explain(module)(randn(30, 8), randn(30, seed=1) > 0)
        assert found.graph_count == 1
        assert found.graph_break_count == 0, found.break_reasons


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@every_training_option
def test_a_marked_batch_is_compiled_once(options: dict, training: bool):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = make(channels="first", **options).train(training)
    fast = torch.compile(module, fullgraph=True, backend=counter)
    for step_, size in enumerate((5, 2, 9, 3)):
        x = randn(size, 8, 3, 2 + size, seed=step_).requires_grad_()
        for axis in (0, 3):
            torch._dynamo.mark_dynamic(x, axis)
        out = fast(x)
        (out.quantized.square().sum() + out.loss).backward()
    first_step = training and module.options.kmeans_init  # is a graph of its own
    assert counter.frame_count == (2 if first_step else 1)


def test_dynamic_batch_sizes_do_not_recompile_every_time():
    module = VectorQuantizer(8, 32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(module, fullgraph=True, backend=counter)
    for size in range(20, 30):
        fast(randn(size, 8))
    assert counter.frame_count <= 2  # the first size, then one graph for any


def test_the_first_step_is_the_first_of_each_copy():
    """The flag is set by an op, from inside a graph, on the module that ran it."""
    module = make(kmeans_init=True)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    x = randn(200, 8)
    for each in (module, *copies):
        before = each.codebook.clone()
        out = compiled(each)(x)
        assert not torch.equal(each.codebook, before)
        assert torch.equal(out.codes, each.encode(x))
        after = each.codebook.clone()
        each(randn(200, 8, seed=1))  # no k-means again: the EMA of the first batch moves it
        assert 0 < (each.codebook - after).abs().max() < 0.2
