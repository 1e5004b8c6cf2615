"""index_propagation: the value of the chosen code, the gradient of all of them.

    codes_n = argmax_k l_nk        q_n = sum_k (onehot_nk - sg(p_nk) + p_nk) c_k = c[codes_n]

    dl_nk = p_nk (<dq_n, c_k> - sum_j p_nj <dq_n, c_j>)        dx_n, dc_k through the logits
    dc_k += sum of dq_n over the tokens that chose k

Shi et al. 2024, "Scalable Image Tokenization with Index Backpropagation Quantization" (IBQ), sec. 3.2. The errors are
those of ``quantize``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from . import plain
from ._library import check_codes, check_mask, define, run
from ._logits import add_rows_, centred, make_logits, per_token
from ._once import once_differentiable
from .quantize import Quantized
from .soft_assignment import logits_gradient, softmax_forward

_TOKENS, _CODES = 512, 4096  # products at a time: 8 MiB of float32, and the codebook is read once for 512 tokens


def _largest_product(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
) -> Tensor:  # int64 [B, T]
    """argmax_k <x_n, c_k>, the lowest index on ties; -1 for a token with NaN or Inf. A product that is NaN is never it.

    float32 on a CPU, float64 on a GPU: there TF32 may be on for the whole process.
    """
    tokens = x.reshape(-1, x.shape[-1])
    wide = torch.float64 if x.is_cuda else x.dtype
    scratch = tokens.new_empty(min(len(tokens), _TOKENS) * min(len(codebook), _CODES), dtype=wide)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        found = [_largest_of_block(block, codebook, scratch) for block in tokens.split(_TOKENS)]
    codes = torch.cat(found) if found else tokens.new_empty(0, dtype=torch.int64)
    return codes.view(x.shape[:2])


def _largest_of_block(
    block: Tensor,  # [n, D]
    codebook: Tensor,  # [K, D]
    scratch: Tensor | None = None,  # [n * min(K, _CODES)] or more, for the products: blocks of 8 MiB split the heap
) -> Tensor:  # int64 [n]
    wide = torch.float64 if block.is_cuda else block.dtype
    best = torch.full_like(block[:, 0], -torch.inf, dtype=wide)
    codes = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, codebook.shape[0], _CODES):
        rows = codebook[start : start + _CODES]
        room = {} if scratch is None else {"out": scratch[: len(block) * len(rows)].view(len(block), len(rows))}
        products = torch.mm(block.to(wide), rows.to(wide).T, **room)
        value, code = products.nan_to_num_(-torch.inf, torch.inf, -torch.inf).max(1)
        better = value > best  # not where equal: the lowest index wins
        best = torch.where(better, value, best)
        codes = torch.where(better, code + start, codes)
    return torch.where(block.isfinite().all(1), codes, -1)


def _run_choose(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return _largest_product(x, codebook) if metric == "dot" else run("nearest", x, codebook, metric, "exact")[0]


def _fake_choose(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


softmax_choose = define("softmax_choose(Tensor x, Tensor codebook, str metric) -> Tensor", _run_choose, _fake_choose)


def _plain_choose(x: Tensor, codebook: Tensor, metric: str) -> Tensor:  # [B, T, D], [K, D] -> int64 [B, T]
    """In standard ops, for ``plain_ops``."""
    if metric != "dot":
        return plain.nearest(x, codebook, metric)[0]
    return _largest_of_block(x.reshape(-1, x.shape[-1]), codebook).view(x.shape[:2])


class _IndexPropagation(torch.autograd.Function):
    """Saves x, the codebook and the codes; the softmax is left to the backward: inference pays for a search alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, T, D]
        codebook: Tensor,  # [K, D]
        center: Tensor | None,  # [D]
        mask: Tensor | None,  # bool [B, T]
        chosen: Tensor | None,  # int64 [B, T] codes; searched for where absent
        metric: str,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        choose = _plain_choose if plain.active() else softmax_choose
        codes = choose(x, codebook, metric) if chosen is None else chosen.clone()
        if mask is not None:
            codes = torch.where(mask, codes, -1)
        rows = torch.where((codes < 0)[..., None], torch.nan, codebook[codes.clamp(min=0)])
        if mask is not None:
            rows = torch.where(mask[..., None], rows, 0)
        quantized = torch.empty_like(x).copy_(rows)  # laid out like x
        error = (x - quantized).square().sum(-1)
        if mask is not None:
            error = torch.where(mask, error, 0)
        ctx.save_for_backward(x, codebook, center, codes)
        ctx.scale = scale
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return quantized, codes, error, error.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dquantized: Tensor | None,  # [B, T, D]
        _dcodes: None,
        dcommitment: Tensor | None,  # [B, T]
        dcodebook_error: Tensor | None,  # [B, T]
    ) -> tuple[Tensor | None, ...]:
        x, codebook, _, codes = ctx.saved_tensors
        chosen = (codes >= 0)[..., None]  # a token without a code passes nothing on
        pull = torch.where(chosen, x - codebook[codes.clamp(min=0)], 0)  # [B, T, D]
        direct = torch.zeros_like(x) if dquantized is None else torch.where(chosen, dquantized, 0)
        dx, dcodebook = _through_softmax(ctx, direct, dquantized is not None)
        if dcommitment is not None:
            dx = dx + 2 * dcommitment[..., None] * pull
        if dcodebook is not None:
            rows = direct if dcodebook_error is None else direct - 2 * dcodebook_error[..., None] * pull
            dcodebook = add_rows_(dcodebook, codes, rows)
        return dx, dcodebook, None, None, None, None, None


def _through_softmax(
    ctx: Any,
    direction: Tensor,  # [B, T, D]
    needed: bool,
) -> tuple[Tensor, Tensor | None]:  # dx [B, T, D], dcodebook [K, D]
    """The gradient of <direction_n, sum_k p_nk c_k> through p alone."""
    x, codebook, center, _ = ctx.saved_tensors
    need_codebook = ctx.needs_input_grad[1]
    if not needed:
        return torch.zeros_like(x), torch.zeros_like(codebook) if need_codebook else None
    tokens, bias = centred(x, codebook, center, ctx.scale)
    lse, _ = softmax_forward(tokens, codebook, bias, ctx.scale)
    return logits_gradient(x, codebook, center, ctx.scale, lse, need_codebook=need_codebook, direction=direction)


def index_propagation(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    *,
    metric: str = "dot",
    temperature: float = 1.0,
    mask: Tensor | None = None,  # bool [...]
    codes: Tensor | None = None,  # int64 [...]
) -> Quantized:
    """Replace every token by its likeliest code, with the gradient of the soft assignment to all codes.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        codebook: codes [K, D] in x's dtype (or float32 under a half-precision x); finite.
        metric, temperature: of the softmax, see ``soft_assignment``; IBQ's are "dot" and 1. With "cosine", tokens and
            codes have length 1, in the errors and in ``quantized`` too.
        mask: bool [...], False where a token is padding: code -1, quantized 0, errors 0, no gradient.
        codes: int64 [...] below K, to be taken instead of the likeliest ones; negative ones are treated as those of
            non-finite tokens.

    Returns:
        Quantized(quantized, codes, commitment_error, codebook_error), as ``quantize`` returns it, but ``quantized``
        passes its gradient through the softmax to x and to every code, and to the chosen code directly; none of it goes
        straight through to x. Differentiable once. The code is the exact nearest one for "euclidean" and "cosine", see
        ``nearest``; for "dot" it is the one with the largest product in the arithmetic of the inputs (float32 at
        least), the lowest index on ties, NaN left out. A token with NaN or Inf has code -1, NaN outputs, and
        passes no gradient of ``quantized``.

    IBQ's quantizer loss is ``((quantized - x) ** 2).mean() + commitment_error.mean() / D + beta * codebook_error.mean()
    / D`` with beta = 0.25.

    Raises:
        TypeError, ValueError: a bad argument, named.

    Extra memory is O(N D + K D): no [N, K] array, forward or backward.
    """
    if mask is not None:
        check_mask(mask, x.shape[:-1], x.device)
    logits = make_logits(x, codebook, metric, temperature, mask)
    real = None if mask is None else per_token(mask, logits.x)
    if codes is not None:
        check_codes(codes, x)
        codes = per_token(codes, logits.x)
    found = _IndexPropagation.apply(logits.x, logits.codebook, logits.center, real, codes, metric, logits.scale)
    shape = x.shape[:-1]
    errors = (value.reshape(shape).to(accumulation_dtype(x.dtype)) for value in found[2:])
    return Quantized(found[0].to(x.dtype).reshape(x.shape), found[1].reshape(shape), *errors)
