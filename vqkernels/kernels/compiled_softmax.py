"""The C++ kernels of the softmax over codes, as the registry knows them. The work is in csrc/cpu/softmax*.

    l_nk = scale <x_n, c_k> + bias_k      p_n = softmax_k(l_n)

No [N, K] array: logits are made block by block, again in every pass over them. x [B, T, D] has any strides, float32 or
float64; all results have its dtype. A token with a number that is not finite has NaN results and no part in sums over
tokens. Every result has the same bits for any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from .registry import register

DTYPES = (torch.float32, torch.float64)


def softmax_forward(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
) -> tuple[Tensor, Tensor]:  # lse [B, T], entropy [B, T]
    """log sum_k exp l, and -sum_k p log p."""
    return torch.ops.vqkernels_C.softmax_forward(x, codebook, bias, scale)


def softmax_code_sums(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
    lse: Tensor,  # [B, T]
    weight: Tensor,  # [B, T]
) -> Tensor:  # [K]
    """sum_n weight_n p_nk."""
    return torch.ops.vqkernels_C.softmax_code_sums(x, codebook, bias, scale, lse, weight)


def softmax_backward(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
    lse: Tensor,  # [B, T]
    dlse: Tensor,  # [B, T]
    dentropy: Tensor,  # [B, T]
    weight: Tensor,  # [B, T]
    dcode_sums: Tensor | None,  # [K]
    direction: Tensor | None,  # [B, T, D]
    need_codebook: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # dx [B, T, D], dcodebook [K, D], dbias [K]
    """Gradients through the logits; of the codebook and the bias only if needed, else they have K = 0.

    f_nk = -dentropy_n (l_nk - lse_n) + weight_n dcode_sums_k + <direction_n, c_k>;  dl = p (f - sum_k p f + dlse)
    """
    terms = (lse, dlse, dentropy, weight, dcode_sums, direction)
    return torch.ops.vqkernels_C.softmax_backward(x, codebook, bias, scale, *terms, need_codebook)


def softmax_sample(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
    lse: Tensor,  # [B, T]
    uniform: Tensor,  # [B, T], in [0, 1)
) -> Tensor:  # codes int64 [B, T]
    """The first code at which the running sum of p exceeds ``uniform``; -1 for a token that is not finite.

    Nothing of ``lse`` is used: its rounding, 64 at 10^9, would be that of every p.
    """
    return torch.ops.vqkernels_C.softmax_sample(x, codebook, bias, scale, uniform)


def _supports(x: Tensor, *_rest: object) -> str | None:
    """None, or why the compiled kernels cannot take a tensor like ``x``."""
    if x.dtype not in DTYPES:
        return f"takes float32 and float64, not {x.dtype}"
    if x.device.type != "cpu":
        return f"runs on cpu, not on {x.device.type}"
    return _extension.cpu_library()


register("softmax_forward", "compiled", softmax_forward, supports=_supports)
register("softmax_code_sums", "compiled", softmax_code_sums, supports=_supports)
register("softmax_backward", "compiled", softmax_backward, supports=_supports)
register("softmax_sample", "compiled", softmax_sample, supports=_supports)
