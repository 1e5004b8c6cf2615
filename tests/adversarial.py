"""Inputs on which a nearest-code search goes wrong, and the true answers, computed without any of our kernels."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isqrt

import numpy as np
import torch
from torch import Tensor

TIE_COSINE = 2.0**-90  # cosines closer than this count as equal (the definition in vqkernels.nearest)


@dataclass(frozen=True, eq=False)
class Case:
    """One search problem: tokens, codebook and what makes it hard."""

    name: str
    x: Tensor  # [N, D]
    codebook: Tensor  # [K, D]

    def __repr__(self) -> str:
        return self.name


def _randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def ragged_cases() -> list[Case]:
    """Plain gaussian data at sizes that fit no tile."""
    sizes = [
        (1, 1, 1),
        (5, 2, 1),
        (17, 33, 3),
        (70, 65, 8),
        (33, 129, 18),
        (19, 300, 100),
        (7, 67, 257),
        (0, 5, 4),
    ]
    return [Case(f"gauss-{n}x{k}x{d}", _randn(n, d, seed=n), _randn(k, d, seed=1000 + k)) for n, k, d in sizes]


def dtype_cases() -> list[Case]:
    """The four input types; half types tie often, which is the point."""
    cases = []
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        cases.append(Case(f"gauss-{name}", _randn(40, 24, seed=1, dtype=dtype), _randn(90, 24, seed=2, dtype=dtype)))
        coarse = (_randn(40, 3, seed=3) * 2).round().to(dtype)
        cases.append(Case(f"grid-{name}", coarse, (_randn(80, 3, seed=4) * 2).round().to(dtype)))
    return cases


def tie_cases() -> list[Case]:
    """True ties: the lowest index must win, and no rounding may decide."""
    base = _randn(12, 16, seed=5)
    permuted = torch.stack([base[0][torch.randperm(16, generator=torch.Generator().manual_seed(s))] for s in range(40)])
    x_mirror = torch.cat([torch.zeros(20, 1), _randn(20, 7, seed=7)], dim=1)
    c_mirror = torch.cat([_randn(30, 1, seed=8), _randn(30, 7, seed=9) * 0.1], dim=1)
    c_mirror = torch.stack([c_mirror * torch.tensor([-1.0] + [1.0] * 7), c_mirror], dim=1).reshape(60, 8)
    return [
        Case("all-codes-equal", _randn(25, 16, seed=6), base[:1].expand(70, 16).clone()),
        Case("duplicates", _randn(50, 16, seed=10), base.repeat(9, 1)),
        Case("permutations-from-constant", torch.full((9, 16), 0.3) * torch.arange(1, 10)[:, None], permuted),
        Case("mirrored-codes", x_mirror, c_mirror),
        Case("tokens-are-codes", base, base.flip(0).repeat(3, 1)),
        Case(
            "signed-zeros",
            torch.zeros(3, 4),
            torch.tensor([[1.0, 0, 0, 0], [-0.0, 0, -0.0, 0], [0.0, 0, 0, 0]]),
        ),
    ]


def near_tie_cases() -> list[Case]:
    """Neighbours that float32 (and some that float64) cannot tell apart."""
    center = _randn(1, 32, seed=11)
    ulp = torch.finfo(torch.float32).eps
    jitter = (_randn(100, 32, seed=12) * 2).round() * ulp * center.abs()
    far = torch.zeros(2, 3)
    far[:, 0] = 2.0**30  # |x - c|^2 differs by 2^-40 of itself: float64 sums round it away
    split = torch.tensor([[0.0, 2.0**-10, 1.0], [0.0, 2.0**-10 * (1 + ulp), -1.0], [0.0, 2.0**-10 * (1 - ulp), 1.0]])
    x_half = (base := _randn(60, 24, seed=13)) + _randn(60, 24, seed=14) * 1e-4
    return [
        Case("near-duplicates-1ulp", center + _randn(30, 32, seed=15), center + jitter),
        Case("near-duplicates-1e-4", x_half, base.repeat_interleave(3, 0) + _randn(180, 24, seed=16) * 1e-4),
        Case("below-float64", far, split),
        Case("init-uniform-1/K", _randn(50, 64, seed=17), (_rand(256, 64, seed=18) * 2 - 1) / 256),
        Case("init-uniform-1/16384", _randn(40, 8, seed=19), (_rand(300, 8, seed=20) * 2 - 1) / 16384),
    ]


def scale_cases() -> list[Case]:
    """Offsets and magnitudes that cancel, overflow or underflow in float32."""
    x, c = _randn(40, 20, seed=21), _randn(100, 20, seed=22)
    outlier = c.clone()
    outlier[7] *= 1e6
    huge_row = x.clone()
    huge_row[3] *= 1e25
    return [
        Case("offset-10-sigma", x * 0.1 + 1.0, c * 0.1 + 1.0),
        Case("offset-100-sigma", x * 0.01 + 1.0, c * 0.01 + 1.0),
        Case("offset-1e5-sigma", x * 1e-3 + 100.0, c * 1e-3 + 100.0),
        Case("scale-1e-30", x * 1e-30, c * 1e-30),
        Case("scale-1e30", x * 1e30, c * 1e30),
        Case("scale-1e38", x * 1e37, c * 1e37),
        Case("subnormal", x * 1e-41, c * 1e-41),
        Case("mixed-scales", x, c * (10.0 ** _randn(100, 1, seed=23).mul(8).clamp(-30, 30).double()).float()),
        Case("one-outlier-code", x, outlier),
        Case("one-huge-token", huge_row, c),
        Case("float64-extremes", x.double() * 1e-200, c.double() * 1e-200),
        Case("float64-huge", x.double() * 1e200, c.double() * 1e200),
    ]


def non_finite_cases() -> list[Case]:
    """A token with NaN or Inf has code -1 and distance NaN; its neighbours are untouched."""
    x = _randn(37, 12, seed=24)
    x[3, 5], x[11, 0], x[30, 11] = float("nan"), float("inf"), float("-inf")
    return [Case("non-finite-tokens", x, _randn(80, 12, seed=25))]


def cosine_cases() -> list[Case]:
    """Directions: scaled duplicates tie, zero vectors are at cosine 0, near-parallel codes crowd."""
    x, c = _randn(30, 12, seed=26), _randn(60, 12, seed=27)
    scaled = torch.cat([c * 3, c, c * 0.1, c * 4])
    with_zero = c.clone()
    with_zero[5] = 0
    x_zero = x.clone()
    x_zero[4] = 0
    near = c[:1] + _randn(80, 12, seed=28) * 1e-7
    east = torch.tensor([[1.0, 0.0]])
    tilted = torch.tensor([[1.0, (2 * f) ** 0.5 * 2.0**-45] for f in (1.6, 0.8, 0.0)])  # cosines 0.8 ties apart
    orthogonal = torch.tensor([[0.0, 1.0], [2.0**-100, 1.0], [0.0, -1.0]])
    return [
        Case("cosine-gauss", x, c),
        Case("cosine-scaled-duplicates", torch.cat([x[:10], c[:10] * 2]), scaled),
        Case("cosine-zero-vectors", x_zero, with_zero),
        Case("cosine-all-negative", x.abs(), -c.abs()),
        Case("cosine-zero-code-wins", x.abs(), torch.cat([-c.abs(), torch.zeros(1, 12), torch.zeros(1, 12)])),
        Case("cosine-near-parallel", x + c[:1] * 4, near),
        Case("cosine-chain-of-ties", east, tilted),
        Case("cosine-chain-of-ties-reversed", east, tilted.flip(0)),
        Case("cosine-ties-around-zero", east, orthogonal),
        Case("cosine-scale-1e-30", x * 1e-30, c * 1e30),
        Case("cosine-float64", x.double(), c.double()),
        Case("cosine-bfloat16", x.bfloat16(), c.bfloat16()),
        Case("cosine-non-finite", non_finite_cases()[0].x, _randn(70, 12, seed=29)),
    ]


@lru_cache(maxsize=1)
def euclidean_cases() -> list[Case]:
    """Every case for the euclidean metric."""
    groups = (ragged_cases, dtype_cases, tie_cases, near_tie_cases, scale_cases, non_finite_cases)
    return [case for group in groups for case in group()]


def cases(metric: str = "euclidean") -> list[Case]:
    """Every case for ``metric``."""
    return euclidean_cases() if metric == "euclidean" else cosine_cases()


def true_nearest(
    x: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    metric: str = "euclidean",
) -> tuple[Tensor, Tensor]:  # codes int64 [N], distance float32 [N]
    """The argmin over real numbers: float64 brute force, exact fractions wherever float64 cannot separate."""
    xs, cs = x.double().numpy(), codebook.double().numpy()
    codes = np.full(len(xs), -1, dtype=np.int64)
    distance = np.full(len(xs), np.nan, dtype=np.float32)
    decide = _decide_euclidean if metric == "euclidean" else _decide_cosine
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for n, token in enumerate(xs):
            if np.isfinite(token).all():
                codes[n], distance[n] = decide(token, cs)
    return torch.from_numpy(codes), torch.from_numpy(distance)


def _float32(value: Fraction) -> np.float32:
    """Nearest float32; past the largest one, infinity."""
    return np.float32(np.inf) if value > Fraction(3.5e38) else np.float32(float(value))


def _squared_distance(token: np.ndarray, code: np.ndarray) -> Fraction:
    return sum(
        ((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(token.tolist(), code.tolist(), strict=True)),
        Fraction(0),
    )


def _decide_euclidean(token: np.ndarray, codebook: np.ndarray) -> tuple[int, np.float32]:
    rough = ((token - codebook) ** 2).sum(axis=1)
    low = rough.min()
    safe = np.isfinite(low) and low > 1e-250  # else float64 over- or underflowed: look at every code
    contenders = np.flatnonzero(rough <= low * (1 + 1e-9)) if safe else np.arange(len(codebook))
    exact: dict[bytes, Fraction] = {}
    for k in contenders:
        exact.setdefault((codebook[k] + 0.0).tobytes(), _squared_distance(token, codebook[k]))
    best = min(contenders, key=lambda k: (exact[(codebook[k] + 0.0).tobytes()], k))
    return int(best), _float32(exact[(codebook[best] + 0.0).tobytes()])


def _cosine_fixed_point(token: list[Fraction], code: list[Fraction]) -> int:
    """cos in units of 2^-400, rounded towards zero; 0 for zero vectors."""
    dot = sum((a * b for a, b in zip(token, code, strict=True)), Fraction(0))
    norms = sum((a * a for a in token), Fraction(0)) * sum((b * b for b in code), Fraction(0))
    size = isqrt(int(dot * dot / norms * 2**800)) if norms else 0
    return size if dot >= 0 else -size


def _decide_cosine(token: np.ndarray, codebook: np.ndarray) -> tuple[int, np.float32]:
    t = [Fraction(v) for v in token.tolist()]
    scale = max(np.abs(token).max(), 1e-320)
    rows = np.abs(codebook).max(axis=1)
    unit = codebook / np.where(rows == 0, 1, rows)[:, None]
    norm = np.linalg.norm(unit, axis=1)
    norm_t = np.linalg.norm(token / scale)
    rough = unit @ (token / scale) / np.where(norm == 0, 1, norm) / (norm_t if norm_t else 1)
    contenders = np.flatnonzero(rough >= rough.max() - 1e-12)
    exact = {int(k): _cosine_fixed_point(t, [Fraction(v) for v in codebook[k].tolist()]) for k in contenders}
    limit = max(exact.values()) - int(TIE_COSINE * 2**400)
    best = min(k for k, value in exact.items() if value >= limit)
    return best, np.float32(1.0 - exact[best] / 2**400)
