"""The Hopper kernel of the CUDA search: run on the host with its copies, barriers and products modelled; compiled."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from adversarial import Case, cases, true_nearest
from host_cuda import library as host
from host_cuda import ptxas
from requirements import skip_or_fail
from torch import Tensor

import vqkernels as vq

LANES, GRANULE, TILE = 4, 8, 128

FLOAT_CASES = [
    (metric, case) for metric in ("euclidean", "cosine") for case in cases(metric) if case.x.dtype == torch.float32
]

# what is missing or wrong, and what the model then says
FAULTS = {
    "wait": "more arrivals than",  # nobody waits for a copy
    "parity": "ended before its copies",
    "stride": "wrong",
    "swizzle": "a descriptor without a swizzle",
    "results": "a thread ended before its products",
    "early-release": "wrong",  # a buffer is given back while products read it
    "fence": "wgmma without a fence",
    "barrier-fence": "an mbarrier that no fence published",
    "release": "every thread waits",
    "bytes": "every thread waits",
    "sync": "an mbarrier that nobody initialised",
}


@pytest.fixture(autouse=True, scope="module")
def _compiler():
    if host.compiler() is None:
        skip_or_fail("c++", "no C++ compiler")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(host.compile_cpp("hopper_search", ["-fPIC", "-shared"])))


def _plan(tokens: int, rows: int, split: bool, processors: int = 3) -> tuple[int, int]:
    """Splits of the codes, and tiles in each. The host has three processors."""
    out = (ctypes.c_int64 * 2)()
    sizes = ctypes.c_int64(tokens), ctypes.c_int64(rows)
    _library().hopper_plan(*sizes, ctypes.c_bool(split), ctypes.c_int64(processors), out)
    return out[0], out[1]


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _operands(tokens: int, rows: int, depth: int, split: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [N, depth], codes [rows, depth], bias [rows] with some codes out of reach, scale [N]."""
    x, c = _randn(tokens, depth, seed=1).half(), _randn(rows, depth, seed=2).half()
    bias, scale = _randn(rows, seed=3), 2.0 ** _randn(tokens, seed=4).round()
    bias[5::60] = float("inf")
    return x, c, torch.zeros(rows) if split else bias, scale


def _states(x: Tensor, c: Tensor, bias: Tensor, scale: Tensor, split: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel writes: first, second, code, each [N, splits, LANES]."""
    sizes = [ctypes.c_int64(size) for size in (x.shape[0], c.shape[0], x.shape[1])]
    splits, _ = _plan(len(x), len(c), split)
    states = torch.full((x.shape[0], splits, LANES, 3), -7, dtype=torch.int32)
    data = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, c, bias, scale)]
    _library().hopper_scores(
        ctypes.c_uint64(seed), *data, *sizes, ctypes.c_bool(split), ctypes.c_void_p(states.data_ptr())
    )
    return states[..., 0].view(torch.float32), states[..., 1].view(torch.float32), states[..., 2]


def _scores_by_lane(
    x: Tensor,  # [N, depth]
    c: Tensor,  # [rows, depth]
    bias: Tensor,  # [rows]
    scale: Tensor,  # [N]
) -> Tensor:  # float64 [N, rows / TILE, LANES, granules, GRANULE]
    """Scores in float64, as coarse.cuh deals the codes' rows out to lanes."""
    scores = x.double() @ c.double().T + bias.double() * scale.double()[:, None]
    split = scores.view(len(x), -1, TILE // 32, 4, LANES, 2)  # tile, 32 rows, j, lane, e
    return split.permute(0, 1, 4, 2, 3, 5).reshape(len(x), -1, LANES, TILE // 32, GRANULE)


SHAPES = [
    (5, 256, 16, True),
    (300, 768, 32, True),
    (2600, 256, 16, True),  # four tiles of tokens for some blocks
    (200, 1280, 64, True),
    (70, 512, 112, True),
    (70, 256, 64, False),
    (300, 2048, 256, False),
    (1700, 256, 256, False),  # three tiles of tokens for each block, which holds one
    (260, 512, 320, False),
    (10, 512, 384, False),
    (1, 256, 80, False),
]


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(("tokens", "rows", "depth", "split"), SHAPES)
def test_states_are_those_of_a_plain_product(tokens: int, rows: int, depth: int, split: bool, seed: int):
    operands = _operands(tokens, rows, depth, split)
    first, second, code = _states(*operands, split, seed)
    scores = _scores_by_lane(*operands)
    _, per_split = _plan(tokens, rows, split)
    for s in range(first.shape[1]):
        part = scores[:, s * per_split : (s + 1) * per_split].movedim(2, 1)  # [N, LANES, tiles, granules, GRANULE]
        offers = (part.amin(-1) if split else part).flatten(2)  # in the order of codes
        lowest, at = offers.sort(dim=-1, stable=True)
        tolerance = depth * 2.0**-24 * depth  # of float32 sums of N(0, 1) products
        torch.testing.assert_close(first[:, s], lowest[..., 0].float(), rtol=0, atol=tolerance)
        torch.testing.assert_close(second[:, s], lowest[..., 1].float(), rtol=0, atol=tolerance)
        granule = at[..., 0] if split else at[..., 0] // GRANULE
        true = ((s * per_split * TILE // 32 + granule) * LANES + torch.arange(LANES)) * GRANULE
        true = true if split else true + at[..., 0] % GRANULE
        clear = lowest[..., 1] - lowest[..., 0] > tolerance
        assert torch.equal(code[:, s][clear].long(), true[clear])


@pytest.mark.parametrize(
    ("tokens", "rows", "split", "splits", "tiles"),
    [
        (16384, 1024, False, 2, 4),  # 64 tiles of tokens on 132 processors: the codes in halves
        (65536, 16384, True, 1, 128),  # 256 tiles of tokens: two rounds, nearly full
        (1, 256, True, 2, 1),
    ],
)
def test_plans_fill_the_processors(tokens: int, rows: int, split: bool, splits: int, tiles: int):
    assert _plan(tokens, rows, split, 132) == (splits, tiles)


def test_every_seed_gives_the_same_bits():
    operands = _operands(260, 512, 96, False)
    runs = [_states(*operands, False, seed) for seed in range(4)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.fixture(scope="module")
def whole_search() -> Iterator[None]:
    """host.nearest with the Hopper kernel as its coarse pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "library", _library)
        yield


@pytest.mark.usefixtures("whole_search")
@pytest.mark.parametrize(("metric", "case"), FLOAT_CASES, ids=lambda value: str(value))
def test_the_whole_search_is_exact(metric: str, case: Case):
    seed = len(case.name) % 2 * 5  # in order and as late as may be, or at random
    codes, _ = host.nearest(case.x[None].contiguous(), case.codebook.contiguous(), metric, "exact", seed)
    assert torch.equal(codes[0], true_nearest(case.x, case.codebook, metric)[0])


@pytest.mark.usefixtures("whole_search")
@pytest.mark.parametrize(("tokens", "codes", "dim"), [(700, 600, 9), (20, 1500, 70), (300, 300, 200)])
def test_the_whole_search_of_many_tiles(tokens: int, codes: int, dim: int):
    x, codebook = _randn(tokens, dim, seed=5), _randn(codes, dim, seed=6)
    codebook[codes // 2 :: 3] = codebook[: len(codebook[codes // 2 :: 3])] * (1 + 2.0**-22)
    found, _ = host.nearest(x[None], codebook, "euclidean", "exact", 3)
    assert torch.equal(found[0], torch.cdist(x.double(), codebook.double()).argmin(1))


@lru_cache(maxsize=1)
def _program() -> Path:
    if not host.links(host.SANITIZE):
        skip_or_fail("sanitizers", "the compiler has no sanitizer runtimes")
    return host.compile_cpp("hopper_sanitized", [*host.SANITIZE, "-O0"])  # -O1 takes twice as long


def test_sanitizers_find_nothing():
    done = subprocess.run([_program()], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "ok"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str):
    """The model itself: a kernel with one primitive broken gives wrong numbers or a message."""
    done = subprocess.run([_program(), fault], capture_output=True, text=True, timeout=300, check=False)
    assert FAULTS[fault] in done.stdout + done.stderr


# -------------------------------------------------------------------------------------------- on a device


@pytest.fixture
def hopper_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiled backend on a device of compute capability 9.0, with this kernel."""
    if not torch.cuda.is_available():
        skip_or_fail("cuda", "no CUDA device")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper device")
    monkeypatch.setenv("VQKERNELS_CUDA_COARSE", "hopper")
    with vq.use_backend("compiled"):
        yield


@pytest.mark.usefixtures("hopper_device")
@pytest.mark.parametrize(("metric", "case"), FLOAT_CASES, ids=lambda value: str(value))
def test_the_device_is_exact(metric: str, case: Case):
    codes, _ = vq.nearest(case.x.cuda(), case.codebook.cuda(), metric=metric)
    assert torch.equal(codes.cpu(), true_nearest(case.x, case.codebook, metric)[0])


@pytest.mark.usefixtures("hopper_device")
@pytest.mark.parametrize("dim", [3, 8, 18, 32, 48, 49, 64, 200, 256, 384])
@pytest.mark.parametrize(("tokens", "codes"), [(16384, 1024), (1000, 20011), (70001, 300)])
def test_the_device_agrees_with_the_other_kernel(monkeypatch, tokens: int, codes: int, dim: int):
    x, codebook = _randn(tokens, dim, seed=7).cuda(), _randn(codes, dim, seed=8).cuda()
    found = [vq.nearest(x, codebook)[0] for _ in range(3)]
    monkeypatch.setenv("VQKERNELS_CUDA_COARSE", "mma")
    expected, _ = vq.nearest(x, codebook)
    assert all(torch.equal(each, expected) for each in found)


# -------------------------------------------------------------------------------------------- compiled


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The kernels' machine code; ptxas's messages lie beside it."""
    if ptxas.nvcc() is None:
        skip_or_fail("nvcc", "no nvcc")
    return ptxas.compile_kernels("90a", "hopper_kernels")


@pytest.fixture(scope="module")
def opcodes(compiled: Path) -> dict[str, list[str]]:
    """Each kernel's instructions, in their order."""
    disassembler = ptxas.disassembler()
    if disassembler is None:
        skip_or_fail("nvcc", "no cuobjdump")
    done = subprocess.run([str(disassembler), "-sass", compiled], capture_output=True, text=True, check=True)
    parts = re.split(r"^\s*Function : (\w+)$", done.stdout, flags=re.MULTILINE)
    opcode = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", flags=re.MULTILINE)
    names = [ptxas.demangled(name) for name in parts[1::2]]
    return dict(zip(names, map(opcode.findall, parts[2::2]), strict=True))


def test_every_kernel_fits(compiled: Path):
    log = compiled.with_suffix(".log").read_text()
    assert not re.search(r"warning|\(C7\d+\)", log)  # products serialised, setmaxnreg ignored, fences put in
    kernels = ptxas.usage(log)
    assert len(kernels) == 4
    for kernel in kernels:  # 168 registers at the start: 65536 / 384
        assert (kernel.registers, kernel.stack, kernel.spilled, kernel.shared) == (168, 0, 0, 0), kernel


def test_products_and_copies_are_those_of_the_hardware(opcodes: dict[str, list[str]]):
    for kernel in opcodes.values():
        assert {"HGMMA", "UTMALDG", "SYNCS", "USETMAXREG"} <= set(kernel)
        assert not {"HMMA", "LDL", "STL", "LDSM"} & set(kernel)


def test_few_instructions_fold_a_score(opcodes: dict[str, list[str]]):
    """128 scores a thread and tile: what the folding costs on the unit that limits it, and in all."""
    for name, kernel in opcodes.items():
        split = name.endswith("true>")
        limiting = sum(kernel.count(opcode) for opcode in ("FMNMX", "FSETP", "FSEL"))
        assert limiting <= (1.4 if split else 3) * 128
        assert limiting + kernel.count("FFMA") <= (1.75 if split else 6.5) * 128


def test_buffers_are_given_back_before_scores_are_folded(opcodes: dict[str, list[str]]):
    for kernel in opcodes.values():
        first, last = kernel.index("FMNMX"), len(kernel) - kernel[::-1].index("FMNMX")
        assert "SYNCS" not in kernel[first:last]
