"""The ops of inference written in standard torch ops, for graphs that must run where vqkernels is not installed.

Inside ``plain_ops()`` every ``nearest``, ``quantize`` and ``codebook_stats`` takes this road, so what torch.export,
torch.onnx or AOTInductor record holds aten ops only.

    candidates_n   the CANDIDATES smallest of |c_k - m|^2 / 2 - <x_n - m, c_k - m> in float32, m the codebook's mean
    codes_n        argmin over them of |x_n - c_k|^2, term by term in float64; the lowest index where these tie

and for cosine the same of vectors of length 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dtypes import accumulation_dtype

CANDIDATES = 8  # codes per token that are measured in float64
CHUNK = 8192  # codes scored at once: what is held is [N, CHUNK], however large the codebook

_active = False


class plain_ops:
    """Inside ``with plain_ops():`` the ops of inference are standard aten ops, visible to every exporter.

        with vqkernels.plain_ops():
            program = torch.export.export(model.eval(), (images,))

    For inference: nothing is differentiable, and a training forward still needs vqkernels' own ops.

    Not exact, and it holds N x 8192 scores: float32 proposes the 8 nearest codes, seen from the codebook's mean, and
    float64 chooses among them. Wrong codes of 4096 tokens, beside |x|^2 + |c|^2 - 2 x.c in float32 (K, D = 1024, 256 |
    16384, 8):

        standard normal tokens and codes        0 | 0     expansion:    0 |    0
        the same, moved by 100                  0 | 0                 156 |   81
        the same, moved by 1000                 0 | 0                3912 | 3214
        codes at their start, uniform in 1/K    0 | 0                   5 |   28
        eight codes within 1e-4 of each other   0 | 0                  14 |    9

    What it gets wrong: more than 8 codes that float32 cannot tell apart (equal ones: any of them may come out), and a
    codebook with a code 10^5 times as far out as the others.
    """

    def __enter__(self) -> plain_ops:
        global _active
        self._previous, _active = _active, True
        return self

    def __exit__(self, *_error: object) -> None:
        global _active
        _active = self._previous


def active() -> bool:
    """Whether ``plain_ops`` is in force."""
    return _active


def nearest(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    metric: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    """``vqkernels.nearest`` but for the tokens whose nearest code float32 ranks ninth or worse."""
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    cosine = metric == "cosine"
    candidates = _candidates(*_operands(rows.double(), codebook.double(), cosine, codebook.dtype))  # [N, m]
    measured = (_cosine_distance if cosine else _distance)(rows, codebook, candidates)  # float64 [N, m]
    best = measured.amin(1, keepdim=True)
    codes = torch.where(measured == best, candidates, codebook.shape[0]).amin(1)
    valid = torch.isfinite(rows).all(1)
    codes = torch.where(valid, codes, -1)
    distance = torch.where(valid, best[:, 0], math.nan).float()
    return codes.view(x.shape[:-1]), distance.view(x.shape[:-1])


def _operands(
    rows: Tensor,  # float64 [N, D]
    codebook: Tensor,  # float64 [K, D]
    cosine: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # tokens [N, D], codes [K, D], bias [K]
    """Vectors seen from the codebook's mean m, in units of its extent, so that float32 need not hold what all share.

    |x - c|^2 / 2 = |c - m|^2 / 2 - <x - m, c - m> + ...      -<x, c> = -<m, c - m> - <x - m, c - m> + ...
    where what is left out is the same for all codes.
    """
    if cosine:
        rows, codebook = _unit(rows), _unit(codebook)
    mean = codebook.mean(0)
    centred = codebook - mean
    bias = -(centred @ mean) if cosine else 0.5 * centred.square().sum(1)
    extent = centred.abs().max()
    scale = torch.where(extent > 0, extent, 1)
    return ((rows - mean) / scale).to(dtype), (centred / scale).to(dtype), (bias / scale / scale).to(dtype)


def _unit(
    rows: Tensor,  # float64 [..., D]
) -> Tensor:  # [..., D]
    """Of length 1; 0 stays 0. No square of a float32 leaves float64."""
    norm = rows.square().sum(-1, keepdim=True).sqrt()
    return rows / torch.where(norm > 0, norm, 1)


def _candidates(
    tokens: Tensor,  # [N, D]
    codes: Tensor,  # [K, D]
    bias: Tensor,  # [K]
) -> Tensor:  # int64 [N, m]
    """The codes of the smallest bias_k - <t_n, c_k>."""
    scores, indices = [], []
    for start in range(0, codes.shape[0], CHUNK):
        block = slice(start, start + CHUNK)
        score = bias[block] - tokens @ codes[block].T  # [N, at most CHUNK]
        low, index = score.topk(min(CANDIDATES, score.shape[1]), dim=1, largest=False)
        scores.append(low)
        indices.append(index + start)
    if len(scores) == 1:
        return indices[0]
    low, place = torch.cat(scores, 1).topk(CANDIDATES, dim=1, largest=False)
    return torch.cat(indices, 1).gather(1, place)


def _distance(
    rows: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    candidates: Tensor,  # int64 [N, m]
) -> Tensor:  # float64 [N, m]
    return (rows.double()[:, None] - F.embedding(candidates, codebook).double()).square().sum(-1)


def _cosine_distance(
    rows: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    candidates: Tensor,  # int64 [N, m]
) -> Tensor:  # float64 [N, m]
    unit = _unit(F.embedding(candidates, codebook).double())  # [N, m, D]
    return 1 - (_unit(rows.double())[:, None] * unit).sum(-1)


def quantize(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    mask: Tensor | None,  # bool [B, T]
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:  # quantized [B, T, D], codes [B, T], error [B, T]
    """What the op ``quantize`` computes."""
    codes, _ = nearest(x, codebook, metric)
    rows = F.embedding(codes.clamp(min=0), codebook)
    quantized = torch.where(codes[..., None] < 0, math.nan, rows).to(x.dtype)
    wide = accumulation_dtype(x.dtype)
    error = (x.to(wide) - quantized.to(wide)).square().sum(-1)
    if mask is None:
        return quantized, codes, error
    return torch.where(mask[..., None], quantized, 0), torch.where(mask, codes, -1), torch.where(mask, error, 0)


def codebook_stats(
    x: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    codebook_size: int,
) -> tuple[Tensor, Tensor]:  # counts [K], sums [K, D]
    """What the op ``codebook_stats`` computes, in an order of its own."""
    tokens = x.reshape(-1, x.shape[-1]).to(accumulation_dtype(x.dtype))  # [N, D]
    slot = torch.where(codes < 0, codebook_size, codes).reshape(-1)  # [N] those without a code behind the last one
    counts = tokens.new_zeros(codebook_size + 1).scatter_add(0, slot, torch.ones_like(tokens[:, 0]))
    sums = tokens.new_zeros(codebook_size + 1, x.shape[-1]).scatter_add(0, slot[:, None].expand_as(tokens), tokens)
    return counts[:codebook_size], sums[:codebook_size]
