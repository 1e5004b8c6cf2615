"""The distributions that a benchmark draws tokens and codes from: ordinary ones, and the worst that a search can meet.

x and codebook are float32; the same seed gives the same inputs (a k-means codebook: up to the rounding of its sums).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from vqkernels.ops import codebook_stats, nearest, sign_rows

from .shapes import Shape

OFFSET_SIGMAS = 100.0
DUPLICATES, DUPLICATE_DISTANCE = 8, 1e-4  # codes of a group, and how far apart they are
NEAR_TIE_DISTANCE, NEAR_TIE_CENTRES = 1e-6, 4
OUTLIER = 1e6
SCALE_DECADES = 3.0  # mixed-scales: rows from 10^-3 to 10^3 long
MIXTURE_PARTS = 64
KMEANS_TOKENS, KMEANS_STEPS = 65536, 3
KMEANS_FLAT = 2048  # more codes than this are found in two levels: P (G + K / G) distances instead of P K

Inputs = tuple[Tensor, Tensor]  # x [N, D], codebook [K, D]


def normal_rows(rows: int, dim: int, seed: int) -> Tensor:  # [rows, dim]
    """N(0, 1) numbers."""
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def _normal(shape: Shape, seed: int) -> Inputs:
    return normal_rows(shape.tokens, shape.dim, 2 * seed), normal_rows(shape.codes, shape.dim, 2 * seed + 1)


def _unit(shape: Shape, seed: int) -> Inputs:
    x, codebook = _normal(shape, seed)
    return torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(codebook, dim=1)


def _offset(shape: Shape, seed: int) -> Inputs:
    x, codebook = _normal(shape, seed)
    return x + OFFSET_SIGMAS, codebook + OFFSET_SIGMAS


def _init(shape: Shape, seed: int) -> Inputs:
    """The codebook as VQ-VAE code initialises it: uniform in +-1/K."""
    x, _ = _normal(shape, seed)
    uniform = torch.rand(shape.codes, shape.dim, generator=torch.Generator().manual_seed(2 * seed + 1))
    return x, (uniform * 2 - 1) / shape.codes


def _near_duplicates(shape: Shape, seed: int) -> Inputs:
    """Groups of codes around a common centre: float32 can't tell them apart from afar."""
    x, codebook = _normal(shape, seed)
    group = torch.arange(shape.codes) // DUPLICATES
    return x, codebook[group] + DUPLICATE_DISTANCE / (2 * shape.dim) ** 0.5 * codebook


def _mixed_scales(shape: Shape, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(2 * seed + 3)

    def scaled(rows: Tensor) -> Tensor:  # [R, D]
        decades = SCALE_DECADES * (2 * torch.rand(len(rows), 1, generator=generator) - 1)
        return rows * 10**decades

    x, codebook = _normal(shape, seed)
    return scaled(x), scaled(codebook)


def _same(shape: Shape, seed: int) -> Inputs:
    """All codes equal: every code ties with every other."""
    x, codebook = _normal(shape, seed)
    return x, codebook[:1].repeat(shape.codes, 1)


def _near_ties(shape: Shape, seed: int) -> Inputs:
    """Codes within a few roundings of one of four centres: a coarse pass can't tell a quarter of them from the best."""
    x, codebook = _normal(shape, seed)
    centre = torch.arange(shape.codes) % min(NEAR_TIE_CENTRES, shape.codes)
    return x, codebook[centre] + NEAR_TIE_DISTANCE * codebook


def _outlier(shape: Shape, seed: int) -> Inputs:
    """One code far away from the others: it spoils a scale that they share."""
    x, codebook = _normal(shape, seed)
    codebook[shape.codes // 2] *= OUTLIER
    return x, codebook


def _signs(shape: Shape, seed: int) -> Inputs:
    """The codebook of a lookup-free quantizer: all sign vectors, or as many as there are codes, or them in turns."""
    codes = torch.arange(shape.codes) % (1 << shape.dim)
    return normal_rows(shape.tokens, shape.dim, 2 * seed), sign_rows(codes, shape.dim)


@lru_cache(maxsize=1)  # the thread counts of a shape share it
def _kmeans(shape: Shape, seed: int) -> Inputs:
    """Tokens of a mixture of correlated normals, and the k-means codebook of other tokens of it."""
    generator = torch.Generator().manual_seed(2 * seed + 9)
    spectrum = torch.arange(1, shape.dim + 1).rsqrt()  # half as much energy in every next octave of dimensions
    mix = torch.randn(shape.dim, shape.dim, generator=generator) / shape.dim**0.5
    centres = torch.randn(MIXTURE_PARTS, shape.dim, generator=generator)

    def draw(rows: int) -> Tensor:  # [rows, D]
        part = torch.randint(MIXTURE_PARTS, (rows,), generator=generator)
        noise = torch.randn(rows, shape.dim, generator=generator)
        return noise.add_(centres[part]).mul_(spectrum) @ mix

    x = draw(shape.tokens)
    training = draw(max(2 * shape.codes, min(KMEANS_TOKENS, 64 * shape.codes)))
    return x, kmeans_codebook(training, shape.codes, generator)


def kmeans_codebook(
    tokens: Tensor,  # [P, D]
    size: int,
    generator: torch.Generator,
) -> Tensor:  # [size, D]
    """A few Lloyd steps; for many codes over groups of tokens that a first, small codebook makes. In random order."""
    if size <= KMEANS_FLAT:
        return _lloyd(tokens, size, generator)
    groups = 1 << (size.bit_length() // 2)
    group = nearest(tokens, _lloyd(tokens, groups, generator))[0]
    counts = torch.bincount(group, minlength=groups)
    parts = tokens[group.argsort(stable=True)].split(counts.tolist())
    shares = _shares(counts, size).tolist()
    codes = [_lloyd(part, share, generator) for part, share in zip(parts, shares, strict=True) if share]
    return torch.cat(codes)[torch.randperm(size, generator=generator)]


def _shares(counts: Tensor, total: int) -> Tensor:  # int64 [G] -> int64 [G]
    """``total`` split as ``counts`` are, the largest remainders rounded up."""
    scaled = counts * total
    shares, remainders = scaled // counts.sum(), scaled % counts.sum()
    missing = total - int(shares.sum())
    shares[remainders.argsort(descending=True, stable=True)[:missing]] += 1
    return shares


def _lloyd(tokens: Tensor, size: int, generator: torch.Generator) -> Tensor:  # [P, D] -> [size, D]
    codebook = tokens[torch.randperm(len(tokens), generator=generator)[:size]]
    for _ in range(KMEANS_STEPS):
        counts, sums = codebook_stats(tokens, nearest(tokens, codebook)[0], size)
        codebook = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codebook)
    return codebook


KINDS: dict[str, Callable[[Shape, int], Inputs]] = {
    "normal": _normal,
    "kmeans": _kmeans,
    "unit": _unit,
    "init": _init,
    "offset": _offset,
    "near-duplicates": _near_duplicates,
    "mixed-scales": _mixed_scales,
    "same": _same,
    "near-ties": _near_ties,
    "outlier": _outlier,
    "signs": _signs,
}


def make_inputs(shape: Shape, data: str, seed: int) -> Inputs:
    """Tokens and codes of one of ``KINDS``, float32; not to be written to.

    Raises:
        ValueError: no distribution of that name.
    """
    if data not in KINDS:
        raise ValueError(f"data: expected one of {', '.join(KINDS)}; got {data!r}")
    return KINDS[data](shape, seed)
