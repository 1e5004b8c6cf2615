"""sign_assignment: the soft assignment to all 2^D sign vectors, exactly, without looking at 2^D codes a token.

With codes s b, b in {-1, 1}^D, the softmax of -|x - s b|^2 / T is a product over the channels:

    p_n(b) = prod_d sigmoid(b_d z_nd),   z = 4 s x / T

    lse_n      = sum_d log(exp(-(x_nd - s)^2 / T) + exp(-(x_nd + s)^2 / T))
    entropy_n  = sum_d h(z_nd),   h(z) = softplus(-|z|) + |z| sigmoid(-|z|)      D Bernoulli entropies
    code_sums  = A^T W B                                                         [2^(D/2), 2^(D/2)] is all of [2^D]

where row n of A holds the probabilities of the first half of the bits, row n of B of the second: O(N 2^(D/2)) numbers
and one matrix product instead of N 2^D. Bernoulli entropies as in Zhao et al. 2024 (BSQ), sec. 3.2; unlike there, the
mean distribution is not approximated unless ``group_size`` asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .._dtypes import accumulation_dtype
from ._library import define
from ._logits import check_temperature, check_weight, steady_sum
from ._once import once_differentiable
from .sign_codes import check_signs, group_bits
from .soft_assignment import SoftAssignment

MAX_GROUP_BITS = 24  # 2^24 probabilities are 64 MiB
_BLOCK_ENTRIES = 1 << 20  # probabilities of halves held at once


def _blocks(z: Tensor) -> Iterator[slice]:  # z [N, G, C]
    step = max(1, _BLOCK_ENTRIES // (z.shape[1] << ((z.shape[2] + 1) // 2)))
    for start in range(0, z.shape[0], step):
        yield slice(start, start + step)


def _sigmoid(z: Tensor) -> Tensor:
    """Rounded from float64: the last bit of torch's float32 one depends on how threads share a long vector out."""
    return torch.sigmoid(z.double()).to(z.dtype)


def _half(
    z: Tensor,  # [n, G, h]
) -> Tensor:  # [n, G, 2^h]
    """Probabilities of all patterns of h bits, the first bit the most significant."""
    out = z.new_ones((*z.shape[:2], 1))
    for one in z.unbind(-1):
        pair = torch.stack([_sigmoid(-one), _sigmoid(one)], -1)  # [n, G, 2]
        out = (out[..., None] * pair[..., None, :]).flatten(-2)
    return out


def _sums(
    z: Tensor,  # [N, G, C] finite
    weight: Tensor,  # [N]
) -> Tensor:  # [G, 2^C]
    first = z.shape[2] // 2
    sums = z.new_zeros((z.shape[1], 1 << first, 1 << (z.shape[2] - first)))
    with torch.autocast(z.device.type, enabled=False):  # it would round the halves
        for rows in _blocks(z):
            left = _half(z[rows, :, :first]) * weight[rows, None, None]  # [n, G, 2^first]
            right = _half(z[rows, :, first:])  # [n, G, 2^rest]
            # rounded from float64, as in _sigmoid: long sums of a small product are shared out by tokens, too
            sums += (left.permute(1, 2, 0).double() @ right.transpose(0, 1).double()).to(sums.dtype)
    return sums.flatten(1)


def _sums_backward(
    z: Tensor,  # [N, G, C]
    weight: Tensor,  # [N]
    dsums: Tensor,  # [G, 2^C]
) -> Tensor:  # dz [N, G, C]
    first = z.shape[2] // 2
    grid = dsums.unflatten(1, (1 << first, -1))  # [G, 2^first, 2^rest]
    dz = torch.empty_like(z)
    with torch.autocast(z.device.type, enabled=False):
        for rows in _blocks(z):
            left, right = _half(z[rows, :, :first]), _half(z[rows, :, first:])
            dleft = (right.transpose(0, 1) @ grid.transpose(1, 2)).transpose(0, 1)  # [n, G, 2^first]
            dright = (left.transpose(0, 1) @ grid).transpose(0, 1)  # [n, G, 2^rest]
            dz[rows, :, :first] = _half_backward(z[rows, :, :first], left * dleft)
            dz[rows, :, first:] = _half_backward(z[rows, :, first:], right * dright)
    return dz * weight[:, None, None]


def _half_backward(
    z: Tensor,  # [n, G, h]
    flow: Tensor,  # [n, G, 2^h] probability times its gradient
) -> Tensor:  # [n, G, h]
    """d p(b) / d z_d = p(b) (b_d - sigmoid(z_d)) for bits b_d; the two signs are summed apart, for they may cancel."""
    bits = z.shape[2]
    shift = torch.arange(bits - 1, -1, -1, device=z.device)
    ones = ((torch.arange(1 << bits, device=z.device)[:, None] >> shift) & 1).to(z.dtype)  # [2^h, h]
    with_one, with_zero = (flow @ torch.cat([ones, 1 - ones], 1)).chunk(2, -1)  # [n, G, h]
    return _sigmoid(-z) * with_one - _sigmoid(z) * with_zero


def _fake_sums(z: Tensor, weight: Tensor) -> Tensor:
    return z.new_empty((z.shape[1], 1 << z.shape[2]))


def _fake_backward(z: Tensor, weight: Tensor, dsums: Tensor) -> Tensor:
    return torch.empty_like(z)


_sign_sums = define("sign_code_sums(Tensor z, Tensor weight) -> Tensor", _sums, _fake_sums)
_sign_sums_backward = define(
    "sign_code_sums_backward(Tensor z, Tensor weight, Tensor dsums) -> Tensor", _sums_backward, _fake_backward
)


class _SignCodeSums(torch.autograd.Function):
    """Saves z and the weights; the halves are made again in the backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor) -> Tensor:  # [N, G, C], [N] -> [G, 2^C]
        sums = _sign_sums(z, weight)
        ctx.save_for_backward(z, weight, sums)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor, None]:  # [G, 2^C]
        z, weight, sums = ctx.saved_tensors
        # a constant added to dsums changes nothing, as probabilities sum to 1; without its mean less cancels
        groups = zip(sums, dsums, strict=True)
        mean = torch.stack([steady_sum(p * dp) / steady_sum(p).clamp(min=_tiny(p)) for p, dp in groups])
        return _sign_sums_backward(z, weight, (dsums - mean[:, None]).contiguous()), None


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny


def bit_logits(
    x: Tensor,  # [..., D]
    temperature: float,
    code_scale: float,
    weight: Tensor | None,  # [...]
) -> Tensor:  # [..., D] float32 or float64
    """z: the logit of each bit; 0 where ``weight`` leaves the token out, which may hold anything."""
    check_signs(x)
    check_temperature(temperature)
    if not 0 < code_scale < math.inf:
        raise ValueError(f"code_scale: expected a positive finite number, got {code_scale}")
    z = x.to(accumulation_dtype(x.dtype)) * (4 * code_scale / temperature)
    if weight is None:
        return z
    check_weight(weight, x.shape[:-1], x.device)
    return torch.where(weight[..., None] != 0, z, 0)


class _BitEntropy(torch.autograd.Function):
    """Saves z. float64 inside, as in ``_sigmoid``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # [..., D] -> [...]
        ctx.save_for_backward(z)
        size = z.abs().double()
        return (softplus(-size) + size * torch.sigmoid(-size)).sum(-1).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dentropy: Tensor) -> Tensor:  # [...] -> [..., D]
        (z,) = ctx.saved_tensors
        size = z.abs().double()
        slope = torch.sigmoid(size) * torch.sigmoid(-size)
        return (-z.double() * slope).to(z.dtype) * dentropy[..., None]


def bit_entropy(
    z: Tensor,  # [..., D]
) -> Tensor:  # [...] nats
    """Entropy of D bits that are 1 with probability sigmoid(z), each by itself."""
    return _BitEntropy.apply(z)


def sign_code_sums(
    z: Tensor,  # [..., D]
    bits: int,
    weight: Tensor | None,  # [...]
) -> Tensor:  # [D / bits, 2^bits]
    """The weighted sum over tokens of the probabilities of each code; tokens that are not finite are left out."""
    flat = z.reshape(-1, z.shape[-1] // bits, bits)  # [N, G, C]
    finite = flat.detach().isfinite().flatten(1).all(1)
    shares = finite.to(z.dtype) if weight is None else finite * weight.detach().reshape(-1).to(z.dtype)
    return _SignCodeSums.apply(torch.where(finite[:, None, None], flat, 0), shares)


def sign_assignment(
    x: Tensor,  # [..., D]
    *,
    temperature: float = 1.0,
    code_scale: float = 1.0,
    group_size: int | None = None,
    weight: Tensor | None = None,  # [...] float, or bool: a mask
) -> SoftAssignment:
    """``soft_assignment`` to the codebook of all sign vectors, in O(N D + N 2^(D/2)) instead of O(N D 2^D).

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides.
        temperature: T > 0, of -|x - c|^2 / T.
        code_scale: s > 0; the codes are s times the vectors of +-1 (BSQ: 1 / sqrt D).
        group_size: C, a divisor of D of 24 at most; all D when None. ``code_sums`` are then of each group by itself.
        weight: of each token in ``code_sums``, >= 0; a constant to autograd. False or 0 leaves the token out: lse and
            entropy 0, no gradient.

    Returns:
        SoftAssignment(lse, entropy, code_sums), float32 (float64 for float64 inputs). ``lse`` and ``entropy`` do not
        depend on the groups. ``code_sums`` is [2^D], with ``group_size`` [D / C, 2^C], in the order of ``sign_codes``.
        All are differentiable with respect to x, once. A token with NaN or Inf has lse and entropy NaN
        and is left out of the sums.

    Raises:
        TypeError, ValueError: a bad argument, named; more than 24 bits in a group.
    """
    z = bit_logits(x, temperature, code_scale, weight)
    bits = group_bits(x.shape[-1], group_size, MAX_GROUP_BITS)
    size = z.abs().double()
    distance = (size * (temperature / (4 * code_scale)) - code_scale).square()
    bad = torch.where(z.detach().isfinite().all(-1), 0.0, math.nan).to(z.dtype)
    lse = (softplus(-size) - distance / temperature).sum(-1).to(z.dtype) + bad
    sums, entropy = sign_code_sums(z, bits, weight), bit_entropy(z) + bad
    if weight is not None:
        lse, entropy = torch.where(weight != 0, lse, 0), torch.where(weight != 0, entropy, 0)
    return SoftAssignment(lse, entropy, sums[0] if group_size is None else sums)
