"""The iterations of k-means: Lloyd's over all tokens (Lloyd 1982), or mini-batches (Sculley 2010, "Web-Scale K-Means
Clustering").

    codes_n = nearest(x_n),   c_k <- mean of the x_n with code k

**Centroids without tokens** are set beside the centroids with the largest inertia, the i-th of them beside the i-th
largest, half a standard deviation of the donor's tokens away along a random diagonal, so that the next iteration shares
these tokens between the two. Why not the farthest tokens: they are outliers, and finding them takes a pass and an
exchange between ranks; here counts and inertia by code decide, which every rank has. The donor stays where it is, so
that a split never makes the inertia larger, in the last iteration neither.

Sums are float64 over batches and ranks; one packed all_reduce an iteration. Nothing waits for the device, unless a
tolerance is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import codebook_stats, nearest
from .distributed import all_reduce_packed, rank_and_world
from .normalize import l2_normalize
from .seeding import random_words

_DIRECTIONS = 1 << 20  # draws of random_words from here on
_SUMMED = 1024  # numbers added one after the other


class Totals(NamedTuple):
    """Sums over the tokens of all ranks, float64."""

    counts: Tensor  # [K]
    inertia: Tensor  # [K]
    sums: Tensor  # [K, D]


class Measure(NamedTuple):
    """How tokens are compared with centroids."""

    metric: str
    precision: str = "exact"


Batches = Callable[[], Iterable[Tensor]]  # of this rank, [n, D] each


# ---------------------------------------------------------------------------------------------- one iteration


def zeros(
    rows: Tensor,  # [K, D]
) -> Totals:
    """Nothing summed up yet."""
    none = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    return Totals(none, none.clone(), torch.zeros_like(rows, dtype=torch.float64))


def plus(
    totals: Totals,
    tokens: Tensor,  # [n, D]
    codes: Tensor,  # int64 [n]
    distance: Tensor,  # float32 [n]
) -> Totals:
    """And this rank's tokens, as they are assigned."""
    size = totals.counts.shape[0]
    counts, sums = codebook_stats(tokens, codes, size)
    inertia = codebook_stats(distance[:, None], codes, size)[1][:, 0]
    return Totals(*(a + b for a, b in zip(totals, (counts, inertia, sums), strict=True)))


def assigned_totals(
    batches: Iterable[Tensor],  # [n, D] each
    rows: Tensor,  # [K, D]
    measure: Measure,
) -> Totals:
    """The tokens of all ranks assigned to ``rows`` and summed up."""
    totals = zeros(rows)
    for tokens in batches:
        totals = plus(totals, tokens, *nearest(tokens, rows, metric=measure.metric, precision=measure.precision))
    return Totals(*all_reduce_packed(*totals))


def total_of(
    values: Tensor,  # [K]
) -> Tensor:  # []
    """The sum, in an order that does not depend on the number of threads."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[0] % _SUMMED))
    return padded.view(-1, _SUMMED).sum(1).sum()


def _means(
    rows: Tensor,  # [K, D]
    totals: Totals,
) -> Tensor:  # [K, D]
    """Where there are no tokens the row stays; so it does where the sum of huge ones overflowed."""
    mean = (totals.sums / totals.counts.clamp(min=1)[:, None]).to(rows.dtype)
    moves = (totals.counts > 0) & mean.isfinite().all(1)
    return torch.where(moves[:, None], mean, rows)


def _split(
    rows: Tensor,  # [K, D]
    totals: Totals,
    seed: Tensor,  # int64 []
    draw: int,
    metric: str,
) -> tuple[Tensor, Tensor]:  # rows [K, D], donor int64 [K]: itself where nothing was done
    """Centroids without tokens beside those with the largest inertia; see the head of this file."""
    size, dim = rows.shape
    empty = totals.counts == 0
    gain = torch.where(totals.counts >= 2, totals.inertia, 0)
    order = gain.argsort(descending=True, stable=True)  # [K]
    donor = order[(empty.cumsum(0) - 1).clamp(min=0)]  # [K]
    useful = empty & (gain[donor] > 0)
    square = (2 if metric == "cosine" else 1) * totals.inertia / totals.counts.clamp(min=1)  # 1 - cos is half of it
    deviation = square.sqrt()[donor] / dim  # along the diagonal's D entries it is sqrt(square / D)
    sign = 1.0 - 2.0 * (random_words(seed, _DIRECTIONS + draw, dim) & 1)
    beside = rows[donor] + (0.5 * deviation[:, None] * sign).to(rows.dtype)
    donor = torch.where(useful, donor, torch.arange(size, device=rows.device))
    return torch.where(useful[:, None], beside, rows), donor


def unit(
    rows: Tensor,  # [K, D]
    metric: str,
) -> Tensor:  # [K, D]
    """Centroids of length 1 for the cosine."""
    return l2_normalize(rows) if metric == "cosine" else rows


def moved(
    rows: Tensor,  # [K, D]
    totals: Totals,
    measure: Measure,
    seed: Tensor,  # int64 []
    draw: int,
) -> Tensor:  # [K, D]
    """The means of the tokens, and a place for every centroid that has none."""
    split, _ = _split(_means(rows, totals), totals, seed, draw, measure.metric)
    return unit(split, measure.metric)


def _settled(totals: Totals, inertias: list[float], tolerance: float) -> bool:
    """Whether the inertia fell by no more than ``tolerance`` of it. Waits for the device."""
    inertias.append(float(total_of(totals.inertia)))
    return inertias[-2] - inertias[-1] <= tolerance * inertias[-1]


def lloyd_(
    rows: Tensor,  # [K, D], written
    batches: Batches,
    measure: Measure,
    seed: Tensor,  # int64 []
    iterations: int,
    tolerance: float | None = None,
) -> tuple[Totals | None, int]:  # of the last iteration before it moved the rows; iterations run
    """Move ``rows`` to the means of their tokens, again and again."""
    totals, inertias = None, [float("inf")]
    for i in range(iterations):
        totals = assigned_totals(batches(), rows, measure)
        rows.copy_(moved(rows, totals, measure, seed, i))  # in place: the search packs it where it packed it before
        if tolerance is not None and _settled(totals, inertias, tolerance):
            return totals, i + 1
    return totals, iterations


# ---------------------------------------------------------------------------------------------- mini-batches


def _in_step(batches: Iterable[Tensor], none: Tensor) -> Iterator[Tensor]:  # [n, D] each, [0, D]
    """This rank's batches, and then empty ones until every rank has come to its end."""
    if rank_and_world()[1] == 1:
        yield from batches
        return
    remaining = iter(batches)
    while True:
        batch = next(remaining, None)
        more = torch.tensor([batch is not None], dtype=torch.int64, device=none.device)
        if int(all_reduce_packed(more)[0]) == 0:
            return
        yield none if batch is None else batch


def mini_batches_(
    rows: Tensor,  # [K, D], written
    batches: Batches,
    measure: Measure,
    seed: Tensor,  # int64 []
    passes: int,
    tolerance: float | None = None,
) -> tuple[Totals | None, int]:  # of the last pass, each batch before it moved the rows; passes made
    """Sculley's step for a batch at once: every centroid is the mean of all tokens that it was ever given."""
    mean, weight = rows.double(), torch.zeros_like(rows[:, 0], dtype=torch.float64)
    totals, inertias = None, [float("inf")]
    for i in range(passes):
        totals = zeros(rows)
        for tokens in _in_step(batches(), rows[:0]):
            found = assigned_totals([tokens], rows, measure)
            weight = weight + found.counts
            step = found.sums - found.counts[:, None] * mean
            mean = mean + step / weight.clamp(min=1)[:, None]
            rows.copy_(unit(mean, measure.metric))
            totals = Totals(*(a + b for a, b in zip(totals, found, strict=True)))
        mean, donor = _split(mean, totals, seed, i, measure.metric)
        shared = torch.zeros_like(weight).index_add_(0, donor, torch.ones_like(weight))
        weight = (weight / shared.clamp(min=1))[donor]
        rows.copy_(unit(mean, measure.metric))
        if tolerance is not None and _settled(totals, inertias, tolerance):
            return totals, i + 1
    return totals, passes
