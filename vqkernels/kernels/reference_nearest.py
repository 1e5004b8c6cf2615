"""Nearest-code search in plain torch: the definition of correct, and the road taken where nothing else runs.

    euclidean   codes[n] = argmin_k |x_n - c_k|^2     over real numbers, lowest index on ties
    cosine      codes[n] = argmax_k cos(x_n, c_k)     cosines within 2^-90 of the largest tie, lowest index

float64 scores of a block of tokens against all codes find the candidates that rounding cannot rule out; each survivor
is scored again term by term; what float64 still cannot separate is decided by integers that hold every product exactly.
Under torch.set_flush_denormal(True) torch itself reads subnormal inputs as zeros, and so does this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._dtypes import UNIT, accumulation_dtype
from .in_steps import both_details, both_in_steps
from .registry import register

UNIT64 = UNIT[torch.float64]
BLOCK_SCORES = 1 << 20  # scores held at once: 8 MiB of float64, whatever N and K
SAFE_LOW, SAFE_HIGH = 2.0**-960, 2.0**960  # squares inside neither lose bits to underflow nor overflow


def nearest(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    """See ``vqkernels.nearest``."""
    tokens, shape = x.reshape(-1, x.shape[-1]), x.shape[:2]
    bad_codebook = ~torch.isfinite(codebook).all()
    if not x.is_cuda and bad_codebook:
        raise ValueError("codebook: expected finite values, got NaN or Inf")
    if precision == "fast":
        codes, distance = _fast(tokens, codebook, metric)
    else:
        codes, distance = _exact(tokens, codebook, metric)
    invalid = ~torch.isfinite(tokens).all(dim=1) | bad_codebook  # [N]
    codes = codes.masked_fill(invalid, -1)
    distance = distance.masked_fill(invalid, math.nan)
    return codes.view(shape), distance.view(shape)


def _blocks(tokens: Tensor, codebook: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_SCORES // max(codebook.shape[0], codebook.shape[1]))
    for start in range(0, tokens.shape[0], step):
        yield slice(start, start + step)


def _outputs(tokens: Tensor) -> tuple[Tensor, Tensor]:
    n = tokens.shape[0]
    return tokens.new_zeros(n, dtype=torch.int64), tokens.new_zeros(n, dtype=torch.float32)


def _fast(tokens: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Scores in the inputs' own precision (float32 at least), no certificate."""
    dtype = accumulation_dtype(tokens.dtype)
    codes, distance = _outputs(tokens)
    with torch.autocast(tokens.device.type, enabled=False):
        book = codebook.to(dtype)  # [K, D]
        if metric == "cosine":
            book = torch.nn.functional.normalize(book, dim=1)
        half_norm = 0.5 * book.square().sum(1) if metric == "euclidean" else book.new_zeros(book.shape[0])
        for rows in _blocks(tokens, codebook):
            block = tokens[rows].to(dtype)
            codes[rows] = torch.addmm(half_norm, block, book.T, alpha=-1).argmin(1)
            distance[rows] = _distance_of(block.double(), codebook.double()[codes[rows]], metric)
    return codes, distance


def _distance_of(
    token: Tensor,  # [P, D] float64
    code: Tensor,  # [P, D] float64
    metric: str,
) -> Tensor:  # [P] float32
    if metric == "euclidean":
        return (token - code).square().sum(1).float()
    return (1 - _cosine(token, code)).clamp(min=0).float()


def _cosine(
    token: Tensor,  # [P, D] float64
    code: Tensor,  # [P, D] float64
) -> Tensor:  # [P] float64
    token, code = _scaled(token), _scaled(code)
    norms = token.norm(dim=1) * code.norm(dim=1)
    return torch.where(norms == 0, 0.0, (token * code).sum(1) / torch.where(norms == 0, 1.0, norms))


def _scaled(
    rows: Tensor,  # [P, D] float64
) -> Tensor:  # [P, D] float64
    """Each row times a power of two that brings its largest entry near 1: directions survive any scale."""
    exponent = torch.frexp(rows.abs().amax(dim=1, keepdim=True)).exponent
    half = -exponent // 2  # in two steps: a single factor for 2^-1074 would overflow
    return torch.ldexp(torch.ldexp(rows, half), -exponent - half)


def _exact(tokens: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    codes, distance = _outputs(tokens)
    book = codebook.double()  # [K, D]
    with torch.autocast(tokens.device.type, enabled=False):
        for rows in _blocks(tokens, codebook):
            block = tokens[rows].double()  # [n, D]
            block = torch.where(torch.isfinite(block).all(1, keepdim=True), block, 0.0)  # decided by the caller
            decide = _decide_euclidean if metric == "euclidean" else _decide_cosine
            codes[rows] = decide(block, book)
            distance[rows] = _distance_of(block, book[codes[rows]], metric)
    return codes, distance


def _decide_euclidean(
    block: Tensor,  # [n, D] float64
    book: Tensor,  # [K, D] float64
) -> Tensor:  # [n] int64
    """Candidates by a float64 product with its error bound, then by direct sums, then by integers."""
    center = book.mean(0)
    centered, book_centered = block - center, book - center
    half_norm = 0.5 * book_centered.square().sum(1)  # [K]
    scores = torch.addmm(half_norm, centered, book_centered.T, alpha=-1)  # [n, K]
    # centring rounds each entry by UNIT64 of the result, a sum of D products by D * UNIT64 of their sizes
    size = (centered.norm(dim=1) + book_centered.norm(dim=1).max())[:, None]  # [n, 1]
    bound = (block.shape[1] + 8) * UNIT64 * size.square()
    low = scores.amin(1, keepdim=True)
    unsafe = ~torch.isfinite(size.square()) | (size.square() < SAFE_LOW)
    row, code = ((scores <= low + 2 * bound) | ~torch.isfinite(scores) | unsafe).nonzero(as_tuple=True)  # [P] each
    direct = _direct_distances(block, book, row, code)  # [P]
    best = torch.full_like(low[:, 0], math.inf).scatter_reduce(0, row, direct, "amin")  # [n]
    slack = 1 + 4 * (block.shape[1] + 4) * UNIT64
    keep = (direct <= best[row] * slack) | (best[row] < SAFE_LOW) | ~(best[row] < SAFE_HIGH)
    return _lowest_of(block, book, row[keep], code[keep], "euclidean")


def _direct_distances(
    block: Tensor,  # [n, D] float64
    book: Tensor,  # [K, D] float64
    row: Tensor,  # [P] int64
    code: Tensor,  # [P] int64
) -> Tensor:  # [P] float64
    out = block.new_empty(row.shape[0])
    step = max(1, BLOCK_SCORES // block.shape[1])
    for start in range(0, row.shape[0], step):
        pairs = slice(start, start + step)
        out[pairs] = (block[row[pairs]] - book[code[pairs]]).square().sum(1)
    return out


def _decide_cosine(
    block: Tensor,  # [n, D] float64
    book: Tensor,  # [K, D] float64
) -> Tensor:  # [n] int64
    unit_block = torch.nn.functional.normalize(_scaled(block), dim=1)
    unit_book = torch.nn.functional.normalize(_scaled(book), dim=1)
    cosines = unit_block @ unit_book.T  # [n, K]
    bound = 4 * (block.shape[1] + 8) * UNIT64
    row, code = (cosines >= cosines.amax(1, keepdim=True) - bound).nonzero(as_tuple=True)
    return _lowest_of(block, book, row, code, "cosine")


def _lowest_of(
    block: Tensor,  # [n, D] float64
    book: Tensor,  # [K, D] float64
    row: Tensor,  # [P] int64, ascending
    code: Tensor,  # [P] int64, ascending within a row
    metric: str,
) -> Tensor:  # [n] int64
    """The best candidate of every row; rows with one candidate cost nothing more."""
    n = block.shape[0]
    count = torch.bincount(row, minlength=n)  # [n]
    first = count.cumsum(0) - count
    codes = code[first.clamp(max=max(code.shape[0] - 1, 0))]
    for token in (count > 1).nonzero()[:, 0].tolist():
        candidates = code[first[token] : first[token] + count[token]]
        codes[token] = _best_candidate(block[token], book, candidates.tolist(), metric)
    return codes


def _integers(values: Tensor) -> list[int]:  # [D] float64 -> integers in units of 2^-1074
    ratios = (value.as_integer_ratio() for value in values.tolist())
    return [numerator << (1075 - denominator.bit_length()) for numerator, denominator in ratios]


def _squared_distance(token: list[int], code: tuple[int, ...]) -> int:
    """|x - c|^2 in units of 2^-2148."""
    return sum((a - b) ** 2 for a, b in zip(token, code, strict=True))


def _negative_cosine(token: list[int], code: tuple[int, ...]) -> int:
    """-cos(x, c) in units of 2^-300, rounded once."""
    dot = sum(a * b for a, b in zip(token, code, strict=True))
    norms = sum(a * a for a in token) * sum(b * b for b in code)
    size = math.isqrt((dot * dot << 600) // norms) if norms else 0
    return size if dot < 0 else -size


def _best_candidate(
    token: Tensor,  # [D] float64
    book: Tensor,  # [K, D] float64
    candidates: list[int],
    metric: str,
) -> int:
    """The lowest index among the candidates that are best, or tie with the best."""
    distinct: dict[tuple[int, ...], int] = {}
    for k in candidates:
        distinct.setdefault(tuple(_integers(book[k])), k)  # an equal code of higher index can never win
    measure, tie = (_squared_distance, 0) if metric == "euclidean" else (_negative_cosine, 1 << 210)
    target = _integers(token)
    values = {k: measure(target, code) for code, k in distinct.items()}
    limit = min(values.values()) + tie
    return min(k for k, value in values.items() if value <= limit)


register("nearest", "reference", nearest)
register("nearest_both", "reference", both_in_steps(nearest), details=both_details)
