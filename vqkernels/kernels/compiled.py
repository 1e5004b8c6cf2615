"""The C++ and CUDA C++ kernels, as the registry knows them. The work is in csrc/."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from .. import _extension
from .._dtypes import DTYPES
from .in_steps import (
    add_in_steps,
    both_details,
    both_in_steps,
    clear_consumed,
    gradient_in_steps,
    quantize_in_steps,
    step_in_steps,
)
from .registry import register

NON_FINITE = "codebook: expected finite values, got NaN or Inf"  # as csrc/cpu/coarse.cpp says it
CODES_BEYOND = "codes: expected values below codebook_size"  # as csrc/cpu/groups.cpp says it


class _ValueErrors:
    """ValueError for what is wrong with a value: RuntimeError is the only type that the stable ABI can throw.

    A class, since entering a generator costs microseconds, in every call of every op.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError):
            line = str(error).splitlines()[0]
            if NON_FINITE in line or CODES_BEYOND in line:
                raise ValueError(line) from None


value_errors = _ValueErrors()


def nearest(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    """See ``vqkernels.nearest``."""
    with value_errors:
        return torch.ops.vqkernels_C.nearest(x, codebook, metric == "cosine", precision == "exact")


def nearest_both(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    mask: Tensor | None,  # bool [B, T]
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # codes [B, T], distance [B, T], tokens [K], token_distance [K]
    """See ``vqkernels.nearest_both``."""
    if x.is_cuda or x.dtype == torch.float64:
        return _both_in_steps(x, codebook, mask, metric)
    with value_errors:
        return torch.ops.vqkernels_C.nearest_both(x, codebook, mask, metric == "cosine")


_both_in_steps = both_in_steps(nearest)


def nearest_k(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    k: int,
    metric: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T, k], distance float32 [B, T, k]
    """See ``vqkernels.nearest_k``."""
    with value_errors:
        return torch.ops.vqkernels_C.nearest_k(x, codebook, k, metric == "cosine")


STAGES = ("prepare", "tokens", "coarse", "rerank", "scan")  # as csrc/cpu/report.h has them
PASSES = ("byte", "int8", "int16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class SearchReport:
    """One search on the CPU and what it says of itself."""

    codes: Tensor  # int64 [B, T]
    distance: Tensor  # float32 [B, T]
    coarse_pass: str  # of PASSES
    instruction_set: str  # avx512 | avx2 | portable
    threads: int
    seconds: dict[str, float]  # by stage, of all threads together divided by their number
    tokens: int
    certified: int  # tokens whose coarse pass left one granule of codes
    candidates: float  # granules left per token of the coarse road
    codes_reranked: int  # code values computed anew, in float64, after the byte pass in float32 first
    scanned: int  # tokens that took the float64 pass over all codes
    refined: int  # tokens that the byte pass left to a finer one
    prepared_from_cache: bool  # the codebook was unchanged


def nearest_report(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    metric: str,
    precision: str,
) -> SearchReport:
    """``nearest`` with a clock at every stage. CPU tensors only.

    Raises:
        RuntimeError: the C++ kernels cannot be had; the message says why.
    """
    reason = _extension.cpu_library()
    if reason is not None:
        raise RuntimeError(f"the C++ kernels cannot be had: {reason}")
    raw = torch.ops.vqkernels_C.nearest_report(x, codebook, metric == "cosine", precision == "exact")
    codes, distance, numbers = raw
    *seconds, certified, candidates, reranked, scanned, refined, cached, which = numbers.tolist()
    threads, tokens = torch.get_num_threads(), codes.numel()
    return SearchReport(
        codes=codes,
        distance=distance,
        coarse_pass=PASSES[int(which)] if which >= 0 else "none",
        instruction_set=_extension.instruction_set() or "?",
        threads=threads,
        # the codebook is prepared by all threads at once, seen from the one that waits for them
        seconds={
            name: spent / (1 if name == "prepare" else threads) for name, spent in zip(STAGES, seconds, strict=True)
        },
        tokens=tokens,
        certified=int(certified),
        candidates=candidates / max(1, tokens - int(scanned)),
        codes_reranked=int(reranked),
        scanned=int(scanned),
        refined=int(refined),
        prepared_from_cache=bool(cached),
    )


def peak_rates(threads: int) -> dict[str, float]:
    """Operations a second (two a multiply-add) on registers alone, by coarse pass; 0 where the CPU has no such pass.

    Raises:
        RuntimeError: the C++ kernels cannot be had; the message says why.
    """
    rate = ctypes.CDLL(str(_extension.library_path())).vqkernels_peak_rate
    rate.argtypes, rate.restype = [ctypes.c_char_p], ctypes.c_double
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
        return {name: sum(pool.map(rate, [name.encode()] * threads)) for name in ("float32", "int16", "int8", "byte")}


def quantize(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    mask: Tensor | None,  # bool [B, T]
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # quantized [B, T, D], codes [B, T], error [B, T] float32 (float64 for float64)
    """Search, lookup and squared errors: one call on CPU."""
    if x.is_cuda:
        return _quantize_in_steps(x, codebook, mask, metric, precision)
    with value_errors:
        return torch.ops.vqkernels_C.quantize(x, codebook, mask, metric == "cosine", precision == "exact")


def gather(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    codes: Tensor,  # [B, T]
) -> tuple[Tensor, Tensor]:  # quantized [B, T, D], error [B, T] float32 (float64 for float64)
    """Codebook rows in the layout of x, and their squared distance to x."""
    return torch.ops.vqkernels_C.gather(x, codebook, codes)


def quantize_backward(
    x: Tensor,  # [B, T, D]
    quantized: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    dquantized: Tensor | None,  # [B, T, D]
    derror: Tensor | None,  # [B, T] float32 (float64 for float64)
    rotation: bool,
    mask: Tensor | None = None,  # bool [B, T]
) -> Tensor:  # dx [B, T, D]
    """The gradient of a quantized token and its error with respect to x; absent gradients are zero."""
    return torch.ops.vqkernels_C.quantize_backward(x, quantized, codes, dquantized, derror, rotation, mask)


def codebook_gradient(
    x: Tensor,  # [B, T, D]
    quantized: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    derror: Tensor,  # [B, T] float32 (float64 for float64)
    codebook_size: int,
) -> Tensor:  # dcodebook [K, D]
    """The gradient of the errors with respect to the codebook; one pass without a temporary on CPU."""
    if x.is_cuda:
        return _gradient_in_steps(x, quantized, codes, derror, codebook_size)
    return torch.ops.vqkernels_C.codebook_gradient(x, quantized, codes, derror, codebook_size)


def codebook_stats(
    x: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    codebook_size: int,
) -> tuple[Tensor, Tensor]:  # counts [K], sums [K, D]
    """How many tokens have each code, and their sum; bitwise the same for any number of threads."""
    with value_errors:
        return torch.ops.vqkernels_C.codebook_stats(x, codes, codebook_size)


def add_statistics_(
    x: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    counts: Tensor,  # [K], written
    sums: Tensor | None,  # [K, D], written
) -> None:
    """Adds them to what is there; on CPU only the rows of codes with a token are visited."""
    if x.is_cuda:
        return _add_in_steps(x, codes, counts, sums)
    with value_errors:
        torch.ops.vqkernels_C.add_statistics_(x, codes, counts, sums)


_quantize_in_steps = quantize_in_steps(nearest, gather)
_gradient_in_steps = gradient_in_steps(codebook_stats)
_add_in_steps = add_in_steps(codebook_stats)


def ema_update_(
    codebook: Tensor,  # [K, D], written
    cluster_size: Tensor,  # [K], written
    embed_sum: Tensor,  # [K, D], written
    counts: Tensor,  # [K], zeroed with ``consume``
    sums: Tensor,  # [K, D], likewise
    revive: Tensor,  # bool [K], likewise
    decay: float,
    eps: float,
    revived_size: float,
    normalize: bool,
    plain: bool = False,
    consume: bool = False,
) -> None:
    """One step of the codebook's moving average, in place; ``consume`` leaves zeros in counts, sums and revive."""
    state, statistics = (codebook, cluster_size, embed_sum), (counts, sums, revive)
    options = (decay, eps, revived_size, normalize, plain)
    in_kernel = consume and not codebook.is_cuda
    torch.ops.vqkernels_C.ema_update_(*state, *statistics, *options, in_kernel)
    clear_consumed(consume and not in_kernel, *statistics)


def ema_step_(
    x: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    codebook: Tensor,  # [K, D], written
    cluster_size: Tensor,  # [K], written
    embed_sum: Tensor,  # [K, D], written
    decay: float,
    eps: float,
    normalize: bool,
    plain: bool = False,
) -> None:
    """Statistics and update in one; on CPU without an array of sums, and bitwise the same as in two calls."""
    if x.is_cuda:
        return _step_in_steps(x, codes, codebook, cluster_size, embed_sum, decay, eps, normalize, plain)
    state = (codebook, cluster_size, embed_sum)
    with value_errors:
        torch.ops.vqkernels_C.ema_step_(x, codes, *state, decay, eps, normalize, plain)


_step_in_steps = step_in_steps(codebook_stats, ema_update_)


def supports(first: Tensor, *_rest: object) -> str | None:
    """None, or why the compiled kernels cannot take a tensor like ``first``."""
    if first.dtype not in DTYPES:
        return f"takes float32, float16, bfloat16 and float64, not {first.dtype}"
    if first.device.type == "cpu":
        return _extension.cpu_library()
    if first.device.type == "cuda":
        return _extension.cuda_library()
    return f"runs on cpu and cuda, not on {first.device.type}"


def supports_on_cpu(first: Tensor, *rest: object) -> str | None:
    """None, or why the C++ kernels cannot take a tensor like ``first``."""
    return supports(first, *rest) if first.device.type == "cpu" else f"runs on cpu, not on {first.device.type}"


def nearest_details(x: Tensor, codebook: Tensor, _metric: str, precision: str) -> str | None:
    """Which coarse pass runs, and why."""
    if x.device.type == "cuda":
        return _cuda_details(x)
    isa, forced = _extension.instruction_set(), os.environ.get("VQKERNELS_CPU_PASS")
    name = "float64" if x.dtype == torch.float64 else _coarse_pass(codebook.shape[0], x.shape[-1], precision == "exact")
    reason = {
        "byte": "products of bytes are half as quick again as int16's, whose pass decides what they cannot",
        "int8": "integers of two bytes on this CPU's tiles, their products several times as many as int16's",
        "int16": "its products are exact and twice as many as float32's",
        "float32": f"{isa} has no faster int16 products, or D is beyond 8192",
        "float64": "as precise as the input",
    }.get(name, "not known")
    if precision == "fast" and name == "float32":
        reason = 'precision="fast" is one pass in float32'
    elif forced and name != "float64":
        reason = f"VQKERNELS_CPU_PASS={forced}"
    return f"{name} pass ({isa}): {reason}"


def _both_details(x: Tensor, codebook: Tensor, _mask: Tensor | None, metric: str) -> str:
    if x.is_cuda or x.dtype == torch.float64:
        return both_details()
    return f"one sweep, {nearest_details(x, codebook, metric, 'exact')}"


def _cuda_details(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "float64 pass: as precise as the input"
    function = ctypes.CDLL(str(_extension.library_path("cuda"))).vqkernels_cuda_coarse_kernel
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_char_p
    name = function(torch.cuda.get_device_capability(x.device)[0]).decode()
    forced = os.environ.get("VQKERNELS_CUDA_COARSE")
    reason = f"VQKERNELS_CUDA_COARSE={forced}" if forced else "the default until another is measured"
    return f"scaled fp16 pass ({name}): {reason}"


def _coarse_pass(codes: int, dim: int, exact: bool) -> str:
    function = ctypes.CDLL(str(_extension.library_path())).vqkernels_coarse_pass
    function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int], ctypes.c_char_p
    return function(codes, dim, exact).decode()


register("nearest", "compiled", nearest, supports=supports, details=nearest_details)
register("nearest_both", "compiled", nearest_both, supports=supports, details=_both_details)
register("nearest_k", "compiled", nearest_k, supports=supports_on_cpu)
_TRAINING = (quantize_backward, codebook_gradient, codebook_stats, add_statistics_, ema_update_, ema_step_)
for _op in (gather, quantize, *_TRAINING):
    register(_op.__name__, "compiled", _op, supports=supports)
