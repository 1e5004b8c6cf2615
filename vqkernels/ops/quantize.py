"""quantize: search, lookup, squared errors, and the gradients that train a codebook and its encoder.

codes_n = nearest(x_n),  q_n = c[codes_n],  error_n = |x_n - q_n|^2

straight-through   dx_n = dq_n                                     (van den Oord et al. 2017, sec. 3.2)
rotation trick     dx_n = lam (dq - 2 (dq.w) w + 2 (dq.v) u)       (Fifty et al. 2024, sec. 4.2)
commitment error   dx_n += 2 derror_n (x_n - q_n)                  codebook error   dc_k = -sum_n 2 derror_n (x_n - q_n)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..backends import PreparedCodebook
from . import plain
from ._library import as_tokens, check_choice, check_codes, check_mask, check_tokens, define, promoted, run
from ._once import once_differentiable
from ._prepared import opened, prepared_search
from .nearest import METRICS, PRECISIONS

GRADIENTS = ("straight_through", "rotation")


class Quantized(NamedTuple):
    """What ``quantize`` returns; shapes follow x [..., D]."""

    quantized: Tensor  # [..., D] x's dtype and layout
    codes: Tensor  # int64 [...]
    commitment_error: Tensor  # [...] |x - sg(c)|^2: its gradient reaches x alone
    codebook_error: Tensor  # [...] |sg(x) - c|^2: its gradient reaches the codebook alone


def _run(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    mask: Tensor | None,  # bool [B, T]
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # quantized [B, T, D], codes [B, T], error [B, T]
    return run("quantize", x, codebook, mask, metric, precision)


def _fake(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[:2]
    return (
        torch.empty_like(x),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(shape, dtype=accumulation_dtype(x.dtype)),
    )


_quantize = define(
    "quantize(Tensor x, Tensor codebook, Tensor? mask, str metric, str precision) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)


def _run_lookup(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    codes: Tensor,  # [B, T]
    mask: Tensor | None,  # bool [B, T]
) -> tuple[Tensor, Tensor, Tensor]:  # quantized [B, T, D], codes [B, T], error [B, T]
    codes = codes.clone() if mask is None else torch.where(mask, codes, -1)
    quantized, error = run("gather", x, codebook, codes)
    if mask is not None:
        out = ~mask
        quantized.masked_fill_(out[..., None], 0)
        error.masked_fill_(out, 0)
    return quantized, codes, error


def _fake_lookup(x: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _fake(x, codebook, mask, "euclidean", "exact")


_quantize_to = define(
    "quantize_to(Tensor x, Tensor codebook, Tensor codes, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    _run_lookup,
    _fake_lookup,
)


def _run_backward(
    x: Tensor,  # [B, T, D]
    quantized: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    dquantized: Tensor | None,  # [B, T, D]
    derror: Tensor | None,  # [B, T]
    rotation: bool,
    mask: Tensor | None = None,  # bool [B, T]
) -> Tensor:  # dx [B, T, D]
    return run("quantize_backward", x, quantized, codes, dquantized, derror, rotation, mask)


def _fake_backward(x: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(x)


_quantize_backward = define(
    "quantize_backward(Tensor x, Tensor quantized, Tensor codes, Tensor? dquantized, Tensor? derror, bool rotation,"
    " Tensor? mask=None) -> Tensor",
    _run_backward,
    _fake_backward,
)


def _run_codebook_gradient(
    x: Tensor,  # [B, T, D]
    quantized: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    derror: Tensor,  # [B, T]
    codebook_size: int,
) -> Tensor:  # [K, D]
    """-sum over a code's tokens of 2 derror (x - q), in token order."""
    return run("codebook_gradient", x, quantized, codes, derror, codebook_size)


def _fake_codebook_gradient(x: Tensor, quantized: Tensor, codes: Tensor, derror: Tensor, codebook_size: int) -> Tensor:
    return x.new_empty((codebook_size, x.shape[-1]))


_codebook_gradient = define(
    "codebook_gradient(Tensor x, Tensor quantized, Tensor codes, Tensor derror, int codebook_size) -> Tensor",
    _run_codebook_gradient,
    _fake_codebook_gradient,
)


class _Quantize(torch.autograd.Function):
    """Saves x, quantized and codes: O(N D), never an [N, K] array, and nothing an EMA update could overwrite."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, T, D]
        codebook: Tensor,  # [K, D]
        mask: Tensor | None,  # bool [B, T]
        chosen: Tensor | None,  # [B, T] codes; searched for where absent
        metric: str,
        precision: str,
        rotation: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if chosen is None:
            quantized, codes, error = _quantize(x, codebook, mask, metric, precision)
        else:
            quantized, codes, error = _quantize_to(x, codebook, chosen, mask)
        ctx.save_for_backward(x, quantized, codes, mask)
        ctx.rotation, ctx.codebook_size = rotation, codebook.shape[0]
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        # the same numbers with another gradient: of use where the codebook is trained by it
        return quantized, codes, error, error.clone() if ctx.needs_input_grad[1] else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dquantized: Tensor | None,  # [B, T, D]
        _dcodes: None,
        dcommitment: Tensor | None,  # [B, T]
        dcodebook_error: Tensor | None,  # [B, T]
    ) -> tuple[Tensor | None, ...]:
        x, quantized, codes, mask = ctx.saved_tensors
        dx = dcodebook = None
        if ctx.needs_input_grad[0] and not (dquantized is None and dcommitment is None):
            through = None if dquantized is None else dquantized.to(x.dtype)
            dx = _quantize_backward(x, quantized, codes, through, dcommitment, ctx.rotation, mask)
        if ctx.needs_input_grad[1] and dcodebook_error is not None:
            dcodebook = _codebook_gradient(x, quantized, codes, dcodebook_error, ctx.codebook_size)
        return dx, dcodebook, None, None, None, None, None


def quantize(
    x: Tensor,  # [..., D]
    codebook: Tensor | PreparedCodebook,  # [K, D]
    *,
    metric: str | None = None,
    precision: str = "exact",
    gradient: str = "straight_through",
    mask: Tensor | None = None,  # bool [...]
    codes: Tensor | None = None,  # int64 [...]
) -> Quantized:
    """Replace every token by its nearest code, differentiably.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides, kept by ``quantized``.
        codebook: codes [K, D] in x's dtype (or float32 under a half-precision x); finite. Or what ``prepare_codebook``
            made of them, which gets no gradient.
        metric, precision: how the code is chosen, see ``nearest``; the errors are squared euclidean either way.
        gradient: "straight_through" or "rotation", the gradient that ``quantized`` passes to x.
        mask: bool [...], False where a token is padding: code -1, quantized 0, errors 0, no gradient.
        codes: int64 [...] below K, to be taken instead of the nearest ones (drawn by ``sample_codes``, say); negative
            ones are treated as those of non-finite tokens. Not inside ``plain_ops``.

    Returns:
        Quantized(quantized, codes, commitment_error, codebook_error). Rows of ``quantized`` are bit-equal to the
        codebook's (rounded once where x is of a narrower dtype). A token with NaN or Inf has code -1, and its
        quantized row and errors are NaN. The errors are float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: a bad argument, named; see ``nearest`` for a non-finite codebook.
    """
    rows, metric = opened(codebook, metric)
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)
    check_choice("gradient", gradient, GRADIENTS)
    check_tokens(x, rows)
    if mask is not None:
        check_mask(mask, x.shape[:-1], x.device)
        mask = as_tokens(mask[..., None])[..., 0]  # [B, T]
    tokens = as_tokens(promoted(x, rows))  # [B, T, D]
    if codes is not None:
        check_codes(codes, x)
        codes = as_tokens(codes[..., None])[..., 0]  # [B, T]
    elif prepared_search(codebook) and not plain.active():
        codes, _ = run("nearest_prepared", tokens.detach(), codebook, precision)
    if plain.active() and codes is None:
        found = plain.quantize(tokens.detach(), rows.detach(), mask, metric)
        out = (*found, found[2])
    else:
        out = _Quantize.apply(tokens, rows, mask, codes, metric, precision, gradient == "rotation")
    shape = x.shape[:-1]
    quantized = out[0].to(x.dtype).view(x.shape) if x.dim() <= 3 else out[0].to(x.dtype).unflatten(1, x.shape[1:-1])
    error = out[2].view(shape)
    return Quantized(quantized, out[1].view(shape), error, error.detach() if out[3] is None else out[3].view(shape))
