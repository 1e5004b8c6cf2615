"""sample_codes: codes drawn from the soft assignment.

P(codes_n = k) = p_nk = softmax_k(l_n):   the first k with p_n0 + ... + p_nk > u_n,   u_n uniform in [0, 1)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ._library import define, run
from ._logits import centred, make_logits, per_token
from ._random import uniform
from .soft_assignment import softmax_forward


def _fake(x: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, lse: Tensor, chance: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


_softmax_sample = define(
    "softmax_sample(Tensor x, Tensor codebook, Tensor? bias, float scale, Tensor lse, Tensor uniform) -> Tensor",
    partial(run, "softmax_sample"),
    _fake,
)


def sample_codes(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
    seed: int | Tensor = 0,  # int64 []
    step: int | Tensor = 0,  # int64 []
) -> Tensor:  # int64 [...]
    """Draw a code for every token, the closer the likelier; what Gumbel noise on the logits and an argmax do.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        codebook: codes [K, D] in x's dtype (or float32 under a half-precision x); finite.
        metric, temperature: of the softmax, see ``soft_assignment``; towards 0 the draw becomes the nearest code.
        seed, step: the draw is a function of them, of the token's place in x and of the probabilities. Count ``step``
            up from call to call, and give each rank a seed of its own; both may be tensors on x's device.

    Returns:
        int64 [...]; -1 where the token holds NaN or Inf. Not differentiable: ``lookup`` gives the rows, and
        ``index_propagation`` a gradient through all codes.

    Raises:
        TypeError, ValueError: a bad argument, named.

    The uniform number of a token is the same on every backend and device, so the code is too unless the number lies
    within rounding of a step of the cumulative probabilities. Nothing waits for the device. Extra memory is
    O(N D + K D).
    """
    logits = make_logits(x.detach(), codebook.detach(), metric, temperature)
    tokens, bias = centred(logits.x, logits.codebook, logits.center, logits.scale)
    lse, _ = softmax_forward(tokens, logits.codebook, bias, logits.scale)
    chance = per_token(uniform(lse.numel(), seed, step, lse), tokens)
    return _softmax_sample(tokens, logits.codebook, bias, logits.scale, lse, chance).reshape(x.shape[:-1])
