"""Correctness first: what a provider returned, held against the truth, before its time means anything.

The truth of a search is ``vqkernels.nearest`` on the reference backend with float64 inputs, for a bounded number of
tokens. A code at exactly the same distance counts as right for others; ours must be the lowest index as promised.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.ops import nearest

from .problem import EMA_DECAY, Problem, initial_state

SURELY_APART = 1e-12  # relative; far above the rounding of a float64 distance, so below it fractions decide
UNIT = 2.0**-24  # float32 unit roundoff


@dataclass(frozen=True)
class Verdict:
    """How many of the checked results are wrong (codes, or codebook rows for ``ema``)."""

    checked: int
    wrong: int

    @property
    def error_rate(self) -> float:
        return self.wrong / max(1, self.checked)


def check_rows(tokens: int, limit: int) -> Tensor:  # int64 [min(tokens, limit)]
    """Tokens to check, spread evenly with the first and the last among them."""
    return torch.linspace(0, tokens - 1, min(tokens, limit), dtype=torch.float64).round().long()


def _same_distance(token: Tensor, code: Tensor, other: Tensor) -> bool:  # each [D], float64
    """Whether |token - code| equals |token - other| over the rationals."""

    def squared(vector: Tensor) -> Fraction:
        pairs = zip(token.tolist(), vector.tolist(), strict=True)
        return sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in pairs), Fraction(0))

    return squared(code) == squared(other)


class SearchGate:
    """True codes of some tokens of a problem."""

    def __init__(self, problem: Problem, limit: int) -> None:
        self.rows = check_rows(problem.shape.tokens, limit)
        self._x = problem.x.detach().cpu().double()[self.rows]  # [R, D]
        self._codebook = problem.codebook.detach().cpu().double()  # [K, D]
        with use_backend("reference"):
            self.codes = nearest(self._x, self._codebook)[0]  # [R]

    def check(
        self,
        codes: Tensor,  # int64 [N]
        *,
        lowest_on_ties: bool,
    ) -> Verdict:
        """Compare a provider's codes of all tokens with the truth."""
        given = codes.detach().cpu().reshape(-1)[self.rows]
        differing = (given != self.codes).nonzero().flatten().tolist()
        if lowest_on_ties:
            return Verdict(len(self.rows), len(differing))
        return Verdict(len(self.rows), sum(not self._tie(row, int(given[row])) for row in differing))

    def _tie(self, row: int, code: int) -> bool:
        if not 0 <= code < len(self._codebook):
            return False
        token, best, other = self._x[row], self._codebook[self.codes[row]], self._codebook[code]
        near, far = (token - best).square().sum(), (token - other).square().sum()
        return bool(far - near <= SURELY_APART * near) and _same_distance(token, best, other)


class EmaGate:
    """The codebook after one update in float64, and how far float32 may end up from it."""

    def __init__(self, problem: Problem) -> None:
        assert problem.codes is not None
        x, codes, k = problem.x.detach().cpu().double(), problem.codes.cpu(), problem.shape.codes
        state = initial_state(problem.codebook.detach().cpu(), torch.float64)
        before, counts = state.codebook.abs(), torch.bincount(codes, minlength=k)
        state.update_(counts, torch.zeros(k, x.shape[1], dtype=torch.float64).index_add_(0, codes, x))
        self.codebook = state.codebook  # [K, D]
        magnitude = torch.zeros(k, x.shape[1], dtype=torch.float64).index_add_(0, codes, x.abs())
        # one rounding a token in the sum, a dozen in the update and its division; n enters by eps only
        steps = counts[:, None] + 12
        terms = (1 - EMA_DECAY) * magnitude + EMA_DECAY * before
        self.tolerance = 2 * steps * UNIT * terms / state.cluster_size[:, None]

    def check(
        self,
        codebook: Tensor,  # [K, D]
        *,
        lowest_on_ties: bool,
    ) -> Verdict:
        """Compare a provider's updated codebook row by row; there are no ties here."""
        apart = (codebook.detach().cpu().double() - self.codebook).abs() > self.tolerance
        return Verdict(len(self.codebook), int(apart.any(dim=1).sum()))


def make_gate(problem: Problem, limit: int) -> SearchGate | EmaGate:
    """The gate of the problem's operation."""
    return EmaGate(problem) if problem.operation == "ema" else SearchGate(problem, limit)
