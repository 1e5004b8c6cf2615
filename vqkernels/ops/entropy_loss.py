"""entropy_loss: confident tokens, and all codes in use.

    loss = a mean_n H(p_n) - b H(mean_n p_n),   H(p) = -sum_k p_k log(p_k + eps)

after Yu et al. 2024, "Language Model Beats Diffusion" (MAGVIT-v2), eq. 4, for any codebook.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._logits import check_weight, make_logits, per_token, steady_sum
from .soft_assignment import assign


class EntropyLoss(NamedTuple):
    """What the entropy losses return; float32, or float64 for float64 inputs."""

    loss: Tensor  # [] token_weight * token_entropy - batch_weight * batch_entropy
    token_entropy: Tensor  # [] nats, mean over tokens
    batch_entropy: Tensor  # [] nats, of the mean distribution


def mean_over_tokens(
    values: Tensor,  # [...]
    weight: Tensor | None,  # [...] float
) -> Tensor:  # []
    """Weighted mean, 0 without any weight; what has no weight may be NaN."""
    if weight is None:
        return steady_sum(values) / max(values.numel(), 1)
    total = steady_sum(torch.where(weight != 0, values * weight, 0))
    return total / steady_sum(weight).clamp(min=torch.finfo(weight.dtype).tiny)


def entropy_of(
    probabilities: Tensor,  # [..., K]
    eps: float,
) -> Tensor:  # []
    """-sum p log(p + eps); a code whose probability is 0 adds nothing and gets gradient 0.

    In float64: torch's logarithm of a long float32 vector depends, in its last bit, on how threads share it out.
    """
    p = probabilities.double()
    if eps == 0:
        p = torch.where(p > 0, p, 1)  # log 0 = -inf would turn 0 * inf gradients into NaN
    return -steady_sum(p * (p + eps).log()).to(probabilities.dtype)


def check_loss_arguments(token_weight: float, batch_weight: float, eps: float) -> None:
    """Raise ValueError unless all three are >= 0."""
    for name, value in (("token_weight", token_weight), ("batch_weight", batch_weight), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"{name}: expected >= 0, got {value}")


def check_shares(weight: Tensor) -> None:
    """Raise ValueError for a negative number, where looking does not wait for a device and no graph is being traced."""
    looks = weight.device.type == "cpu" and weight.dtype != torch.bool and not torch.compiler.is_compiling()
    if looks and (weight < 0).any():
        raise ValueError(f"weight: expected >= 0, got {weight.min().item():g}")


def shares_of(
    weight: Tensor | None,  # [...]
    like: Tensor,  # [...]
) -> Tensor | None:  # [...] float
    """``weight`` as constants in the dtype of the numbers that it weighs; NaN where it is negative."""
    if weight is None or weight.dtype == torch.bool:
        return None if weight is None else weight.to(like.dtype)
    shares = weight.detach().to(like.dtype)
    return torch.where(shares < 0, torch.nan, shares)


def mean_distribution(
    code_sums: Tensor,  # [..., K]
    tokens_finite: Tensor,  # bool [...]
    weight: Tensor | None,  # [...] float
) -> Tensor:  # [..., K]
    """Code sums over the weight of the tokens that are in them."""
    counted = tokens_finite.to(code_sums.dtype)
    total = steady_sum(counted if weight is None else counted * weight)
    return code_sums / total.clamp(min=torch.finfo(code_sums.dtype).tiny)


def entropy_loss(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    *,
    metric: str = "euclidean",
    temperature: float = 0.01,
    token_weight: float = 1.0,
    batch_weight: float = 1.0,
    eps: float = 0.0,
    weight: Tensor | None = None,  # [...] float, or bool: a mask
) -> EntropyLoss:
    """Entropy of each token's soft assignment, minus the entropy of the batch's mean assignment.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        codebook: codes [K, D] in x's dtype (or float32 under a half-precision x); finite.
        metric, temperature: of the softmax, see ``soft_assignment``.
        token_weight: a, of the term that makes each token choose.
        batch_weight: b, of the term that spreads the batch over the codes. 0: it is not computed (and reported as 0).
        eps: inside the logarithm of the batch entropy. 0 is the entropy. The peers' 1e-5 is of the size of the
            probabilities themselves from K = 2^17 on, and takes most of that term's gradient away.
        weight: of each token in both means, >= 0; a constant. False or 0 leaves the token out.

    Whose loss with which arguments:

        LlamaGen, compute_entropy_loss(-d)              metric="euclidean", temperature=0.01, eps=1e-5, with x and
                                                        codebook l2-normalised first where its l2_norm is on
        SEED-Voken, IBQ                                 metric="dot", temperature=0.01, eps=1e-5,
                                                        token_weight=sample_minimization_weight,
                                                        batch_weight=batch_maximization_weight
        Open-MAGVIT2, LFQ                               the same with metric="euclidean" and a codebook of signs, or
                                                        ``sign_entropy_loss``, which needs no codebook
        vector-quantize-pytorch, codebook_diversity_    metric="cosine", temperature=1/codebook_diversity_temperature,
        loss of a codebook with use_cosine_sim          token_weight=0; it takes each position of x [B, T, D] by itself,
                                                        so that it is the mean over t of the losses of x[:, t]

    vector-quantize-pytorch's loss of a euclidean codebook is another one: a softmax of the distance, not of its square.

    Returns:
        EntropyLoss(loss, token_entropy, batch_entropy), all differentiable once with respect to x and the codebook; 0
        where there is no token. A token with NaN or Inf makes the token entropy NaN and is left out of the batch's.

    Raises:
        TypeError, ValueError: a bad argument, named. A negative ``weight`` raises on CPU; on another device, and in a
            compiled graph, it makes the loss NaN.

    Extra memory is O(N D + K D): see ``soft_assignment``.
    """
    check_loss_arguments(token_weight, batch_weight, eps)
    if weight is not None:
        check_weight(weight, x.shape[:-1], x.device)
        check_shares(weight)
    logits = make_logits(x, codebook, metric, temperature, weight)
    lse, entropy, sums = assign(logits, weight, code_sums=batch_weight > 0)
    shares = shares_of(None if weight is None else per_token(weight, logits.x), entropy)
    token_entropy = mean_over_tokens(entropy, shares)
    if batch_weight > 0:
        batch_entropy = entropy_of(mean_distribution(sums, lse.detach().isfinite(), shares), eps)
    else:
        batch_entropy = torch.zeros_like(token_entropy)
    return EntropyLoss(token_weight * token_entropy - batch_weight * batch_entropy, token_entropy, batch_entropy)
