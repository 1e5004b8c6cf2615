"""nearest: the index of the true nearest code of every token.

euclidean   codes[n] = argmin_k |x_n - c_k|^2,   distance[n] = min_k |x_n - c_k|^2
cosine      codes[n] = argmax_k cos(x_n, c_k),   distance[n] = 1 - max_k cos(x_n, c_k)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import PreparedCodebook
from . import plain
from ._library import as_tokens, check_choice, check_tokens, define, promoted, run
from ._prepared import opened, prepared_search

METRICS = ("euclidean", "cosine")
PRECISIONS = ("exact", "fast")


def _run(x: Tensor, codebook: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    return run("nearest", x, codebook, metric, precision)


def _fake(x: Tensor, codebook: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2]
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


_nearest = define("nearest(Tensor x, Tensor codebook, str metric, str precision) -> (Tensor, Tensor)", _run, _fake)


def nearest(
    x: Tensor,  # [..., D]
    codebook: Tensor | PreparedCodebook,  # [K, D]
    *,
    metric: str | None = None,
    precision: str = "exact",
) -> tuple[Tensor, Tensor]:  # codes [...], distance [...]
    """The nearest code of every token: over the real numbers that the inputs stand for, not over their roundings.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        codebook: codes [K, D] in x's dtype (or float32 under a half-precision x); finite. Or what ``prepare_codebook``
            made of them, which spares a call the preparation.
        metric: "euclidean" (the default), or "cosine" (a zero vector is at cosine 0 to everything; cosines within 2^-90
            of the largest, give or take their rounding of D 2^-102, tie). A prepared codebook has its own.
        precision: "exact", or "fast": without the exact road, so that a code may come out that is farther by float32's
            rounding.

    Returns:
        codes: int64 [...]; the lowest index on ties; -1 where the token holds NaN or Inf.
        distance: float32 [...]; squared euclidean distance, or 1 - cosine; NaN where the code is -1.
        Neither is differentiable: see ``quantize``.

    Raises:
        TypeError, ValueError: a bad argument, named. A codebook with NaN or Inf raises on CPU; on CUDA, where looking
            would wait for the device, every token gets code -1 and distance NaN.

    Extra memory is O(N + K D) on CPU, where the packed codebook is kept while it does not change, and O((N + K) D) on
    CUDA; no N x K array is ever formed.
    """
    rows, metric = opened(codebook, metric)
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)
    check_tokens(x, rows)
    tokens = as_tokens(promoted(x.detach(), rows))  # [B, T, D]
    if plain.active():
        codes, distance = plain.nearest(tokens, rows.detach(), metric)
    elif prepared_search(codebook):
        codes, distance = run("nearest_prepared", tokens, codebook, precision)
    else:
        codes, distance = _nearest(tokens, rows.detach(), metric, precision)
    return codes.view(x.shape[:-1]), distance.view(x.shape[:-1])
