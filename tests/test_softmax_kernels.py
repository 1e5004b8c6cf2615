"""The C++ kernels of the softmax over codes against the formula in float64, on every instruction set and layout."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from instruction_sets import library as library
from instruction_sets import use_instruction_set
from torch import Tensor

from vqkernels.kernels import compiled_softmax as kernels
from vqkernels.kernels import reference_softmax

pytestmark = pytest.mark.usefixtures("library")
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
# tokens, codes, dimensions: one of each, no whole panel, one panel and a code, several blocks, chunks and groups
SHAPES = [(1, 1, 1), (3, 2, 5), (50, 65, 18), (7, 1500, 3), (97, 700, 40), (13, 17000, 2), (200, 33, 8), (5, 130, 260)]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_instruction_set(request.param, monkeypatch)
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
    uniform: Tensor  # [B, T]
    dcode_sums: Tensor | None  # [K]
    direction: Tensor | None  # [B, T, D]

    def outputs(self, need_codebook: bool = True) -> dict[str, Tensor]:
        """What the kernels give."""
        args = (self.x, self.codebook, self.bias, self.scale)
        lse, entropy = kernels.softmax_forward(*args)
        sums = kernels.softmax_code_sums(*args, lse, self.weight)
        upstream = (self.dlse, self.dentropy, self.weight, self.dcode_sums, self.direction)
        dx, dcodebook, dbias = kernels.softmax_backward(*args, lse, *upstream, need_codebook)
        codes = kernels.softmax_sample(*args, lse, self.uniform)
        outputs = {"lse": lse, "entropy": entropy, "sums": sums, "dx": dx, "codes": codes}
        return {**outputs, "dcodebook": dcodebook, "dbias": dbias}


def make_call(n: int, size: int, dim: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Call:
    random = torch.Generator().manual_seed(n + size + dim)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    x, codebook, bias, sums, direction = randn(1, n, dim), randn(size, dim), randn(size), randn(size), randn(1, n, dim)
    uniform = torch.rand(1, n, generator=random, dtype=dtype)
    return Call(x, codebook, bias, scale, randn(1, n), randn(1, n), randn(1, n), uniform, sums, direction)


def oracle(call: Call) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The formula in float64, and a bound of each result's error."""
    x, codebook = call.x.double(), call.codebook.double()
    bias, dsums = (torch.zeros(len(codebook)) if t is None else t.double() for t in (call.bias, call.dcode_sums))
    direction = torch.zeros_like(x) if call.direction is None else call.direction.double()
    dlse, dentropy, weight = (t.double()[..., None] for t in (call.dlse, call.dentropy, call.weight))
    logits = call.scale * x @ codebook.T + bias
    lse = logits.logsumexp(-1, keepdim=True)
    p = (logits - lse).exp()
    logp = (logits - lse).clamp_min(-1e9)  # a bias may be -inf
    entropy = -(p * logp).sum(-1)
    f = -dentropy * logp + weight * dsums + direction @ codebook.T
    gradient = p * (f - (p * f).sum(-1, keepdim=True) + dlse)
    flat = gradient.flatten(0, 1)
    true = {"lse": lse[..., 0], "entropy": entropy, "sums": (weight * p).sum((0, 1)), "dbias": flat.sum(0)}
    true |= {"dx": call.scale * gradient @ codebook, "dcodebook": call.scale * flat.T @ x.flatten(0, 1)}
    # a logit is off by the roundings of its products, p by as much of itself and 0 where it is tiny; sums add one
    # rounding a term
    unit, tokens = torch.finfo(call.x.dtype).eps / 2, x[..., 0].numel()
    size = call.scale * x.abs() @ codebook.abs().T + bias.abs().clamp_max(1e9) + 2 * lse.abs()
    off = unit * ((x.shape[-1] + 8) * (p * size).amax(-1, keepdim=True) + 64) + unit * size
    off_p = off * p + torch.finfo(call.x.dtype).tiny
    size_of_f = f.abs() + (p * f.abs()).sum(-1, keepdim=True) + dlse.abs() + 2 * dentropy.abs() * (1 - logp)
    spread, many = 4 * off_p * size_of_f, 4 * (off_p * (1 - logp)).sum(-1)
    bound = {"lse": off.amax(-1), "entropy": many, "sums": 2 * (weight.abs() * off_p).sum((0, 1))}
    bound["dx"] = call.scale * spread @ codebook.abs()
    summed = (spread + unit * (tokens / 48) * p * size_of_f).flatten(0, 1)  # blocks of tokens are added up in x's dtype
    return true, bound | {"dcodebook": call.scale * summed.T @ x.abs().flatten(0, 1), "dbias": summed.sum(0)}


def assert_sampled(call: Call, codes: Tensor) -> None:
    """The running sum of p passes ``uniform`` at the code, within the sum's rounding."""
    logits = call.scale * call.x.double() @ call.codebook.double().T + (0 if call.bias is None else call.bias.double())
    p = logits.softmax(-1)
    at = codes[..., None]
    until = p.cumsum(-1).gather(-1, at)[..., 0]
    slack = 1e-4 if call.x.dtype == torch.float32 else 1e-12
    assert ((until > call.uniform - slack) & (until - p.gather(-1, at)[..., 0] < call.uniform + slack)).all()


def assert_close(call: Call) -> None:
    outputs = call.outputs()
    true, bound = oracle(call)
    for name, expected in true.items():
        assert outputs[name].dtype == call.x.dtype
        assert outputs[name].shape == expected.shape
        excess = ((outputs[name] - expected).abs() - bound[name]).max().item() if expected.numel() else 0.0
        assert excess <= 0, (name, excess)
    assert_sampled(call, outputs["codes"])


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# ------------------------------------------------------------------------------------------ formula


@pytest.mark.parametrize(("n", "size", "dim"), SHAPES)
def test_kernels_are_the_formula(instruction_set: str, n: int, size: int, dim: int):
    assert_close(make_call(n, size, dim, scale=0.5))


@pytest.mark.parametrize(("n", "size", "dim"), SHAPES)
def test_float64_is_the_formula(n: int, size: int, dim: int):
    assert_close(make_call(n, size, dim, scale=0.5, dtype=torch.float64))


def test_strips_of_tokens_add_up(instruction_set: str):
    """More tokens than one strip holds: in groups, with kept logits, and with chunks of codes at a large D."""
    assert_close(make_call(8200, 3, 2))
    assert_close(make_call(260, 16384, 64, scale=0.1))
    assert_close(make_call(100, 2048, 4096, scale=0.02))


@pytest.mark.parametrize("left_out", ["bias", "dcode_sums", "direction"])
def test_optional_arguments(instruction_set: str, left_out: str):
    assert_close(replace(make_call(50, 700, 12), **{left_out: None}))


def test_a_codebook_gradient_that_is_not_needed_is_empty(instruction_set: str):
    call = make_call(60, 700, 12)
    with_it, without = call.outputs(), call.outputs(need_codebook=False)
    assert without["dcodebook"].shape == (0, 12)
    assert without["dbias"].shape == (0,)
    assert torch.equal(with_it["dx"], without["dx"])


@pytest.mark.parametrize("scale", [100.0, 400.0])
def test_low_temperatures(instruction_set: str, scale: float):
    call = make_call(40, 900, 16, scale)
    call.x, call.codebook = (torch.nn.functional.normalize(t, dim=-1) for t in (call.x, call.codebook))
    assert_close(call)


def test_logits_far_beyond_what_exp_can_take(instruction_set: str):
    call = make_call(30, 200, 8, scale=1000.0)
    outputs = call.outputs()
    logits = call.scale * call.x.double() @ call.codebook.double().T + call.bias.double()
    assert logits.amax(-1).min() > 1000  # exp's end is 88
    torch.testing.assert_close(outputs["lse"], logits.amax(-1).float())
    assert torch.equal(outputs["codes"], logits.argmax(-1))
    assert_close(call)


def test_one_code_is_certain(instruction_set: str):
    outputs = replace(make_call(20, 1, 6, scale=30.0), dlse=torch.zeros(1, 20)).outputs()
    assert outputs["entropy"].abs().max() == 0
    assert outputs["dx"].abs().max() < 1e-3
    assert outputs["codes"].abs().max() == 0


@pytest.mark.parametrize(("size", "dim"), [(262144, 4), (262144, 18)])
def test_many_codes_keep_their_precision(size: int, dim: int):
    """Sums over 2^18 codes: the entropy loss to 1e-5, gradients to 1e-5 of their norm."""
    call = make_call(6, size, dim)
    outputs = call.outputs()
    for name, expected in oracle(call)[0].items():
        assert (outputs[name] - expected).norm() < 1e-5 * expected.norm(), name


# ------------------------------------------------------------------------------- layouts and threads


def _shapes_of_memory(x: Tensor) -> dict[str, Tensor]:
    """The numbers of x [2, T, D] in other strides."""
    wide = torch.zeros(2, x.shape[1], 2 * x.shape[2] + 1)
    wide[..., ::2][..., :-1] = x
    long = torch.zeros(2, 2 * x.shape[1], x.shape[2])
    long[:, ::2] = x
    return {
        "channels first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "every second number": wide[..., ::2][..., :-1],
        "every second token": long[:, ::2],
    }


@pytest.mark.parametrize("layout", ["channels first", "every second number", "every second token"])
def test_strides_do_not_matter(layout: str):
    call = make_call(106, 300, 7)
    for name in ("x", "direction"):
        setattr(call, name, getattr(call, name).view(2, 53, 7))
    for name in ("dlse", "dentropy", "weight", "uniform"):
        setattr(call, name, getattr(call, name).view(2, 53))
    x, direction = (_shapes_of_memory(t)[layout] for t in (call.x, call.direction))
    strided = replace(call, x=x, direction=direction, dlse=call.dlse.T.contiguous().T)
    outputs = strided.outputs()
    assert_same(call.outputs(), outputs)
    assert outputs["dx"].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(("n", "size", "dim"), [(1000, 90, 8), (60, 5000, 18), (300, 2000, 33)])
def test_threads_do_not_show(instruction_set: str, n: int, size: int, dim: int):
    call = make_call(n, size, dim)
    torch.set_num_threads(1)
    alone = call.outputs()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same(alone, call.outputs())


# -------------------------------------------------------------------------------- unusual arguments


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_stands_alone(instruction_set: str, value: float):
    call = make_call(60, 130, 9)
    call.x[0, 17, 3] = value
    outputs = call.outputs()
    for name in ("lse", "entropy", "dx"):
        assert outputs[name][0, 17].isnan().all()
    assert outputs["codes"][0, 17] == -1
    rest = torch.arange(60) != 17
    per_token = ("x", "dlse", "dentropy", "weight", "uniform", "direction")
    without = replace(call, **{name: getattr(call, name)[:, rest] for name in per_token})
    true, bound = oracle(without)
    for name, expected in true.items():
        value_of = outputs[name][:, rest] if name in ("lse", "entropy", "dx") else outputs[name]
        assert ((value_of - expected).abs() <= bound[name]).all(), name


def test_a_code_with_a_bias_of_minus_infinity_does_not_exist(instruction_set: str):
    call = make_call(200, 70, 9, scale=0.1)
    closed = torch.arange(70) % 3 == 0
    call.bias[closed] = -float("inf")
    outputs = call.outputs()
    open_only = replace(call, **{n: getattr(call, n)[~closed] for n in ("codebook", "bias", "dcode_sums")})
    true, bound = oracle(open_only)
    for name, expected in true.items():
        whole = name in ("sums", "dcodebook", "dbias")
        assert ((outputs[name][~closed] if whole else outputs[name]) - expected).abs().le(bound[name]).all(), name
        assert not whole or outputs[name][closed].abs().max() == 0, name
    assert not closed[outputs["codes"]].any()


def test_no_tokens(instruction_set: str):
    outputs = make_call(0, 70, 9).outputs()
    assert outputs["lse"].shape == outputs["entropy"].shape == outputs["codes"].shape == (1, 0)
    assert outputs["dx"].shape == (1, 0, 9)
    for name, shape in (("sums", (70,)), ("dcodebook", (70, 9)), ("dbias", (70,))):
        assert torch.equal(outputs[name], torch.zeros(shape)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_at_the_ends_of_the_unit_interval(dtype: torch.dtype):
    call = make_call(40, 1300, 6, dtype=dtype)
    call.uniform = torch.zeros(1, 40, dtype=dtype)
    assert call.outputs()["codes"].max() == 0
    call.uniform = torch.full((1, 40), 1 - torch.finfo(dtype).eps / 2, dtype=dtype)
    assert_sampled(call, call.outputs()["codes"])
    call.uniform = torch.ones(1, 40, dtype=dtype)  # not below 1, yet never beyond the last code
    assert call.outputs()["codes"].max() < 1300


@pytest.mark.parametrize("kernels", [kernels, reference_softmax], ids=["compiled", "reference"])
def test_large_logits_draw_no_code_of_probability_zero(kernels: ModuleType):
    """One code has all the probability, and lse, near 9000, the rounding of its size: 5e-4."""
    x = torch.rand(1, 400, 40, generator=torch.Generator().manual_seed(0)) + 0.5
    codebook = torch.full((64, 40), 0.5)
    codebook[0] = 1.0
    lse, _ = kernels.softmax_forward(x, codebook, None, 225.0)
    uniform = 1 - 2.0 ** -torch.arange(400).remainder(25)[None]  # 0, 1/2, 3/4 ... 1 - 2^-24
    assert not kernels.softmax_sample(x, codebook, None, 225.0, lse, uniform).any()


def test_errors_name_the_argument():
    call = make_call(4, 5, 3)
    args = (call.x, call.codebook, call.bias, call.scale)
    with pytest.raises(RuntimeError, match=r"bias: expected size 5 \(K of codebook\)"):
        kernels.softmax_forward(call.x, call.codebook, torch.zeros(4), 1.0)
    with pytest.raises(RuntimeError, match="codebook: expected dtype Float like x"):
        kernels.softmax_forward(call.x, call.codebook.double(), None, 1.0)
    with pytest.raises(RuntimeError, match=r"weight: expected size 4 \(T of x\)"):
        kernels.softmax_code_sums(*args, call.dlse, call.weight[:, :3])
    with pytest.raises(RuntimeError, match="x: expected float32 or float64, got Half"):
        kernels.softmax_forward(call.x.half(), call.codebook.half(), None, 1.0)


# ------------------------------------------------------------------------------------------- memory

BUDGET_MB = 48
PEAK = """
import re, torch
from vqkernels import _extension
from vqkernels.kernels import compiled_softmax as kernels

def status_mb(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024

def step(x, codebook):
    lse, entropy = kernels.softmax_forward(x, codebook, None, 1.0)
    sums = kernels.softmax_code_sums(x, codebook, None, 1.0, lse, lse)
    kernels.softmax_backward(x, codebook, None, 1.0, lse, lse, lse, lse, sums, x, True)

_extension.cpu_library()
step(torch.randn(1, 64, 8), torch.randn(4096, 8))  # thread pools, code pages
x, codebook = torch.randn(1, 8192, 8), torch.randn(16384, 8)
open("/proc/self/clear_refs", "w").write("5")
before = status_mb("VmRSS")
step(x, codebook)
print(status_mb("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_no_array_of_tokens_by_codes():
    """8192 tokens and 16384 codes: one such array is 512 MB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < BUDGET_MB
