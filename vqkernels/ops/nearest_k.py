"""nearest_k: the k true nearest codes of every token, the nearest first.

codes[n, j] = the nearest code of x_n, as ``nearest`` has it, without those in codes[n, :j]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import PreparedCodebook
from ._library import as_tokens, check_choice, check_tokens, define, promoted, run
from ._prepared import opened, prepared_search
from .nearest import METRICS


def _run(x: Tensor, codebook: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    return run("nearest_k", x, codebook, k, metric)


def _fake(x: Tensor, codebook: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


_nearest_k = define("nearest_k(Tensor x, Tensor codebook, int k, str metric) -> (Tensor, Tensor)", _run, _fake)


def nearest_k(
    x: Tensor,  # [..., D]
    codebook: Tensor | PreparedCodebook,  # [K, D]
    k: int,
    *,
    metric: str | None = None,
) -> tuple[Tensor, Tensor]:  # codes [..., k], distance [..., k]
    """The k nearest codes of every token, in the order of distance and, where that is the same, of the index: over the
    real numbers that the inputs stand for.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        codebook: codes [K, D] in x's dtype (or float32 under a half-precision x); finite. Or what ``prepare_codebook``
            made of them.
        k: how many, 1 to K.
        metric: "euclidean" (the default) or "cosine", with ``nearest``'s ties. A prepared codebook has its own.

    Returns:
        codes: int64 [..., k]; -1 where the token holds NaN or Inf.
        distance: float32 [..., k], ascending; squared euclidean distance, or 1 - cosine; NaN where the code is -1.
        Neither is differentiable.

    Raises:
        TypeError, ValueError: a bad argument, named. A codebook with NaN or Inf raises on CPU; elsewhere every token
            gets code -1 and distance NaN.

    Extra memory is O(N k + K D); no N x K array is ever formed (where K is below 16 k, a list of all codes a token is
    O(N k) too). C++ runs on CPU, Triton on a GPU for k up to 1024; elsewhere plain torch takes the tokens by blocks in
    float64.
    """
    rows, metric = opened(codebook, metric)
    check_choice("metric", metric, METRICS)
    check_tokens(x, rows)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= rows.shape[0]:
        raise ValueError(f"k: expected an integer from 1 to {rows.shape[0]} (K of codebook), got {k!r}")
    tokens = as_tokens(promoted(x.detach(), rows))  # [B, T, D]
    if prepared_search(codebook):
        codes, distance = run("nearest_k_prepared", tokens, codebook, k)
    else:
        codes, distance = _nearest_k(tokens, rows.detach(), k, metric)
    return codes.view(*x.shape[:-1], k), distance.view(*x.shape[:-1], k)
