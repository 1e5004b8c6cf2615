"""The Fréchet distance between two sets of features, each taken for a Gaussian (Heusel et al. 2017, eq. 6).

    d^2 = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)),   means m, covariances C with n - 1 in the denominator

in float64. With C = R^T R the last trace is the sum of the singular values of R1 R2^T, which needs no root of a matrix
and stays exact where a covariance is singular; there the usual roots of eigenvalues lose half of the digits.
"""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureGaussian:
    """Mean and covariance of features that come batch by batch, in memory that does not grow with their number.

    Up to `dim` rows are kept as they are, from which the factor R follows directly; more are summed.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.count = dim, 0
        self._rows: list[Tensor] = []  # [B, D] each
        self._sums: tuple[Tensor, Tensor] | None = None  # [D], [D, D]

    def update(
        self,
        features: Tensor,  # [B, D]
    ) -> None:
        """Adds some rows."""
        rows = features.detach().double()
        self.count += len(rows)
        if self._sums is None:
            self._rows.append(rows)
            if self.count <= self.dim:
                return
            rows, self._rows = torch.cat(self._rows), []
            self._sums = rows.new_zeros(self.dim), rows.new_zeros(self.dim, self.dim)
        total, outer = self._sums
        self._sums = total + rows.sum(0), outer.addmm_(rows.T, rows)

    @property
    def mean(self) -> Tensor:  # [D]
        """Of all rows."""
        total = torch.cat(self._rows).sum(0) if self._sums is None else self._sums[0]
        return total / self.count

    def factor(self) -> Tensor:  # [r, D]
        """R with R^T R = the covariance; of at least two finite rows."""
        if self._sums is None:
            return (torch.cat(self._rows) - self.mean) / (self.count - 1) ** 0.5
        covariance = (self._sums[1] - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)
        upper, failed = torch.linalg.cholesky_ex(covariance, upper=True)
        if not failed:
            return upper
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > values[-1] * self.dim * torch.finfo(values.dtype).eps  # below lies nothing but rounding
        return values[kept].sqrt()[:, None] * vectors[:, kept].T


def frechet_distance(one: FeatureGaussian, other: FeatureGaussian) -> float:
    """The distance d^2 as above, at least 0; NaN where a feature is not finite.

    Raises:
        ValueError: fewer than two pictures in one of the two.
    """
    if min(one.count, other.count) < 2:
        raise ValueError(f"a covariance needs at least 2 pictures, got {min(one.count, other.count)}")
    between = (one.mean - other.mean).square().sum()
    if not bool(torch.isfinite(between)):
        return float("nan")
    left, right = one.factor(), other.factor()
    spread = left.square().sum() + right.square().sum() - 2 * torch.linalg.svdvals(left @ right.T).sum()
    return max(float(between + spread), 0.0)
