"""The k nearest codes in plain torch: the definition of correct.

codes[n, j] is the nearest code of x_n, as ``nearest`` has it, among those that codes[n, :j] leave; so they come in the
order of distance, and of the index where the distance is the same.

float64 scores of a block of tokens find the k + 1 best; where two neighbours among them are closer than rounding can
tell, the token is decided by integers that hold every product exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from torch import Tensor

from .reference_nearest import (
    SAFE_LOW,
    UNIT64,
    _blocks,
    _distance_of,
    _integers,
    _negative_cosine,
    _scaled,
    _squared_distance,
)
from .registry import register

TIE = 1 << 210  # cosines in units of 2^-300 that are no farther apart are the same, as in reference_nearest


def nearest_k(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    k: int,
    metric: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T, k], distance float32 [B, T, k]
    """See ``vqkernels.nearest_k``."""
    tokens = x.reshape(-1, x.shape[-1])  # [N, D]
    bad_codebook = ~torch.isfinite(codebook).all()
    if not x.is_cuda and bad_codebook:
        raise ValueError("codebook: expected finite values, got NaN or Inf")
    book = codebook.double()
    codes = tokens.new_zeros((tokens.shape[0], k), dtype=torch.int64)
    distance = tokens.new_zeros((tokens.shape[0], k), dtype=torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        for rows in _blocks(tokens, codebook):
            block = tokens[rows].double()  # [n, D]
            block = torch.where(torch.isfinite(block).all(1, keepdim=True), block, 0.0)
            codes[rows] = _decide(block, book, k, metric)
            pairs = block.repeat_interleave(k, 0), book[codes[rows].flatten()]
            distance[rows] = _distance_of(*pairs, metric).view(-1, k).cummax(1).values  # their rounding aside
    invalid = (~torch.isfinite(tokens).all(dim=1) | bad_codebook)[:, None]
    shape = (*x.shape[:2], k)
    return codes.masked_fill(invalid, -1).view(shape), distance.masked_fill(invalid, math.nan).view(shape)


def _scores(
    block: Tensor,  # [n, D] float64
    book: Tensor,  # [K, D] float64
    metric: str,
) -> tuple[Tensor, Tensor]:  # scores [n, K], and how far apart two must be to be told apart [n, 1]
    if metric == "cosine":
        unit_block = torch.nn.functional.normalize(_scaled(block), dim=1)
        unit_book = torch.nn.functional.normalize(_scaled(book), dim=1)
        gap = 4 * (block.shape[1] + 8) * UNIT64
        return -(unit_block @ unit_book.T), unit_block.new_full((block.shape[0], 1), gap)
    center = book.mean(0)
    centered, book_centered = block - center, book - center
    half_norm = 0.5 * book_centered.square().sum(1)  # [K]
    scores = torch.addmm(half_norm, centered, book_centered.T, alpha=-1)
    square = (centered.norm(dim=1) + book_centered.norm(dim=1).max()).square()[:, None]  # [n, 1]
    gap = 2 * (block.shape[1] + 8) * UNIT64 * square
    return scores, torch.where(torch.isfinite(square) & (square >= SAFE_LOW), gap, math.inf)


def _decide(
    block: Tensor,  # [n, D] float64
    book: Tensor,  # [K, D] float64
    k: int,
    metric: str,
) -> Tensor:  # int64 [n, k]
    scores, gap = _scores(block, book, metric)
    best, codes = scores.topk(min(k + 1, book.shape[0]), dim=1, largest=False, sorted=True)
    unclear = ~(best.diff(dim=1) > gap).all(1) | ~torch.isfinite(best).all(1)  # [n]
    codes = codes[:, :k]
    for token in unclear.nonzero()[:, 0].tolist():
        near = scores[token] <= best[token, k - 1] + gap[token]
        candidates = (near | ~torch.isfinite(scores[token]) | ~torch.isfinite(gap[token])).nonzero()[:, 0]
        codes[token] = torch.tensor(_ordered(block[token], book, candidates.tolist(), k, metric))
    return codes


def _ordered(
    token: Tensor,  # [D] float64
    book: Tensor,  # [K, D] float64
    candidates: list[int],
    k: int,
    metric: str,
) -> list[int]:
    """The first k of the candidates, decided without rounding."""
    measure, tie = (_squared_distance, 0) if metric == "euclidean" else (_negative_cosine, TIE)
    target, known = _integers(token), dict[tuple[int, ...], int]()
    left = []
    for candidate in candidates:
        code = tuple(_integers(book[candidate]))
        if code not in known:
            known[code] = measure(target, code)
        left.append((known[code], candidate))
    left.sort()
    found: list[int] = []
    while len(found) < k:  # the lowest index among those that tie with the best that is left
        tied = bisect_right(left, (left[0][0] + tie, book.shape[0]))
        place = min(range(tied), key=lambda i: left[i][1])
        found.append(left.pop(place)[1])
    return found


register("nearest_k", "reference", nearest_k)
