"""code_cross_entropy: how surprised the soft assignment is by given codes.

loss_n = -log p_n,codes_n = lse_n - l_n,codes_n        dl_nk = p_nk - [k = codes_n]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import check_choice
from ._logits import add_rows_, centred, make_logits, per_token
from ._once import once_differentiable
from .entropy_loss import mean_over_tokens
from .soft_assignment import logits_gradient, softmax_forward

REDUCTIONS = ("none", "mean", "sum")


class _CodeCrossEntropy(torch.autograd.Function):
    """Saves x, the codebook, the codes and lse."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, T, D]
        codebook: Tensor,  # [K, D]
        center: Tensor | None,  # [D]
        codes: Tensor,  # int64 [B, T]
        scale: float,
    ) -> Tensor:  # [B, T]
        tokens, bias = centred(x, codebook, center, scale)
        lse, _ = softmax_forward(tokens, codebook, bias, scale)
        chosen = codes.clamp(min=0)
        # in float64: lse and the logit are large and nearly equal where the code is the likely one
        logit = scale * (tokens.double() * codebook[chosen].double()).sum(-1)
        if bias is not None:
            logit = logit + bias[chosen].double()
        ctx.save_for_backward(x, codebook, center, codes, lse)
        ctx.scale = scale
        loss = (lse.double() - logit).to(lse.dtype).clamp(min=0)  # lse is rounded, and -log p is never negative
        return torch.where(codes < 0, 0, loss)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dloss: Tensor,  # [B, T]
    ) -> tuple[Tensor | None, ...]:
        x, codebook, center, codes, lse = ctx.saved_tensors
        scale = ctx.scale
        dlse = torch.where((codes < 0) | ~lse.isfinite(), 0, dloss)
        need_codebook = ctx.needs_input_grad[1]
        dx, dcodebook = logits_gradient(x, codebook, center, scale, lse, need_codebook=need_codebook, dlse=dlse)
        picked = codebook[codes.clamp(min=0)]
        dx = dx - (scale * dlse)[..., None] * picked
        if dcodebook is None:
            return dx, None, None, None, None
        pull = x if center is None else x - picked
        rows = torch.where((dlse != 0)[..., None], (-scale * dlse)[..., None] * pull, 0)
        return dx, add_rows_(dcodebook, codes, rows), None, None, None


def code_cross_entropy(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    codes: Tensor,  # int64 [...]
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:  # [...] or []
    """Cross-entropy of the softmax over the codebook to given codes: a classifier whose classes are the codes.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        codebook: codes [K, D] in x's dtype (or float32 under a half-precision x); finite.
        codes: int64 [...] in [0, K); -1 where the token is to be left out (padding).
        metric, temperature: of the softmax, see ``soft_assignment``.
        reduction: "none" (0 where the code is -1), "mean" over the tokens that have a code (0 if none has), "sum".

    With metric="cosine", temperature=1 and the codes of the search this is vector-quantize-pytorch's commitment loss
    under ``commitment_use_cross_entropy_loss`` for a codebook with ``use_cosine_sim``.

    Returns:
        the loss in nats, float32 (float64 for float64 inputs); differentiable once with respect to x and the codebook.
        NaN where a token with a code holds NaN or Inf.

    Raises:
        TypeError, ValueError: a bad argument, named.
        IndexError: a code outside [-1, K) (looked at on CPU alone: on CUDA the look would wait for the device).

    Extra memory is O(N D + K D): see ``soft_assignment``.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    _check_codes(codes, x, codebook)
    logits = make_logits(x, codebook, metric, temperature, codes >= 0)
    targets = per_token(codes, logits.x)
    loss = _CodeCrossEntropy.apply(logits.x, logits.codebook, logits.center, targets, logits.scale)
    if reduction == "none":
        return loss.reshape(codes.shape)
    return loss.sum() if reduction == "sum" else mean_over_tokens(loss, (targets >= 0).to(loss.dtype))


def _check_codes(codes: Tensor, x: Tensor, codebook: Tensor) -> None:
    if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
        raise TypeError(f"codes: expected int64, got {getattr(codes, 'dtype', type(codes).__name__)}")
    if codes.shape != x.shape[:-1] or codes.device != x.device:
        expected = f"{list(x.shape[:-1])} on {x.device}"
        raise ValueError(f"codes: expected {expected} like x, got {list(codes.shape)} on {codes.device}")
    if not codes.is_cuda and not torch.compiler.is_compiling() and codes.numel():
        low, high = codes.min().item(), codes.max().item()
        if low < -1 or high >= codebook.shape[0]:
            raise IndexError(f"codes: expected in [-1, {codebook.shape[0]}), got values from {low} to {high}")
