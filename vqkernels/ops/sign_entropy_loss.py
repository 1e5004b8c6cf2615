"""sign_entropy_loss: ``entropy_loss`` for the codebook of all sign vectors, in closed form.

    loss = a mean_n sum_d h(z_nd) - b sum_g H(mean_n p_ng)

Yu et al. 2024, "Language Model Beats Diffusion", eq. 4 (LFQ: one group of all bits); Zhao et al. 2024, "Image and Video
Tokenization with Binary Spherical Quantization", eq. 9 to 11 (BSQ: groups).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .entropy_loss import (
    EntropyLoss,
    check_loss_arguments,
    check_shares,
    entropy_of,
    mean_distribution,
    mean_over_tokens,
    shares_of,
)
from .sign_assignment import MAX_GROUP_BITS, bit_entropy, bit_logits, sign_code_sums
from .sign_codes import group_bits


def sign_entropy_loss(
    x: Tensor,  # [..., D]
    *,
    temperature: float = 0.01,
    code_scale: float = 1.0,
    group_size: int | None = None,
    token_weight: float = 1.0,
    batch_weight: float = 1.0,
    eps: float = 0.0,
    weight: Tensor | None = None,  # [...] float, or bool: a mask
) -> EntropyLoss:
    """The entropy loss of lookup-free quantizers, exact over all 2^D codes.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        temperature: T of the softmax of -|x - c|^2 / T, 1 / inv_temperature.
        code_scale: s; the codes are s times the vectors of +-1.
        group_size: None for the entropy of the joint distribution of all bits (D <= 24); otherwise the batch entropy is
            the sum of the entropies of groups of that many bits, an upper bound of it.
        token_weight, batch_weight, eps, weight: as for ``entropy_loss``; eps goes into each group's logarithm.

    Whose loss with which arguments:

        Open-MAGVIT2, LFQ (logits 2 x c)      temperature=0.01, eps=1e-5
        vector-quantize-pytorch, LFQ          temperature=1/inv_temperature, code_scale=codebook_scale,
                                              batch_weight=diversity_gamma; it clamps probabilities at 1e-5 inside both
                                              logarithms, this does not
        the same, spherical                   of x of length codebook_scale, code_scale=codebook_scale / sqrt(D)
        BSQ, times 1 / inv_temperature        temperature=1/inv_temperature, code_scale=1/sqrt(D),
                                              group_size=group_size, token_weight=gamma0, batch_weight=gamma

    Returns:
        EntropyLoss(loss, token_entropy, batch_entropy), all differentiable once with respect to x; 0 where there is no
        token. A token with NaN or Inf makes the token entropy NaN and is left out of the batch's.

    Raises:
        TypeError, ValueError: a bad argument, named. A negative ``weight`` raises on CPU; on another device, and in a
            compiled graph, it makes the loss NaN.

    Memory is O(N D + 2^D), and some megabytes of scratch; time is that of an [2^(D/2), N, 2^(D/2)] matrix product.
    """
    check_loss_arguments(token_weight, batch_weight, eps)
    z = bit_logits(x, temperature, code_scale, weight)
    if weight is not None:
        check_shares(weight)
    bits = group_bits(x.shape[-1], group_size, MAX_GROUP_BITS)
    finite = z.detach().isfinite().all(-1)  # [...]
    shares = shares_of(weight, z)
    entropies = torch.where(finite, bit_entropy(z), math.nan)
    token_entropy = mean_over_tokens(entropies, shares)
    if batch_weight > 0:
        batch_entropy = entropy_of(mean_distribution(sign_code_sums(z, bits, weight), finite, shares), eps)
    else:
        batch_entropy = torch.zeros_like(token_entropy)
    return EntropyLoss(token_weight * token_entropy - batch_weight * batch_entropy, token_entropy, batch_entropy)
