"""What the softmax ops share: a metric and a temperature as the kernels' logits, masks as weights, rows of gradients.

    euclidean   -|x - c|^2 / T = scale <x - m, c> + bias - <x - m, x + m> / T    scale = 2 / T, bias = -|c - m|^2 / T
    cosine      cos(x, c) / T                                                    scale = 1 / T, rows normalised
    dot         <x, c> / T                                                       scale = 1 / T

m is the mean code: distances do not change when both sides move, and small numbers lose fewer digits (the codebook
itself stays in its place, for a copy would double its memory). The last euclidean term is the same for every code, so
the softmax does not see it and the kernels are not given it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import HALF
from ._library import as_tokens, check_choice, check_tokens, define, promoted
from .codebook_stats import codebook_stats
from .normalize import l2_normalize

METRICS = ("euclidean", "cosine", "dot")
_SERIAL_SUM = 1 << 12  # a sum this short is added up by one thread
_BIAS_ENTRIES = 1 << 18  # codebook entries squared at a time: 2 MiB of float64


class Logits(NamedTuple):
    """The inputs of a softmax kernel, before centring."""

    x: Tensor  # [B, T, D] float32 or float64
    codebook: Tensor  # [K, D] the same dtype
    center: Tensor | None  # [D] the mean code, euclidean only; a constant to autograd
    scale: float


def make_logits(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    metric: str,
    temperature: float,
    weight: Tensor | None = None,  # [...] checked; a token of weight 0 may hold anything
) -> Logits:
    """Check the arguments that every softmax op has, and bring them into the kernels' form."""
    check_choice("metric", metric, METRICS)
    check_temperature(temperature)
    check_tokens(x, codebook)
    tokens, book = as_tokens(promoted(x, codebook)), codebook
    if book.dtype in HALF:
        tokens, book = tokens.float(), book.float()
    if weight is not None:  # else NaN in padding would spoil gradients
        tokens = torch.where(per_token(weight, tokens)[..., None] != 0, tokens, 0)
    if metric == "cosine":
        tokens, book = l2_normalize(tokens), l2_normalize(book)
    center = _mean(book.detach()) if metric == "euclidean" else None
    return Logits(tokens, book.contiguous(), center, (2.0 if metric == "euclidean" else 1.0) / temperature)


def _mean(
    book: Tensor,  # [K, D]
) -> Tensor:  # [D]
    """One column is one long vector, whose mean threads would share out."""
    return book.mean(0) if book.shape[1] > 1 else (steady_sum(book) / book.shape[0]).reshape(1)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless it is a positive finite number."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive finite number, got {temperature}")


def check_weight(weight: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise unless ``weight`` is a bool or floating point tensor of that shape on that device."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a bool or floating point tensor, got {type(weight).__name__}")
    right_dtype = weight.dtype == torch.bool or weight.dtype.is_floating_point
    if not right_dtype or weight.shape != shape:
        raise ValueError(f"weight: expected bool or float {list(shape)}, got {weight.dtype} {list(weight.shape)}")
    if weight.device != device:
        raise ValueError(f"weight: expected on {device} like x, got {weight.device}")


def per_token(
    values: Tensor,  # [...]
    tokens: Tensor,  # [B, T, D]
) -> Tensor:  # [B, T]
    """One number a token, in the shape that ``as_tokens`` gave the tokens."""
    return values.reshape(tokens.shape[:2])


def steady_sum(
    values: Tensor,  # any shape
) -> Tensor:  # []
    """The sum, in an order that does not depend on the number of threads, as that of ``sum`` does when it is long."""
    rows = values.reshape(-1)
    while rows.shape[0] > _SERIAL_SUM:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[0] % _SERIAL_SUM)).view(-1, _SERIAL_SUM).sum(1)
    return rows.sum()


def _bias(
    codebook: Tensor,  # [K, D]
    center: Tensor,  # [D]
    scale: float,
) -> Tensor:  # [K]
    """-scale / 2 |c_k - m|^2, some codes at a time."""
    bias = torch.empty_like(codebook[:, 0])
    rows = max(1, _BIAS_ENTRIES // codebook.shape[1])
    for part, out in zip(codebook.split(rows), bias.split(rows), strict=True):
        out.copy_((part.double() - center).square().sum(1) * (-0.5 * scale))
    return bias


def _fake_bias(codebook: Tensor, center: Tensor, scale: float) -> Tensor:
    return codebook.new_empty(codebook.shape[:1])


_softmax_bias = define("softmax_bias(Tensor codebook, Tensor center, float scale) -> Tensor", _bias, _fake_bias)


def centred(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    center: Tensor | None,  # [D]
    scale: float,
) -> tuple[Tensor, Tensor | None]:  # [B, T, D], bias [K]
    """The tokens and the bias as a kernel takes them."""
    if center is None:
        return x, None
    return x - center, _softmax_bias(codebook, center, scale)


def add_bias_gradient_(
    dcodebook: Tensor,  # [K, D] added to
    dbias: Tensor,  # [K]
    codebook: Tensor,  # [K, D]
    center: Tensor | None,  # [D]
    scale: float,
) -> Tensor:  # dcodebook
    """What reaches the codebook through the bias, without a second [K, D] array."""
    if center is None:
        return dcodebook
    dcodebook.addcmul_(dbias[:, None], codebook, value=-scale)
    return dcodebook.addcmul_(dbias[:, None], center[None], value=scale)


def add_rows_(
    dcodebook: Tensor,  # [K, D] added to
    codes: Tensor,  # int64 [B, T] -1: left out
    rows: Tensor,  # [B, T, D]
) -> Tensor:  # dcodebook
    """Add each token's row to its code's, in token order and with O(N D) memory, however large K is."""
    flat, rows = codes.reshape(-1), rows.reshape(-1, rows.shape[-1])
    if flat.shape[0] == 0:
        return dcodebook
    ordered, order = flat.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    run = first.cumsum(0) - 1  # [N] runs of equal codes, numbered
    run = torch.where(ordered < 0, -1, run)
    sums = codebook_stats(rows[order], run, flat.shape[0])[1]  # [N, D] a row a run
    # the rows of absent runs are 0 and go to row 0: adding them changes nothing, whatever the order
    target = torch.zeros_like(flat).scatter_reduce_(0, run.clamp(min=0), ordered.clamp(min=0), "amax")
    return dcodebook.index_add_(0, target, sums.to(dcodebook.dtype))
