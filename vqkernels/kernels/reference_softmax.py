"""Softmax over the codebook in plain torch, a block of tokens at a time and never as an [N, K] array.

    l_nk = scale <x_n, c_k> + bias_k        p_n = softmax_k(l_n)

softmax_forward     lse_n = log sum_k exp l_nk,  entropy_n = -sum_k p_nk log p_nk
softmax_code_sums   sums_k = sum_n weight_n p_nk
softmax_backward    the gradients of both, and of <direction_n, sum_k p_nk c_k>
softmax_sample      a code drawn with probability p_nk

All arithmetic is float64 and rounded once at the end. A token with NaN or Inf gives NaN (code -1), has weight 0 in sums
and passes no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .registry import register

BLOCK_LOGITS = 1 << 20  # logits held at once: 8 MiB of float64, whatever N and K


class _Block(NamedTuple):
    """Some tokens with all their logits."""

    rows: slice  # of the N tokens
    tokens: Tensor  # [n, D] float64; 0 where not finite
    logits: Tensor  # [n, K] float64
    finite: Tensor  # bool [n]


class _PerToken(NamedTuple):
    """What the backward is given for each token."""

    dlse: Tensor  # [N]
    dentropy: Tensor  # [N]
    weight: Tensor  # [N]


def _blocks(
    x: Tensor,  # [B, T, D]
    book: Tensor,  # [K, D] float64
    bias: Tensor | None,  # [K]
    scale: float,
) -> Iterator[_Block]:
    tokens = x.reshape(-1, x.shape[-1])
    step = max(1, BLOCK_LOGITS // max(book.shape))
    for start in range(0, tokens.shape[0], step):
        block = tokens[start : start + step].double()
        finite = torch.isfinite(block).all(1)
        block = torch.where(finite[:, None], block, 0.0)
        logits = scale * (block @ book.T)
        if bias is not None:
            logits += bias.double()
        yield _Block(slice(start, start + step), block, logits, finite)


def softmax_forward(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
) -> tuple[Tensor, Tensor]:  # lse [B, T], entropy [B, T]
    """Log-sum-exp and entropy of each token, relative to its largest logit."""
    lse, entropy = (x.new_empty(x.shape[0] * x.shape[1]) for _ in range(2))
    with torch.autocast(x.device.type, enabled=False):
        for block in _blocks(x, codebook.double(), bias, scale):
            top = block.logits.amax(1, keepdim=True)
            below = block.logits - top  # [n, K]
            weights = below.exp()
            total = weights.sum(1)
            spread = (weights * below).sum(1) / total
            lse[block.rows] = torch.where(block.finite, top[:, 0] + total.log(), math.nan).to(x.dtype)
            entropy[block.rows] = torch.where(block.finite, total.log() - spread, math.nan).to(x.dtype)
    return lse.view(x.shape[:2]), entropy.view(x.shape[:2])


def _log_probabilities(block: _Block) -> Tensor:  # [n, K]
    """From the logits alone: lse was rounded to x's dtype, and p would not sum to 1 by as much."""
    return block.logits.log_softmax(1)


def softmax_code_sums(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
    lse: Tensor,  # [B, T]
    weight: Tensor,  # [B, T]
) -> Tensor:  # sums [K]
    """The weighted sum over tokens of their probabilities, in token order."""
    sums = torch.zeros(codebook.shape[0], dtype=torch.float64, device=x.device)
    weight = weight.reshape(-1)
    with torch.autocast(x.device.type, enabled=False):
        for block in _blocks(x, codebook.double(), bias, scale):
            share = torch.where(block.finite, weight[block.rows].double(), 0.0)  # [n]
            sums += (_log_probabilities(block).exp() * share[:, None]).sum(0)
    return sums.to(x.dtype)


def softmax_backward(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
    lse: Tensor,  # [B, T]
    dlse: Tensor,  # [B, T]
    dentropy: Tensor,  # [B, T]
    weight: Tensor,  # [B, T]
    dcode_sums: Tensor | None,  # [K]
    direction: Tensor | None,  # [B, T, D]
    need_codebook: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # dx [B, T, D] laid out like x, dcodebook [K, D], dbias [K]
    """Gradients of the logits' inputs; the last two are empty unless ``need_codebook``."""
    book = codebook.double()
    per_token = _PerToken(*(value.reshape(-1) for value in (dlse, dentropy, weight)))
    towards = None if direction is None else direction.reshape(-1, x.shape[-1])
    dtokens = x.new_empty(x.shape[0] * x.shape[1], x.shape[2])
    kept = book.shape[0] if need_codebook else 0
    dbook, dbias = book.new_zeros(kept, book.shape[1]), book.new_zeros(kept)
    with torch.autocast(x.device.type, enabled=False):
        for block in _blocks(x, book, bias, scale):
            dlogits = _dlogits(block, book, per_token, dcode_sums, towards)  # [n, K]
            dtokens[block.rows] = (scale * (dlogits @ book)).to(x.dtype)
            if need_codebook:
                dbook += scale * (dlogits.T @ block.tokens)
                dbias += dlogits.sum(0)
    dx = torch.empty_like(x).copy_(dtokens.view(x.shape))
    return dx, dbook.to(x.dtype), dbias.to(x.dtype)


def _dlogits(
    block: _Block,
    book: Tensor,  # [K, D] float64
    per_token: _PerToken,
    dcode_sums: Tensor | None,  # [K]
    direction: Tensor | None,  # [N, D]
) -> Tensor:  # [n, K]
    """p_nk (f_nk - sum_j p_nj f_nj + dlse_n), f the gradient with respect to p."""
    rows = block.rows
    dlse, dentropy, weight = (value[rows, None].double() for value in per_token)  # [n, 1]
    log_p = _log_probabilities(block)
    p = log_p.exp()
    f = -dentropy * log_p
    if dcode_sums is not None:
        f += weight * dcode_sums.double()
    if direction is not None:
        f += direction[rows].double() @ book.T
    mean = (p * f).sum(1, keepdim=True)
    return torch.where(block.finite[:, None], p * (f - mean + dlse), 0.0)


def softmax_sample(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    scale: float,
    lse: Tensor,  # [B, T]
    uniform: Tensor,  # [B, T] in [0, 1)
) -> Tensor:  # codes int64 [B, T]
    """The first code whose cumulative probability exceeds ``uniform``; -1 for a token that is not finite."""
    codes = torch.empty(x.shape[0] * x.shape[1], dtype=torch.int64, device=x.device)
    uniform = uniform.reshape(-1)
    with torch.autocast(x.device.type, enabled=False):
        for block in _blocks(x, codebook.double(), bias, scale):
            below = _log_probabilities(block).exp().cumsum(1) <= uniform[block.rows, None].double()
            drawn = below.sum(1).clamp(max=codebook.shape[0] - 1)
            codes[block.rows] = torch.where(block.finite, drawn, -1)
    return codes.view(x.shape[:2])


for _op in (softmax_forward, softmax_code_sums, softmax_backward, softmax_sample):
    register(_op.__name__, "reference", _op)
