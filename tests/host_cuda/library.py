"""The CUDA kernels' device code, compiled for the host and callable on CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off"]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
COARSE_GROUPS = 8  # lane groups of csrc/cuda/nearest_mma.cuh
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def compiler() -> str | None:
    """$CXX or c++, where there is one."""
    return shutil.which(os.environ.get("CXX") or "c++")


def sources() -> list[Path]:
    """Everything that a build reads."""
    return sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.cuh")])


def cache_folder() -> Path:
    """A folder of this user's that a second run finds again."""
    folder = Path(tempfile.gettempdir()) / f"vqkernels-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def digest_of(paths: list[Path], *words: str) -> str:
    """A short name for the contents of ``paths``."""
    digest = hashlib.sha256(" ".join(words).encode())
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_cpp(name: str, flags: list[str]) -> Path:
    """Compile ``name``.cpp unless the cache has it."""
    command = [compiler() or "c++", *FLAGS, *flags]
    out = cache_folder() / f"{name}-{digest_of(sources(), *command)}"
    if not out.exists():
        unfinished = out.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, str(HERE / f"{name}.cpp"), "-o", str(unfinished)], check=True)
        unfinished.replace(out)
    return out


def links(flags: list[str]) -> bool:
    """Whether the compiler can make a program with ``flags``: some systems package sanitizer runtimes apart."""
    command = [compiler() or "c++", *flags, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main() {}", text=True, capture_output=True, check=False).returncode == 0


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The functions of driver.cpp."""
    functions = ctypes.CDLL(str(compile_cpp("driver", ["-fPIC", "-shared"])))
    functions.host_coarse.restype = ctypes.c_int64
    return functions


class _View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_int64 * 3), ("stride", ctypes.c_int64 * 3))


class Counted(ctypes.Structure):
    """Of a search: kernel launches, and tokens that took the exact road."""

    _fields_ = (("launches", ctypes.c_int64), ("exact_road", ctypes.c_int64))


def _view(x: Tensor):  # [B, T, D]
    return ctypes.byref(_View(x.data_ptr(), (ctypes.c_int64 * 3)(*x.shape), (ctypes.c_int64 * 3)(*x.stride())))


def _data(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _begin(x: Tensor, seed: int) -> tuple[ctypes.c_uint64, int]:
    return ctypes.c_uint64(seed), TYPES[x.dtype]


def nearest(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    metric: str,
    precision: str,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    return nearest_and_count(x, codebook, metric, precision, seed)[:2]


def nearest_and_count(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    metric: str = "euclidean",
    precision: str = "exact",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Counted]:  # codes int64 [B, T], distance float32 [B, T]
    codes = torch.full(x.shape[:2], -7, dtype=torch.int64)
    distance = torch.full(x.shape[:2], -7.0)
    size = ctypes.c_int64(codebook.shape[0])
    flags = ctypes.c_bool(metric == "cosine"), ctypes.c_bool(precision == "exact")
    tail = _data(codebook), size, *flags, _data(codes), _data(distance)
    counted = Counted()
    library().host_nearest(*_begin(x, seed), _view(x), *tail, ctypes.byref(counted))
    return codes, distance, counted


def nearest_prepared(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    metric: str,
    precision: str,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    codes = torch.full(x.shape[:2], -7, dtype=torch.int64)
    distance = torch.full(x.shape[:2], -7.0)
    size = ctypes.c_int64(codebook.shape[0])
    flags = ctypes.c_bool(metric == "cosine"), ctypes.c_bool(precision == "exact")
    tail = _data(codebook), size, *flags, _data(codes), _data(distance)
    library().host_nearest_prepared(*_begin(x, seed), _view(x), *tail)
    return codes, distance


def coarse_pass(
    tokens: Tensor,  # float16 [N, depth]
    codes: Tensor,  # float16 [rows, depth]
    bias: Tensor,  # [rows]
    scale: Tensor,  # [N]
    split: bool,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # lowest, runner-up, code: [N, splits, COARSE_GROUPS]
    states = torch.full((len(tokens), 64 * COARSE_GROUPS, 3), -7, dtype=torch.int32)
    sizes = [ctypes.c_int64(size) for size in (*tokens.shape[:1], *codes.shape)]
    data = [_data(tensor) for tensor in (tokens, codes, bias, scale)]
    splits = library().host_coarse(ctypes.c_uint64(seed), *data, *sizes, ctypes.c_bool(split), _data(states))
    used = states.flatten()[: len(tokens) * splits * COARSE_GROUPS * 3].view(len(tokens), splits, COARSE_GROUPS, 3)
    return used[..., 0].view(torch.float32), used[..., 1].view(torch.float32), used[..., 2]


def gather(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    codes: Tensor,  # [B, T]
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # quantized [B, T, D], error [B, T]
    quantized, error = torch.empty_like(x).fill_(7), torch.full(x.shape[:2], -7.0, dtype=_wide(x))
    size = ctypes.c_int64(codebook.shape[0])
    tail = _data(codes), _view(quantized), _data(error)
    library().host_gather(*_begin(x, seed), _view(x), _data(codebook), size, *tail)
    return quantized, error


def quantize_backward(
    x: Tensor,  # [B, T, D]
    quantized: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    dquantized: Tensor | None,  # [B, T, D]
    derror: Tensor | None,  # [B, T]
    rotation: bool,
    mask: Tensor | None = None,  # bool [B, T]
    seed: int = 0,
) -> Tensor:  # dx [B, T, D]
    dx = torch.empty_like(x).fill_(7)
    gradient = None if dquantized is None else _view(dquantized)
    error, real = (None if each is None else _data(each) for each in (derror, mask))
    tail = _data(codes), gradient, error, ctypes.c_bool(rotation), _view(dx), real
    library().host_quantize_backward(*_begin(x, seed), _view(x), _view(quantized), *tail)
    return dx


def codebook_stats(
    x: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    codebook_size: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # counts [K], sums [K, D]
    counts = torch.full((codebook_size,), -7.0, dtype=_wide(x))
    sums = torch.full((codebook_size, x.shape[2]), -7.0, dtype=_wide(x))
    tail = _data(codes), ctypes.c_int64(codebook_size), _data(counts), _data(sums)
    library().host_codebook_stats(*_begin(x, seed), _view(x), *tail)
    return counts, sums


def ema_update_(
    codebook: Tensor,  # [K, D], written
    cluster_size: Tensor,  # [K], written
    embed_sum: Tensor,  # [K, D], written
    counts: Tensor,  # [K]
    sums: Tensor,  # [K, D]
    revive: Tensor,  # bool [K]
    decay: float,
    eps: float,
    revived_size: float,
    normalize: bool,
    plain: bool = False,
    seed: int = 0,
) -> None:
    tensors = [_data(tensor) for tensor in (codebook, cluster_size, embed_sum, counts, sums, revive)]
    sizes = [ctypes.c_int64(size) for size in codebook.shape]
    scalars = [ctypes.c_double(value) for value in (decay, eps, revived_size)]
    library().host_ema_update(
        *_begin(codebook, seed), *tensors, *sizes, *scalars, *map(ctypes.c_bool, (normalize, plain))
    )


def rotate_without_barrier(seed: int) -> Tensor:  # int64 [64]
    """A kernel that is wrong on purpose."""
    out = torch.empty(64, dtype=torch.int64)
    library().host_rotate_without_barrier(ctypes.c_uint64(seed), _data(out))
    return out


def copy_without_wait(chunks: Tensor) -> Tensor:  # int32 [64, 4] -> int64 [64]
    """Another: it reads shared memory before the copy into it has arrived."""
    out = torch.empty(64, dtype=torch.int64)
    library().host_copy_without_wait(_data(chunks), _data(out))
    return out
