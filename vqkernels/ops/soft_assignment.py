"""soft_assignment: a softmax over the codebook that is never written down.

    p_n = softmax_k(l_n),   l_nk = -|x_n - c_k|^2 / T,  cos(x_n, c_k) / T  or  <x_n, c_k> / T

    lse_n = log sum_k exp l_nk       entropy_n = -sum_k p_nk log p_nk       code_sums_k = sum_n w_n p_nk

The kernels walk over blocks of codes with a running maximum and sum, and the backward walks over them again; the method
is that of streaming attention (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al.
2022, "FlashAttention"), with the codebook for keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._library import define, run
from ._logits import Logits, add_bias_gradient_, centred, check_weight, make_logits, per_token
from ._once import once_differentiable


class SoftAssignment(NamedTuple):
    """What ``soft_assignment`` returns; float32, or float64 for float64 inputs."""

    lse: Tensor  # [...]
    entropy: Tensor  # [...] nats
    code_sums: Tensor  # [K]


def _fake_forward(x: Tensor, codebook: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


def _fake_sums(x: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, lse: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(codebook.shape[:1])


def _fake_backward(
    x: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    lse: Tensor,
    dlse: Tensor,
    dentropy: Tensor,
    weight: Tensor,
    dcode_sums: Tensor | None,
    direction: Tensor | None,
    need_codebook: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = codebook.shape[0] if need_codebook else 0
    return torch.empty_like(x), codebook.new_empty((kept, codebook.shape[1])), codebook.new_empty((kept,))


softmax_forward = define(
    "softmax_forward(Tensor x, Tensor codebook, Tensor? bias, float scale) -> (Tensor, Tensor)",
    partial(run, "softmax_forward"),
    _fake_forward,
)
softmax_code_sums = define(
    "softmax_code_sums(Tensor x, Tensor codebook, Tensor? bias, float scale, Tensor lse, Tensor weight) -> Tensor",
    partial(run, "softmax_code_sums"),
    _fake_sums,
)
softmax_backward = define(
    "softmax_backward(Tensor x, Tensor codebook, Tensor? bias, float scale, Tensor lse, Tensor dlse, Tensor dentropy,"
    " Tensor weight, Tensor? dcode_sums, Tensor? direction, bool need_codebook) -> (Tensor, Tensor, Tensor)",
    partial(run, "softmax_backward"),
    _fake_backward,
)


def logits_gradient(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    center: Tensor | None,  # [D]
    scale: float,
    lse: Tensor,  # [B, T]
    *,
    need_codebook: bool,
    dlse: Tensor | None = None,  # [B, T]
    dentropy: Tensor | None = None,  # [B, T]
    weight: Tensor | None = None,  # [B, T]
    dcode_sums: Tensor | None = None,  # [K]
    direction: Tensor | None = None,  # [B, T, D]
) -> tuple[Tensor, Tensor | None]:  # dx [B, T, D], dcodebook [K, D]
    """What reaches x and the codebook through the logits; nothing reaches a token that is not finite."""
    tokens, bias = centred(x, codebook, center, scale)
    none = torch.zeros_like(lse)
    per_token_terms = (none if term is None else term for term in (dlse, dentropy, weight))
    terms = (*per_token_terms, dcode_sums, direction, need_codebook)
    dx, dcodebook, dbias = softmax_backward(tokens, codebook, bias, scale, lse, *terms)
    dx = torch.where(lse.isfinite()[..., None], dx, 0)
    if not need_codebook:
        return dx, None
    return dx, add_bias_gradient_(dcodebook, dbias, codebook, center, scale)


class _SoftAssignment(torch.autograd.Function):
    """Saves x, the codebook, lse and the weights: O(N D + K D), never an [N, K] array."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, T, D]
        codebook: Tensor,  # [K, D]
        center: Tensor | None,  # [D]
        weight: Tensor | None,  # [B, T]; None: no code sums
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # lse [B, T], entropy [B, T], code_sums [K] or [0]
        tokens, bias = centred(x, codebook, center, scale)
        lse, entropy = softmax_forward(tokens, codebook, bias, scale)
        if weight is None:
            sums = x.new_empty(0)
        else:
            sums = softmax_code_sums(tokens, codebook, bias, scale, lse, weight)
        ctx.save_for_backward(x, codebook, center, weight, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return lse, entropy, sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dlse: Tensor | None,  # [B, T]
        dentropy: Tensor | None,  # [B, T]
        dcode_sums: Tensor | None,  # [K] or [0]
    ) -> tuple[Tensor | None, ...]:
        x, codebook, center, weight, lse = ctx.saved_tensors
        if dlse is None and dentropy is None and dcode_sums is None:
            return None, None, None, None, None
        dx, dcodebook = logits_gradient(
            x,
            codebook,
            center,
            ctx.scale,
            lse,
            need_codebook=ctx.needs_input_grad[1],
            dlse=dlse,
            dentropy=dentropy,
            weight=weight,
            dcode_sums=None if weight is None else dcode_sums,
        )
        return dx, dcodebook, None, None, None


def assign(
    logits: Logits,
    weight: Tensor | None,  # [...] checked
    *,
    code_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # lse [B, T] as the kernels know it, entropy [B, T], code_sums [K]
    """The differentiable kernels; the code sums, a second walk over the codes, can be left out ([0] then)."""
    shares = None
    if code_sums:
        full = logits.x.new_ones(logits.x.shape[:2])
        shares = full if weight is None else per_token(weight.detach().to(logits.x.dtype), logits.x)
    return _SoftAssignment.apply(logits.x, logits.codebook, logits.center, shares, logits.scale)


def soft_assignment(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
    weight: Tensor | None = None,  # [...] float, or bool: a mask
) -> SoftAssignment:
    """Assign every token to all codes at once, by a softmax of their closeness; differentiably.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        codebook: codes [K, D] in x's dtype (or float32 under a half-precision x); finite.
        metric: what is divided by the temperature: "euclidean" -|x - c|^2 (the square, not the distance), "cosine"
            cos(x, c), "dot" <x, c>.
        temperature: T > 0.
        weight: of each token in ``code_sums``, >= 0; a constant to autograd. False or 0 leaves the token out: lse and
            entropy 0, no gradient.

    Returns:
        SoftAssignment(lse, entropy, code_sums): the log of each token's sum of exponentials, the entropy of its
        probabilities in nats, and the weighted sum over tokens of the probabilities of each code. All three are
        differentiable once, with respect to x and the codebook. ``code_sums / weight.sum()`` is the mean distribution
        of the batch. The same bits on every run and for any number of threads. A token with NaN or Inf has lse and
        entropy NaN and is left out of the sums; whatever gradient comes for it, the codebook gets none.

    Raises:
        TypeError, ValueError: a bad argument, named.

    Logits are float32 (float64 for float64 inputs), so probabilities have a relative error of about 6e-8 times the
    largest |logit|: at 1e4 the code sums of a token add up to 1 within 1e-3, beyond 1e7 they mean nothing.

    Extra memory is O(N D + K D) forward and backward; arithmetic is float32 at least. The backward computes the logits
    again. One [N, K] array at N = 1024, K = 262144 is 1 GiB, and a plain torch form keeps several.
    """
    if weight is not None:
        check_weight(weight, x.shape[:-1], x.device)
    logits = make_logits(x, codebook, metric, temperature, weight)
    lse, entropy, sums = assign(logits, weight, code_sums=True)
    if logits.center is not None:  # the part of -|x - c|^2 / T that all codes share
        lse = lse - 0.5 * logits.scale * ((logits.x - logits.center) * (logits.x + logits.center)).sum(-1)
    lse, entropy = lse.reshape(x.shape[:-1]), entropy.reshape(x.shape[:-1])
    if weight is not None:
        lse, entropy = torch.where(weight != 0, lse, 0), torch.where(weight != 0, entropy, 0)
    return SoftAssignment(lse, entropy, sums)
