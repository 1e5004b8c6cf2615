"""nearest_tokens: for every code the index of its true nearest token, the columns' side of ``nearest``.

euclidean   index[k] = argmin_n |x_n - c_k|^2,   distance[k] = min_n |x_n - c_k|^2
cosine      index[k] = argmax_n cos(x_n, c_k),   distance[k] = 1 - max_n cos(x_n, c_k)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..backends import columns_in_steps
from ._library import as_tokens, check_choice, check_mask, check_tokens, define, promoted, run
from .nearest import METRICS


def _run(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str) -> tuple[Tensor, Tensor]:
    return columns_in_steps(partial(run, "nearest"), x, codebook, mask, metric)


def _fake(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str) -> tuple[Tensor, Tensor]:
    shape = codebook.shape[:1]
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


_nearest_tokens = define(
    "nearest_tokens(Tensor x, Tensor codebook, Tensor? mask, str metric) -> (Tensor, Tensor)", _run, _fake
)


def column_arguments(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    mask: Tensor | None,  # bool [...]
    metric: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # [B, T, D], [K, D], bool [B, T]
    """What an op that searches columns is given, checked."""
    check_choice("metric", metric, METRICS)
    check_tokens(x, codebook)
    if mask is not None:
        check_mask(mask, x.shape[:-1], x.device)
        mask = as_tokens(mask[..., None])[..., 0]
    return as_tokens(promoted(x.detach(), codebook)), codebook.detach(), mask


def nearest_tokens(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    *,
    metric: str = "euclidean",
    mask: Tensor | None = None,  # bool [...]
) -> tuple[Tensor, Tensor]:  # index [K], distance [K]
    """The nearest token of every code, over the real numbers: what online clustering moves unused codes towards
    (CVQ-VAE, Zheng & Vedaldi 2023, eq. 5).

        index, _ = vq.nearest_tokens(x, codebook)
        anchors = x.reshape(-1, x.shape[-1])[index]        # [K, D]; where index is -1, no token at all

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        codebook: codes [K, D] in x's dtype (or float32 under a half-precision x).
        metric: "euclidean" or "cosine", as in ``nearest``.
        mask: True where a token is real; the others, and those with NaN or Inf, are nobody's nearest.

    Returns:
        index: int64 [K] into the tokens as x.reshape(-1, D) has them; the lowest on ties; -1 where there is no token
            that may be chosen, or the code holds NaN or Inf.
        distance: float32 [K]; squared euclidean distance, or 1 - cosine; NaN where the index is -1.
        Neither is differentiable.

    Raises:
        TypeError, ValueError: a bad argument, named.

    Extra memory is O((N + K) D); no N x K array is formed, and nothing waits for the device. Where the codes of the
    tokens are wanted too, ``nearest_both`` finds both in one sweep on CPU.
    """
    return _nearest_tokens(*column_arguments(x, codebook, mask, metric), metric)
