"""Comparisons for your own tests: codes that may differ only where they tie, derived tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dtypes import UNIT
from .kernels.reference_nearest import nearest as _reference_nearest
from .ops._library import as_tokens, check_tokens, promoted


def true_codes(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    metric: str = "euclidean",
) -> Tensor:  # int64 [...]
    """The codes that every backend must return, from the reference kernel whatever backend is in force."""
    check_tokens(x, codebook)
    tokens = as_tokens(promoted(x.detach(), codebook))
    return _reference_nearest(tokens, codebook.detach(), metric, "exact")[0].view(x.shape[:-1])


def wrong_codes(
    codes: Tensor,  # int [...]
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    metric: str = "euclidean",
) -> Tensor:  # bool [...]
    """True where a code is farther than the true nearest one; a tied code of another index is not wrong."""
    truth = true_codes(x, codebook, metric)
    differs = codes != truth
    if not differs.any():
        return differs
    token = x.detach()[differs].double()
    chosen, best = codes[differs], truth[differs]
    in_range = (chosen >= 0) & (chosen < codebook.shape[0]) & (best >= 0)
    pair = codebook.detach().double()[torch.stack([chosen, best]).clamp(0, codebook.shape[0] - 1)]  # [2, P, D]
    farther = torch.ones_like(in_range)
    for row in in_range.nonzero()[:, 0].tolist():  # the better of the two, the claimed code first so that it wins ties
        better = _reference_nearest(token[row].view(1, 1, -1), pair[:, row], metric, "exact")[0].item()
        farther[row] = better == 1
    out = differs.clone()
    out[differs] = farther
    return out


def assert_codes_nearest(
    codes: Tensor,  # int [...]
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    metric: str = "euclidean",
    *,
    allow_ties: bool = False,
) -> None:
    """Raise AssertionError unless every code is the true nearest one (``allow_ties``: or tied with it)."""
    truth = true_codes(x, codebook, metric)
    wrong = wrong_codes(codes, x, codebook, metric) if allow_ties else codes != truth
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        got, expected = codes[tuple(where)].item(), truth[tuple(where)].item()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} codes are not the nearest; first at {where}: {got}, not {expected}"
        )


def sum_tolerance(terms: int, dtype: torch.dtype, magnitude: float = 1.0) -> float:
    """Largest error of a sum of ``terms`` products of size ``magnitude`` at most, in any order (Higham 2002, 3.5)."""
    return (terms + 2) * UNIT[dtype] * terms * magnitude
