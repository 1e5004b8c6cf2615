"""First centroids for k-means: random tokens, or k-means|| (Bahmani et al. 2012, "Scalable K-Means++").

k-means++ (Arthur & Vassilvitskii 2007) draws one token after another with a probability that grows with the squared
distance to those drawn before: K passes over the tokens. k-means|| draws many at a time, more than are wanted, and
chooses among these: here ROUNDS passes of the search give OVERSAMPLING * K candidates, each weighed with the tokens
nearest to it, and RECLUSTERING rounds over the candidates alone choose K of them in the same manner. On normal,
separated and uneven clusters (K 256 and 1024) that ended at or below k-means++'s inertia, after a tenth of its time.

What is drawn is a function of the seed and of the tokens of all ranks in the order of the ranks: probabilities are
integers, whose sums come out the same however they are split. Nothing here waits for the device.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import codebook_stats, nearest
from ..ops._random import mix
from .distributed import all_reduce_packed, rank_and_world

ROUNDS = 5
OVERSAMPLING = 2
RECLUSTERING = 128
START_TOKENS = 64  # per code and rank, that the start is chosen from


class Ranks(NamedTuple):
    """Among whom tokens are drawn: all ranks, or each on its own where all hold the same tokens."""

    rank: int = 0
    world: int = 1

    @classmethod
    def all(cls) -> Ranks:
        return cls(*rank_and_world())

    def gathered(
        self,
        own: Tensor,  # [...]
    ) -> Tensor:  # [world, ...]
        mine = torch.arange(self.world, device=own.device) == self.rank
        return self.summed(torch.where(mine.view(-1, *(1 for _ in own.shape)), own, 0))

    def summed(self, part: Tensor) -> Tensor:
        return all_reduce_packed(part)[0] if self.world > 1 else part


def random_words(
    seed: Tensor,  # int64 []
    draw: int,
    count: int,
) -> Tensor:  # int64 [count] in [0, 2^62)
    """Counter-based: a function of (seed, draw, place)."""
    place = torch.arange(count, device=seed.device)
    # negative steps: those from 0 on are training's draws
    high, low = (mix(mix(mix(seed) - 2 * draw - half) + place) for half in (1, 2))
    return (high >> 1 << 31) | (low >> 1)


def draw_tokens(
    tokens: Tensor,  # [n, D] of this rank
    mass: Tensor,  # int64 [n] >= 0; of all ranks together below 2^63
    count: int,
    seed: Tensor,  # int64 []
    draw: int,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:  # hit bool [count], rows [count, D]; the same on every rank
    """Tokens with a probability in proportion to their mass: one from each of ``count`` equal runs of it.

    A token can come twice only where its mass is more than that of a run, so with masses of 0 and 1 none does. Where
    the total is below ``count`` the runs without mass get no hit and zeros.
    """
    mine = mass.sum()
    totals = ranks.gathered(mine)  # [world]
    before, total = totals[: ranks.rank].sum(), totals.sum()
    run = torch.arange(count + 1, device=mine.device)
    ends = run * (total // count) + run * (total % count) // count
    width = ends.diff()
    point = ends[:-1] + random_words(seed, draw, count) % width.clamp(min=1) - before
    here = (width > 0) & (point >= 0) & (point < mine)
    if tokens.shape[0] == 0:
        rows = tokens.new_zeros((count, tokens.shape[1]))
    else:
        index = torch.searchsorted(mass.cumsum(0), point, right=True).clamp_(max=tokens.shape[0] - 1)
        rows = torch.where(here[:, None], tokens[index], 0)
    return width > 0, ranks.summed(rows)


def masses(
    weight: Tensor,  # [n] >= 0, or NaN: left out
    ranks: Ranks,
) -> Tensor:  # int64 [n]
    """Weights of all ranks as integers in proportion, as finely as their total of less than 2^62 permits."""
    weight = weight.double().nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)
    own = torch.cat([weight, weight.new_zeros(1)]).max(), torch.full_like(weight.sum(), weight.shape[0])
    each = ranks.gathered(torch.stack(own))  # [world, 2]
    largest, number = each[:, 0].max(), each[:, 1].sum()
    exponent = 62 - torch.frexp(number).exponent - torch.frexp(largest).exponent
    return (weight * torch.exp2(exponent.double())).long()


def spread_tokens(
    tokens: Tensor,  # [n, D] of this rank
    weight: Tensor,  # float64 [n] >= 0
    sizes: list[int],
    seed: Tensor,  # int64 []
    draw: int,
    metric: str,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:  # rows [sum(sizes), D]; codes int64 [n] among them
    """Rounds of draws in proportion to weight * distance to the rows drawn before; the first by weight alone.

    A draw without a hit, because no token is left away from the rows, repeats the first row, which gets no code then.
    """
    n = tokens.shape[0]
    codes = torch.zeros(n, dtype=torch.int64, device=tokens.device)
    distance = torch.full((n,), torch.inf, device=tokens.device)
    rows: list[Tensor] = []
    for i, size in enumerate(sizes):
        mass = masses(weight if i == 0 else weight * distance, ranks)
        hit, drawn = draw_tokens(tokens, mass, size, seed, draw + i, ranks)
        drawn = torch.where(hit[:, None], drawn, (rows[0] if rows else drawn)[:1])
        found, away = nearest(tokens, drawn, metric=metric)
        nearer = away < distance
        codes = torch.where(nearer, found + sum(sizes[:i]), codes)
        distance = torch.where(nearer, away, distance)
        rows.append(drawn)
    return torch.cat(rows), codes


def equal_parts(total: int, parts: int) -> list[int]:
    """``total`` in at most ``parts`` positive integers."""
    ends = [total * i // parts for i in range(parts + 1)]
    return [b - a for a, b in pairwise(ends) if b > a]


def plus_plus(
    tokens: Tensor,  # [n, D] of this rank
    weight: Tensor,  # float64 [n], 0: not to be drawn
    size: int,
    seed: Tensor,  # int64 []
    metric: str,
) -> Tensor:  # [size, D]
    """k-means||: candidates drawn from the tokens of all ranks, then ``size`` of them."""
    ranks = Ranks.all()
    first = [1, *equal_parts(OVERSAMPLING * size, ROUNDS)]
    candidates, codes = spread_tokens(tokens, weight, first, seed, 1, metric, ranks)
    (weights,) = all_reduce_packed(codebook_stats(weight[:, None], codes, candidates.shape[0])[1][:, 0])
    second = [1, *equal_parts(size - 1, RECLUSTERING)]
    return spread_tokens(candidates, weights, second, seed, 1 + len(first), metric, Ranks())[0]


def first_rows(
    init: str,
    tokens: Tensor,  # [n, D] of this rank; NaN or Inf: not to be drawn
    rows: Tensor,  # [K, D], for codes that are left without a token
    seed: Tensor,  # int64 []
    metric: str,
) -> Tensor:  # [K, D]
    """K tokens of all ranks to start from: "k-means++", or "random" ones, none drawn twice. ``START_TOKENS`` has the
    most that are looked at. With K tokens or fewer each is taken once, either way."""
    size = rows.shape[0]
    finite = nearest(tokens, tokens.new_zeros((1, tokens.shape[1])))[0] == 0  # [n]
    weight = finite.double()
    if START_TOKENS * size < tokens.shape[0]:
        total = weight.sum()
        finite, tokens = draw_tokens(tokens, finite.long(), START_TOKENS * size, seed, 0, Ranks())
        weight = finite.double() * total / finite.sum().clamp(min=1)
    hit, random = draw_tokens(tokens, finite.long(), size, seed, 0, Ranks.all())
    random = torch.where(hit[:, None], random.to(rows.dtype), rows)
    if init == "random":
        return random
    spread = plus_plus(tokens, weight, size, seed, metric).to(rows.dtype)
    return torch.where(hit.all(), spread, random)
