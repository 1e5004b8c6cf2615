"""Inputs on which a nearest-code search goes wrong, and the true answers, computed without any of our kernels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isqrt

import numpy as np
import torch
from torch import Tensor

TIE_COSINE = 2.0**-90  # cosines closer than this count as equal (the definition in vqkernels.nearest)
DIMS = (1, 2, 3, 4, 5, 8, 16, 17, 18, 31, 32, 33, 64, 65, 256, 257)  # around every tile and vector width
SIZES = ((0, 1), (1, 2), (5, 63), (6, 64), (7, 65))  # N, K around the tiles of tokens and of codes


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


def _cauchy(*shape: int, seed: int) -> Tensor:
    return ((_rand(*shape, seed=seed) - 0.5) * np.pi * 0.9999).tan()


def _scales(rows: int, seed: int) -> Tensor:  # [rows, 1]
    """Factors over sixty orders of magnitude."""
    return (10.0 ** _randn(rows, 1, seed=seed).mul(8).clamp(-30, 30).double()).float()


def kmeans_codebook(
    x: Tensor,  # [N, D]
    size: int,
) -> Tensor:  # [K, D]
    """A few rounds of Lloyd's algorithm from the first tokens: codes amid their tokens, as after training."""
    codes = x[:size].double()
    for _ in range(4):
        owner = torch.cdist(x.double(), codes).argmin(1)
        sums = torch.zeros_like(codes).index_add_(0, owner, x.double())
        count = torch.bincount(owner, minlength=size)[:, None]
        codes = torch.where(count > 0, sums / count.clamp(min=1), codes)
    return codes.to(x.dtype)


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
    sizes += [(n, k, 8) for n, k in SIZES]
    sizes += [(5 + d % 3, 66 + d % 5, d) for d in DIMS]
    return [Case(f"gauss-{n}x{k}x{d}", _randn(n, d, seed=n), _randn(k, d, seed=1000 + k)) for n, k, d in sizes]


def model_cases() -> list[Case]:
    """What quantizers meet in training, small."""
    latents = _randn(12, 16, seed=30).repeat_interleave(12, 0) + 0.3 * _randn(144, 16, seed=31)
    unit = torch.nn.functional.normalize(_randn(100, 18, seed=32), dim=1)
    return [
        Case("kmeans-codebook", latents[:40], kmeans_codebook(latents, 70)),
        Case("unit-norm", unit[:30], unit[30:]),
        Case("heavy-tailed", _cauchy(30, 12, seed=33), _cauchy(70, 12, seed=34)),
    ]


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
    one = _randn(1, 32, seed=61)
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
        Case("all-codes-zero", _randn(9, 5, seed=35), torch.zeros(67, 5)),
        Case("all-codes-zero-but-one", one + 0.1 * _randn(9, 32, seed=60), torch.cat([torch.zeros(9, 32), one])),
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
    sphere = torch.nn.functional.normalize(_randn(200, 6, seed=36), dim=1)
    return [
        Case("near-duplicates-1ulp", center + _randn(30, 32, seed=15), center + jitter),
        Case("near-duplicates-1e-4", x_half, base.repeat_interleave(3, 0) + _randn(180, 24, seed=16) * 1e-4),
        Case("below-float64", far, split),
        Case("crowd-around-zero", _randn(6, 6, seed=37) * 1e-7, sphere),  # every code at the same distance but for 1e-7
        Case("init-uniform-1/K", _randn(50, 64, seed=17), (_rand(256, 64, seed=18) * 2 - 1) / 256),
        Case("init-uniform-1/16384", _randn(40, 8, seed=19), (_rand(300, 8, seed=20) * 2 - 1) / 16384),
    ]


def _with_outlier(codebook: Tensor, row: int, by: float) -> Tensor:  # codebook [K, D]
    codebook = codebook.clone()
    codebook[row] *= by
    return codebook


def scale_cases() -> list[Case]:
    """Offsets and magnitudes that cancel, overflow or underflow in float32."""
    x, c = _randn(40, 20, seed=21), _randn(100, 20, seed=22)
    huge_row = x.clone()
    huge_row[3] *= 1e25
    tall = torch.ones(20)
    tall[13] = 1e7
    return [
        Case("offset-10-sigma", x * 0.1 + 1.0, c * 0.1 + 1.0),
        Case("offset-100-sigma", x * 0.01 + 1.0, c * 0.01 + 1.0),
        Case("offset-1e5-sigma", x * 1e-3 + 100.0, c * 1e-3 + 100.0),
        Case("scale-1e-30", x * 1e-30, c * 1e-30),
        Case("scale-1e30", x * 1e30, c * 1e30),
        Case("scale-1e38", x * 1e37, c * 1e37),
        Case("subnormal", x * 1e-41, c * 1e-41),
        Case("mixed-scales", x, c * _scales(100, seed=23)),
        Case("mixed-scales-both", x * _scales(40, seed=38), c * _scales(100, seed=23)),
        *(Case(f"one-outlier-code-{by:g}", x, _with_outlier(c, 7, by)) for by in (1e5, 1e6, 1e30)),
        Case("one-huge-coordinate", x * tall, c * tall),
        Case("one-huge-coordinate-of-codes", x, c * tall),
        Case("huge-tokens-tiny-codes", x * 1e20, c * 1e-20),
        Case("tiny-tokens-huge-codes", x * 1e-20, c * 1e15),
        Case("subnormal-codes", x[:2, :5], c[:66, :5] * 1e-41),  # few: exact arithmetic decides every pair
        Case("one-huge-token", huge_row, c),
        Case("float64-extremes", x.double() * 1e-200, c.double() * 1e-200),
        Case("float64-huge", x.double() * 1e200, c.double() * 1e200),
    ]


def non_finite_cases() -> list[Case]:
    """A token with NaN or Inf has code -1 and distance NaN; its neighbours are untouched."""
    x = _randn(37, 12, seed=24)
    x[3, 5], x[11, 0], x[30, 11] = float("nan"), float("inf"), float("-inf")
    return [Case("non-finite-tokens", x, _randn(80, 12, seed=25))]


def _mirrored(codebook: Tensor) -> Tensor:  # [K, D] -> [2 K, D]
    """Every code beside its mirror image in the last coordinate: one cosine, two rows."""
    flip = torch.ones(codebook.shape[1])
    flip[-1] = -1
    return torch.stack([codebook * flip, codebook], dim=1).flatten(0, 1)


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
        Case("cosine-all-codes-equal", x[:9], c[:1].repeat(70, 1)),
        Case("cosine-all-codes-zero", x[:9], torch.zeros(67, 12)),
        Case("cosine-heavy-tailed", _cauchy(20, 12, seed=33), _cauchy(70, 12, seed=34)),
        Case("cosine-one-huge-coordinate", _with_outlier(x[:9].T, 3, 1e7).T, _with_outlier(c.T, 3, 1e7).T),
        Case("cosine-outlier-code", x, _with_outlier(c, 7, 1e30)),
        Case("cosine-mirrored", torch.cat([x[:7, :11], torch.zeros(7, 1)], 1), _mirrored(c[:30] * 0.5 + x[:1])),
        Case("cosine-subnormal", x * 1e-41, c * 1e-41),
        *(Case(f"cosine-{n}x{k}", _randn(n, 8, seed=n), _randn(k, 8, seed=1000 + k)) for n, k in SIZES),
        *(Case(f"cosine-dim-{d}", _randn(2, d, seed=d), _randn(66, d, seed=1000 + d)) for d in (1, 2, 17, 33, 257)),
        Case("cosine-scale-1e-30", x * 1e-30, c * 1e30),
        Case("cosine-float64", x.double(), c.double()),
        Case("cosine-bfloat16", x.bfloat16(), c.bfloat16()),
        Case("cosine-non-finite", non_finite_cases()[0].x, _randn(70, 12, seed=29)),
    ]


@lru_cache(maxsize=1)
def euclidean_cases() -> list[Case]:
    """Every small case for the euclidean metric."""
    groups = (ragged_cases, model_cases, dtype_cases, tie_cases, near_tie_cases, scale_cases, non_finite_cases)
    return [case for group in groups for case in group()]


def cases(metric: str = "euclidean") -> list[Case]:
    """Every case for ``metric`` that is small enough for an interpreter."""
    return euclidean_cases() if metric == "euclidean" else cosine_cases()


@lru_cache(maxsize=1)
def large_cases() -> list[Case]:
    """The same kinds past the blocks of the compiled kernels, for both metrics: thousands of codes, many ties."""
    latents = _randn(60, 40, seed=40).repeat_interleave(30, 0) + 0.3 * _randn(1800, 40, seed=41)
    base = _randn(1, 16, seed=42)
    unit = torch.nn.functional.normalize(_randn(4097, 8, seed=43), dim=1)
    order = [torch.randperm(16, generator=torch.Generator().manual_seed(s)) for s in range(2000)]
    half, wide = torch.bfloat16, torch.float64
    return [
        Case("large-gauss", _randn(97, 32, seed=45), _randn(4097, 32, seed=46)),
        Case("large-kmeans", latents[::9], kmeans_codebook(latents, 1030)),
        Case("large-unit-norm", unit[::40], unit.roll(1, 1)),
        Case("large-init-uniform", _randn(60, 8, seed=47), (_rand(16384, 8, seed=48) * 2 - 1) / 16384),
        Case("large-offset-100-sigma", _randn(70, 65, seed=49) * 0.01 + 1, _randn(2050, 65, seed=50) * 0.01 + 1),
        Case("large-near-duplicates", _randn(50, 16, seed=51), base + _randn(4097, 16, seed=52) * 1e-4),
        Case("large-near-ties", _randn(30, 16, seed=53), base * (1 + 2.0**-23 * _randn(3000, 16, seed=54).round())),
        Case("large-crowd-around-zero", _randn(30, 8, seed=55) * 1e-7, unit),
        Case("large-all-codes-equal", _randn(33, 24, seed=56), _randn(1, 24, seed=57).repeat(5000, 1)),
        Case("large-all-codes-zero", _randn(33, 3, seed=58), torch.zeros(4097, 3)),
        Case("large-permutations", torch.full((7, 16), 0.3) * torch.arange(1, 8)[:, None], base[0][torch.stack(order)]),
        Case("large-mirrored", torch.cat([_randn(60, 7, seed=59), torch.zeros(60, 1)], 1), _mirrored(unit[:2000])),
        Case("large-mixed-scales", _randn(64, 20, seed=60), _randn(3000, 20, seed=61) * _scales(3000, seed=44)),
        *(
            Case(f"large-outlier-{by:g}", _randn(80, 33, seed=62), _with_outlier(_randn(3000, 33, seed=63), 2900, by))
            for by in (1e5, 1e30)
        ),
        Case("large-heavy-tailed", _cauchy(64, 18, seed=64), _cauchy(4097, 18, seed=65)),
        Case("large-bfloat16", _randn(90, 17, seed=66, dtype=half), _randn(2500, 17, seed=67, dtype=half)),
        Case("large-float64", _randn(40, 9, seed=68, dtype=wide), _randn(2500, 9, seed=69, dtype=wide)),
    ]


_KNOWN: dict[bytes, tuple[Tensor, Tensor]] = {}  # answers by a digest of the question: each case is asked for often


def true_nearest(
    x: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    metric: str = "euclidean",
) -> tuple[Tensor, Tensor]:  # codes int64 [N], distance float32 [N]
    """The argmin over real numbers: float64 brute force, exact integers wherever float64 cannot separate."""
    xs, cs = x.double().contiguous().numpy(), codebook.double().contiguous().numpy()
    digest = hashlib.sha256(f"{metric} {xs.shape} {cs.shape}".encode() + xs.tobytes() + cs.tobytes()).digest()
    if digest not in _KNOWN:
        _KNOWN[digest] = _answer(xs, cs, metric)
    codes, distance = _KNOWN[digest]
    return codes.clone(), distance.clone()


def _answer(xs: np.ndarray, cs: np.ndarray, metric: str) -> tuple[Tensor, Tensor]:
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


def _integers(values: np.ndarray, unit: int) -> np.ndarray:
    """float64 as Python integers in units of 2^unit, which divides them all."""
    mantissa, exponent = np.frexp(values)
    shift = np.where(values == 0, 0, exponent - 53 - unit)
    whole = (mantissa * 2.0**53).astype(np.int64).astype(object)
    return whole << shift.astype(object)


def _unit(*arrays: np.ndarray) -> int:
    """An exponent whose power of two divides every number."""
    return min((int(np.frexp(a[a != 0])[1].min()) for a in arrays if (a != 0).any()), default=0) - 53


def _distinct(rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The candidates without those that repeat a row of lower index."""
    return candidates[np.sort(np.unique(rows[candidates] + 0.0, axis=0, return_index=True)[1])]


def _decide_euclidean(token: np.ndarray, codebook: np.ndarray) -> tuple[int, np.float32]:
    rough = ((token - codebook) ** 2).sum(axis=1)
    low = rough.min()
    safe = np.isfinite(low) and low > 1e-250  # else float64 over- or underflowed: look at every code
    contenders = _distinct(codebook, np.flatnonzero(rough <= low * (1 + 1e-9)) if safe else np.arange(len(codebook)))
    unit = _unit(token, codebook[contenders])
    exact = ((_integers(token, unit) - _integers(codebook[contenders], unit)) ** 2).sum(axis=1)
    best = int(np.argmin(exact))  # the first of equals
    return int(contenders[best]), _float32(Fraction(exact[best]) * Fraction(2) ** (2 * unit))


def _cosine_fixed_point(token: np.ndarray, code: np.ndarray) -> int:
    """cos of two integer vectors in units of 2^-400, rounded towards zero; 0 for zero vectors."""
    dot, norms = int(token @ code), int(token @ token) * int(code @ code)
    size = isqrt((dot * dot << 800) // norms) if norms else 0
    return size if dot >= 0 else -size


def _decide_cosine(token: np.ndarray, codebook: np.ndarray) -> tuple[int, np.float32]:
    scale = max(np.abs(token).max(), 1e-320)
    rows = np.abs(codebook).max(axis=1)
    unit = codebook / np.where(rows == 0, 1, rows)[:, None]
    norm = np.linalg.norm(unit, axis=1)
    norm_t = np.linalg.norm(token / scale)
    rough = unit @ (token / scale) / np.where(norm == 0, 1, norm) / (norm_t if norm_t else 1)
    contenders = _distinct(codebook, np.flatnonzero(rough >= rough.max() - 1e-12))
    target = _integers(token, _unit(token))
    exact = {int(k): _cosine_fixed_point(target, _integers(codebook[k], _unit(codebook[k]))) for k in contenders}
    limit = max(exact.values()) - int(TIE_COSINE * 2**400)
    best = min(k for k, value in exact.items() if value >= limit)
    return best, np.float32(1.0 - exact[best] / 2**400)
