"""ema_update_: one step of a codebook that follows the mean of its tokens.

    N_k <- d N_k + (1 - d) counts_k        M_k <- d M_k + (1 - d) sums_k
    c_k <- M_k / ((N_k + eps) / (n + K eps) n),  n = sum_k N_k        (van den Oord et al. 2017, appendix A.1)
           M_k / (N_k + eps)  with smoothing="plain", which moves no code by what others do

A revived code restarts at the token in its slot of ``sums`` and is left out of the same step's average.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ._library import check_choice, define, run

SMOOTHINGS = ("sum_preserving", "plain")

_ema_update = define(
    "ema_update_(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum, Tensor counts, Tensor sums,"
    " Tensor revive, float decay, float eps, float revived_size, bool normalize, bool plain=False) -> ()",
    partial(run, "ema_update_"),
)

ema_step_ = define(  # for modules that apply what they count at once: no array of sums
    "ema_step_(Tensor x, Tensor codes, Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum,"
    " float decay, float eps, bool normalize, bool plain=False) -> ()",
    partial(run, "ema_step_"),
)


def ema_update_(
    codebook: Tensor,  # [K, D]
    cluster_size: Tensor,  # [K]
    embed_sum: Tensor,  # [K, D]
    counts: Tensor,  # [K]
    sums: Tensor,  # [K, D]
    *,
    decay: float,
    eps: float = 1e-5,
    revive: Tensor | None = None,  # bool [K]
    revived_size: float = 1.0,
    normalize: bool = False,
    smoothing: str = "sum_preserving",
) -> None:
    """Update ``codebook``, ``cluster_size`` and ``embed_sum`` in place, without waiting for the device.

    Args:
        codebook, cluster_size, embed_sum: the state; float32 (or all float64), contiguous.
        counts, sums: statistics of the step, from ``codebook_stats``.
        decay: d in [0, 1].
        eps: Laplace smoothing, > 0.
        revive: where True, row k of ``sums`` is one token: the code restarts there with cluster size
            ``revived_size``, and counts_k is left out.
        revived_size: cluster size given to a revived code, > 0.
        normalize: keep codebook rows at length 1 (cosine codebooks).
        smoothing: "sum_preserving", where the smoothed sizes add up to n like the sizes; or "plain".

    Where no token was counted the codes that are not revived stay bit for bit as they are.

    Raises:
        TypeError, ValueError: a bad argument, named.
    """
    _check(codebook, cluster_size, embed_sum, counts, sums)
    check_choice("smoothing", smoothing, SMOOTHINGS)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected in [0, 1], got {decay}")
    if eps <= 0 or revived_size <= 0:
        raise ValueError(f"eps, revived_size: expected > 0, got {eps}, {revived_size}")
    if revive is None:
        revive = torch.zeros_like(counts, dtype=torch.bool)
    elif revive.dtype != torch.bool or revive.shape != counts.shape:
        raise ValueError(f"revive: expected bool {list(counts.shape)}, got {revive.dtype} {list(revive.shape)}")
    plain = smoothing == "plain"
    _ema_update(codebook, cluster_size, embed_sum, counts, sums, revive, decay, eps, revived_size, normalize, plain)


def _check(codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, counts: Tensor, sums: Tensor) -> None:
    if codebook.dim() != 2 or codebook.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"codebook: expected float32 or float64 [K, D], got {codebook.dtype} {list(codebook.shape)}")
    rows, matrix = codebook.shape[:1], codebook.shape
    named = (("cluster_size", cluster_size, rows), ("embed_sum", embed_sum, matrix), ("counts", counts, rows))
    for name, tensor, shape in (*named, ("sums", sums, matrix), ("codebook", codebook, matrix)):
        if tensor.shape != shape or tensor.dtype != codebook.dtype or tensor.device != codebook.device:
            expected = f"{codebook.dtype} {list(shape)} on {codebook.device}"
            raise ValueError(f"{name}: expected {expected}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous, got strides {tensor.stride()}")
