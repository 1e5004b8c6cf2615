"""Correctness first: what a provider returned, held against the truth, before its time means anything.

The truth of a search is that of ``vqkernels.testing``, over the real numbers, for a bounded number of tokens. A code at
exactly the same distance counts as right for others; ours must be the lowest index as promised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqkernels.kernels.reference_nearest_k import nearest_k as reference_nearest_k
from vqkernels.testing import true_codes, wrong_codes

from .plain import blocked_argmin, lloyd_step
from .problem import EMA_DECAY, Problem, entropy_temperature, initial_state
from .providers import Both, EntropyGradients, Lookup, Result
from .shapes import Shape

UNIT = 2.0**-24  # float32 unit roundoff
INERTIA_TOLERANCE = 1e-3
ENTROPY_TOLERANCE = 1e-5
ENTROPY_BLOCK = 1 << 22  # float64 probabilities at a time
BLOCK = 65536  # tokens whose distances are summed at once


@dataclass(frozen=True)
class Verdict:
    """How many of the checked results are wrong: tokens; codebook rows for ``ema`` and ``kmeans``; the loss and rows of
    the gradients for ``entropy``."""

    checked: int
    wrong: int
    inertia: float | None = None  # of ``kmeans``, as a share of the plain form's

    @property
    def error_rate(self) -> float:
        return self.wrong / max(1, self.checked)


def check_rows(tokens: int, limit: int) -> Tensor:  # int64 [min(tokens, limit)]
    """Tokens to check, spread evenly with the first and the last among them."""
    return torch.linspace(0, tokens - 1, min(tokens, limit), dtype=torch.float64).round().long()


class SearchGate:
    """True codes of some tokens of a problem."""

    def __init__(self, problem: Problem, limit: int) -> None:
        self.rows = check_rows(problem.shape.tokens, limit)
        self._x = problem.x.detach().cpu()[self.rows]  # [R, D]
        codebook = problem.codebook.detach().cpu()
        self._codebook = codebook.clone() if problem.changing else codebook  # [K, D]
        self.codes = true_codes(self._x, self._codebook)  # [R]

    def check(
        self,
        result: Result,  # codes int64 [N], or a Lookup
        *,
        lowest_on_ties: bool,
    ) -> Verdict:
        """Compare a provider's codes of all tokens with the truth, and its quantized rows with its codes' rows."""
        lookup = result if isinstance(result, Lookup) else None
        codes = lookup.codes if lookup is not None else result
        assert isinstance(codes, Tensor)
        given = codes.detach().cpu().reshape(-1)[self.rows].long()
        wrong = given != self.codes
        if not lowest_on_ties and wrong.any():  # ties are sought among the few that differ
            wrong[wrong.clone()] = wrong_codes(given[wrong], self._x[wrong], self._codebook)
        if lookup is not None:
            quantized = lookup.quantized.detach().cpu().reshape(-1, self._x.shape[1])[self.rows]
            row = self._codebook[given.clamp(0, len(self._codebook) - 1)]
            wrong |= (quantized != row).any(dim=1)
        return Verdict(len(self.rows), int(wrong.sum()))


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
        codebook: Result,  # [K, D]
        *,
        lowest_on_ties: bool,
    ) -> Verdict:
        """Compare a provider's updated codebook row by row; there are no ties here."""
        assert isinstance(codebook, Tensor)
        apart = (codebook.detach().cpu().double() - self.codebook).abs() > self.tolerance
        return Verdict(len(self.codebook), int(apart.any(dim=1).sum()))


class KMeansGate:
    """The inertia of Lloyd's iterations in plain torch, which centroids may not exceed.

    A token that ties to within float32's rounding may go either way, and from there on two runs part; at 10^4 tokens
    and more their inertia then differs in the fifth digit. ``INERTIA_TOLERANCE`` leaves room for that on small inputs.
    """

    def __init__(self, problem: Problem) -> None:
        self._x = problem.x.detach().cpu().float()  # [N, D]
        rows = problem.codebook.detach().cpu().float()
        for _ in range(problem.iterations):
            rows = lloyd_step(self._x, rows)
        self.inertia = self._inertia(rows)

    def _inertia(self, rows: Tensor) -> float:  # [K, D]
        codes = blocked_argmin(self._x, rows)
        parts = zip(self._x.split(BLOCK), codes.split(BLOCK), strict=True)
        return sum(float((x.double() - rows[own].double()).square().sum()) for x, own in parts)

    def check(
        self,
        codebook: Result,  # [K, D]
        *,
        lowest_on_ties: bool,
    ) -> Verdict:
        """All centroids are wrong together, or none."""
        assert isinstance(codebook, Tensor)
        share = self._inertia(codebook.detach().cpu().float()) / self.inertia if self.inertia else 1.0
        return Verdict(len(codebook), len(codebook) if not share <= 1 + INERTIA_TOLERANCE else 0, share)


class EntropyGate:
    """Loss and gradients by blocks of tokens in float64, which results may miss by ``ENTROPY_TOLERANCE`` of their norm.

    Peers may miss them by a hundred times that: whoever expands |x - c|^2 in float32 does.
    """

    def __init__(self, problem: Problem) -> None:
        x, codebook = (t.detach().cpu().double() for t in (problem.x, problem.codebook))
        temperature, tokens = entropy_temperature(problem.shape), len(x)
        blocks = x.split(max(1, ENTROPY_BLOCK // len(codebook)))
        mean = sum((_soft(block, codebook, temperature).sum(0) for block in blocks), torch.zeros(())) / tokens
        slope = torch.where(mean > 0, mean, 1).log()  # d loss / d mean, up to a constant
        loss, dx, dcodebook = (mean * slope).sum(), [], torch.zeros_like(codebook)
        for block in blocks:
            p = _soft(block, codebook, temperature)
            log_p = torch.where(p > 0, p, 1).log()
            loss = loss - (p * log_p).sum() / tokens
            f = slope - log_p
            dlogits = p * (f - (p * f).sum(1, keepdim=True)) * (2 / temperature / tokens)  # of <x, c> - |c|^2 / 2
            dx.append(dlogits @ codebook)
            dcodebook += dlogits.T @ block - dlogits.sum(0)[:, None] * codebook
        self._truth = (loss, torch.cat(dx), dcodebook)

    def check(
        self,
        result: Result,
        *,
        lowest_on_ties: bool,
    ) -> Verdict:
        """The loss and each gradient is off with all its rows, or not; ``lowest_on_ties``: it is ours."""
        assert isinstance(result, EntropyGradients)
        most = ENTROPY_TOLERANCE * (1 if lowest_on_ties else 100)
        pairs = [(mine, true) for mine, true in zip(result, self._truth, strict=True) if mine is not None]
        off = [not (mine.detach().cpu().double() - true).norm() <= most * true.norm() for mine, true in pairs]
        rows = [len(true) if true.dim() else 1 for _, true in pairs]
        return Verdict(sum(rows), sum(n for n, wrong in zip(rows, off, strict=True) if wrong))


def _soft(block: Tensor, codebook: Tensor, temperature: float) -> Tensor:  # [n, D], [K, D] -> [n, K]
    return torch.addmm(-codebook.square().sum(1) / temperature, block, codebook.T, alpha=2 / temperature).softmax(1)


class NearestKGate:
    """The true k nearest codes of some tokens, by the reference; others may have codes of the same distance."""

    def __init__(self, problem: Problem, limit: int) -> None:
        self.rows = check_rows(problem.shape.tokens, limit)
        self._x, self._codebook = problem.x.detach().cpu()[self.rows], problem.codebook.detach().cpu()
        self.codes = reference_nearest_k(self._x[None], self._codebook, problem.nearest, "euclidean")[0][0]  # [R, k]

    def check(
        self,
        result: Result,  # codes int64 [N, k]
        *,
        lowest_on_ties: bool,
    ) -> Verdict:
        """A token is wrong with one of its codes."""
        assert isinstance(result, Tensor)
        given = result.detach().cpu()[self.rows]
        wrong = given != self.codes
        if not lowest_on_ties:
            wrong &= self._distance(given) > self._distance(self.codes) * (1 + 1e-12)
        return Verdict(len(self.rows), int(wrong.any(dim=1).sum()))

    def _distance(self, codes: Tensor) -> Tensor:  # [R, k] -> float64 [R, k]
        return (self._x[:, None].double() - self._codebook[codes].double()).square().sum(-1)


def _exchanged(problem: Problem) -> Problem:
    """Codes in the place of tokens."""
    shape = Shape(problem.shape.codes, problem.shape.tokens, problem.shape.dim)
    return replace(problem, shape=shape, x=problem.codebook, codebook=problem.x)


class BothGate:
    """Rows and columns, each by the truth of a search."""

    def __init__(self, problem: Problem, limit: int) -> None:
        self._rows, self._columns = SearchGate(problem, limit), SearchGate(_exchanged(problem), limit)

    def check(
        self,
        result: Result,
        *,
        lowest_on_ties: bool,
    ) -> Verdict:
        """The sum of both."""
        assert isinstance(result, Both)
        rows = self._rows.check(result.codes, lowest_on_ties=lowest_on_ties)
        columns = self._columns.check(result.tokens, lowest_on_ties=lowest_on_ties)
        return Verdict(rows.checked + columns.checked, rows.wrong + columns.wrong)


Gate = SearchGate | EmaGate | KMeansGate | EntropyGate | NearestKGate | BothGate


def make_gate(problem: Problem, limit: int) -> Gate:
    """The gate of the problem's operation."""
    if problem.operation == "entropy":
        return EntropyGate(problem)
    if problem.operation == "kmeans":
        return KMeansGate(problem)
    if problem.operation == "nearest-k":
        return NearestKGate(problem, limit)
    if problem.operation == "nearest-tokens":
        return SearchGate(_exchanged(problem), limit)
    if problem.operation == "nearest-both":
        return BothGate(problem, limit)
    return EmaGate(problem) if problem.operation == "ema" else SearchGate(problem, limit)
