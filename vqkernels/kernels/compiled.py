"""The C++ and CUDA C++ kernels, as the registry knows them. The work is in csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from .._dtypes import DTYPES
from .registry import register

NON_FINITE = "codebook: expected finite values, got NaN or Inf"  # as csrc/cpu/coarse.cpp says it


def nearest(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    """See ``vqkernels.nearest``."""
    try:
        return torch.ops.vqkernels_C.nearest(x, codebook, metric == "cosine", precision == "exact")
    except RuntimeError as error:  # the only type that the stable ABI can throw
        if NON_FINITE in str(error):
            raise ValueError(NON_FINITE) from None
        raise


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
    dquantized: Tensor,  # [B, T, D]
    derror: Tensor,  # [B, T] float32 (float64 for float64)
    rotation: bool,
) -> Tensor:  # dx [B, T, D]
    """The gradient of a quantized token and its error with respect to x."""
    return torch.ops.vqkernels_C.quantize_backward(x, quantized, codes, dquantized, derror, rotation)


def codebook_stats(
    x: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    codebook_size: int,
) -> tuple[Tensor, Tensor]:  # counts [K], sums [K, D]
    """How many tokens have each code, and their sum; bitwise the same for any number of threads."""
    return torch.ops.vqkernels_C.codebook_stats(x, codes, codebook_size)


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
) -> None:
    """One step of the codebook's moving average, in place."""
    state = (codebook, cluster_size, embed_sum)
    torch.ops.vqkernels_C.ema_update_(*state, counts, sums, revive, decay, eps, revived_size, normalize)


def _supports(first: Tensor, *_rest: object) -> str | None:
    """None, or why the compiled kernels cannot take a tensor like ``first``."""
    if first.dtype not in DTYPES:
        return f"takes float32, float16, bfloat16 and float64, not {first.dtype}"
    if first.device.type == "cpu":
        return _extension.cpu_library()
    if first.device.type == "cuda":
        return _extension.cuda_library()
    return f"runs on cpu and cuda, not on {first.device.type}"


register("nearest", "compiled", nearest, supports=_supports)
register("gather", "compiled", gather, supports=_supports)
register("quantize_backward", "compiled", quantize_backward, supports=_supports)
register("codebook_stats", "compiled", codebook_stats, supports=_supports)
register("ema_update_", "compiled", ema_update_, supports=_supports)
