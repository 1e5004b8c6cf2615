"""A training step never waits for the device: not the first one, not with k-means, revival, masks or accumulation."""

from __future__ import annotations

import copy

import pytest
import torch
from host_waits import HostWait, no_host_waits
from quantizers import OPTIONS, make, randn, train_step
from requirements import skip_or_fail
from torch import nn
from torch.utils.checkpoint import checkpoint

import vqkernels as vq
from vqkernels import _extension
from vqkernels.nn import VectorQuantizer, defer_codebook_update

EVERYTHING = {
    "codebook_dim": 5,
    "metric": "cosine",
    "gradient": "rotation",
    "dead_code_threshold": 0.5,
    "kmeans_init": True,
    "channels": "first",
}
CASES = {**OPTIONS, "everything": EVERYTHING}
MASKED = ("plain", "gradient", "revival", "everything")
DEVICES = ("cpu", "meta")  # real numbers, and none at all


@pytest.fixture(autouse=True)
def _compiled():
    if reason := _extension.cpu_library():  # the reference search is for the CPU, and looks at its candidates
        skip_or_fail("compiled", reason)


def batch(options: dict, seed: int, masked: bool, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape = (3, 8, 4, 5) if options.get("channels") == "first" else (3, 4, 5, 8)
    mask = (randn(3, 4, 5, seed=seed + 50) > 0).to(device) if masked else None
    return randn(*shape, seed=seed).to(device), mask


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_no_training_step_waits_for_the_device(name: str, device: str):
    options = CASES[name]
    module = make(**options).to(device)
    batches = [batch(options, seed, name in MASKED, device) for seed in range(4)]
    with no_host_waits(device):
        for each in batches[:2]:  # the first one initialises, the second one applies what it collected
            train_step(module, *each)
        with defer_codebook_update(module):
            train_step(module, *batches[2])
            train_step(module, *batches[3])
        module.update_codebook()
        module.eval()(batches[0][0])
    assert device == "meta" or module.step == 4


@pytest.mark.parametrize("device", DEVICES)
def test_neither_does_a_model_under_activation_checkpointing(device: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), VectorQuantizer(8, 32, dead_code_threshold=0.5)).to(device)
    batches = [randn(60, 8, seed=seed).to(device) for seed in range(2)]
    with no_host_waits(device):
        for x in batches:
            checkpoint(lambda x: model(x).loss, x, use_reentrant=False).backward()


def test_nor_do_the_functions():
    x, codebook = randn(2, 30, 8).requires_grad_(), randn(32, 8)
    size, embed = torch.ones(32), codebook.clone()
    with no_host_waits():
        codes, _ = vq.nearest(x, codebook)
        counts, sums = vq.codebook_stats(x, codes, 32)
        vq.quantize(x, codebook, gradient="rotation").quantized.sum().backward()
        vq.ema_update_(codebook, size, embed, counts, sums, decay=0.9)


def _assign(t: torch.Tensor) -> None:
    t[t > 0] = 0


WAITS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.any()),
    "float": lambda t: 2.0 * float(t[0]),
    "range": lambda t: range(t.long().sum()),
    "contains": lambda t: 1.0 in t,
    "format": lambda t: f"{t[0]}",
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "tensor of tensors": lambda t: torch.tensor([t[0], t[1]]),
    "boolean index": lambda t: t[t > 0],
    "boolean assignment": _assign,
    "masked_select": lambda t: t.masked_select(t > 0),
    "where": lambda t: torch.where(t > 0),
    "nonzero": lambda t: t.nonzero(),
    "unique": lambda t: t.unique(),
    "bincount": lambda t: t.long().bincount(),
    "equal": lambda t: torch.equal(t, t.clone()),
    "allclose": lambda t: torch.allclose(t, t),
    "repeat": lambda t: torch.repeat_interleave(t, t.long()),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_the_watch_sees_every_kind_of_waiting(wait):
    with pytest.raises(HostWait), no_host_waits():
        wait(torch.ones(3))


class _Curious(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * dy.sum().item()


def test_the_watch_sees_into_backward_and_into_our_ops(monkeypatch: pytest.MonkeyPatch):
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(HostWait), no_host_waits():
        _Curious.apply(x).sum().backward()
    module, x = make(), randn(20, 8)
    statistics = vq.nn.statistics
    remember = statistics._remember
    monkeypatch.setattr(statistics, "_remember", lambda counts, *rest: remember(counts, *rest) or counts.max().item())
    copy.deepcopy(module)(x)
    with pytest.raises(HostWait), no_host_waits():
        module(x)


def test_the_watch_on_meta_sees_tensors_made_on_the_cpu():
    x = torch.ones(3, device="meta")
    with pytest.raises(HostWait, match="on the CPU"), no_host_waits("meta"):
        _ = x * torch.tensor(2.0)
