"""The C++ kernels of the softmax over codes against the formula in float64, on every instruction set and layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from requirements import skip_or_fail
from torch import Tensor

from vqkernels import _extension
from vqkernels.kernels import compiled_softmax as kernels

INSTRUCTION_SETS = ("avx512", "avx2", "portable")
# tokens, codes, dimensions: one code, one token, no whole panel, several blocks, chunks and groups, none whole
SHAPES = [(1, 1, 1), (3, 2, 5), (50, 65, 18), (7, 1500, 3), (97, 700, 40), (13, 17000, 2), (200, 33, 8), (5, 130, 260)]


@pytest.fixture(autouse=True)
def _library():
    reason = _extension.cpu_library()
    if reason is not None:
        skip_or_fail("compiled", reason)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VQKERNELS_CPU_ISA", request.param)
    if _extension.instruction_set() != request.param:
        skip_or_fail(request.param, f"this CPU has no {request.param}")
    return request.param


@dataclass
class Call:
    """Inputs of all four ops."""

    x: Tensor  # [B, T, D]
    codebook: Tensor  # [K, D]
    bias: Tensor | None  # [K]
    scale: float
    dlse: Tensor  # [B, T]
    dentropy: Tensor  # [B, T]
    weight: Tensor  # [B, T]
    dcode_sums: Tensor | None  # [K]
    direction: Tensor | None  # [B, T, D]

    def outputs(self, need_codebook: bool = True) -> dict[str, Tensor]:
        """What the kernels give."""
        args = (self.x, self.codebook, self.bias, self.scale)
        lse, entropy = kernels.softmax_forward(*args)
        sums = kernels.softmax_code_sums(*args, lse, self.weight)
        upstream = (self.dlse, self.dentropy, self.weight, self.dcode_sums, self.direction)
        dx, dcodebook, dbias = kernels.softmax_backward(*args, lse, *upstream, need_codebook)
        return {"lse": lse, "entropy": entropy, "sums": sums, "dx": dx, "dcodebook": dcodebook, "dbias": dbias}


def make_call(
    n: int, size: int, dim: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Call:
    random = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    x, codebook = randn(1, n, dim), randn(size, dim)
    per_token = [randn(1, n) for _ in range(3)]
    return Call(x, codebook, randn(size), scale, *per_token, randn(size), randn(1, n, dim))


def oracle(call: Call) -> dict[str, Tensor]:
    """The formula by autograd in float64; the codebook's gradient is that of the logits alone."""
    leaves = [t.double().requires_grad_() for t in (call.x, call.codebook, _or_zeros(call.bias, call.codebook))]
    x, codebook, bias = leaves
    logp = torch.log_softmax(call.scale * x @ codebook.T + bias, -1)
    lse = torch.logsumexp(call.scale * x @ codebook.T + bias, -1)
    p = logp.exp()
    entropy = -(p * logp.clamp_min(-1e300)).sum(-1)
    sums = torch.einsum("bt,btk->k", call.weight.double(), p)
    loss = (lse * call.dlse).sum() + (entropy * call.dentropy).sum()
    loss = loss + (sums * _or_zeros(call.dcode_sums, call.codebook)).sum()
    loss = loss + (p @ codebook.detach() * _or_zeros(call.direction, call.x[..., :1])).sum()
    dx, dcodebook, dbias = torch.autograd.grad(loss, leaves)
    # d entropy / d l = -p (log p + entropy) is what the kernels' f gives: -(l - lse) less its mean
    return {"lse": lse, "entropy": entropy, "sums": sums, "dx": dx, "dcodebook": dcodebook, "dbias": dbias}


def _or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    return (
        torch.zeros(like.shape[:1] if like.dim() == 2 else like.shape, dtype=torch.float64)
        if tensor is None
        else tensor.double()
    )


def assert_close(call: Call, need_codebook: bool = True) -> None:
    """Errors relative to the largest entry: a logit is off by its size and D roundings, and p by as much."""
    unit = torch.finfo(call.x.dtype).eps
    logits = call.scale * call.x.double() @ call.codebook.double().T
    steps = 4 + math.sqrt(call.x.shape[-1])
    relative = unit * steps * (4 + 2 * logits.abs().max().item())
    expected = oracle(call)
    for name, value in call.outputs(need_codebook).items():
        if need_codebook or name not in ("dcodebook", "dbias"):
            true = expected[name]
            error = (value.double() - true).abs().max().item()
            assert value.dtype == call.x.dtype
            assert error <= relative * max(1.0, true.abs().max().item()), (name, error, relative)


@pytest.mark.parametrize(("n", "size", "dim"), SHAPES)
def test_kernels_are_the_formula(instruction_set: str, n: int, size: int, dim: int):
    assert_close(make_call(n, size, dim, scale=0.5))
