"""The training ops in plain torch, as their formulas read.

gather              q_n = c[codes_n],  error_n = |x_n - q_n|^2
quantize_backward   straight-through or rotation-trick gradient of q with respect to x, plus that of the error
codebook_stats      counts_k = #{n: codes_n = k},  sums_k = sum of those x_n
ema_update_         decayed statistics, Laplace smoothing, revival
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from .in_steps import (
    add_in_steps,
    clear_consumed,
    gradient_in_steps,
    masked,
    or_zeros,
    quantize_in_steps,
    step_in_steps,
)
from .reference_nearest import nearest
from .registry import register


def gather(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    codes: Tensor,  # [B, T]
) -> tuple[Tensor, Tensor]:  # quantized [B, T, D] laid out like x, error [B, T]
    """Codebook rows and the squared error of each; code -1 gives NaN."""
    invalid = codes < 0  # [B, T]
    rows = codebook[codes.clamp(min=0)].masked_fill(invalid[..., None], math.nan)
    quantized = torch.empty_like(x).copy_(rows)
    wide = accumulation_dtype(x.dtype)
    return quantized, (x.to(wide) - quantized.to(wide)).square().sum(-1)


def quantize_backward(
    x: Tensor,  # [B, T, D]
    quantized: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    dquantized: Tensor | None,  # [B, T, D]
    derror: Tensor | None,  # [B, T]
    rotation: bool,
    mask: Tensor | None = None,  # bool [B, T]
) -> Tensor:  # dx [B, T, D] laid out like x
    """Gradient for the tokens; code -1 passes ``dquantized`` through, a masked token gets none."""
    dquantized, derror = or_zeros(x, dquantized, derror)
    wide = accumulation_dtype(x.dtype)
    e, q, g = x.to(wide), quantized.to(wide), dquantized.to(wide)
    # in float64, where no square of a float32 over- or underflows
    through = _rotated(e.double(), q.double(), g.double()).to(wide) if rotation else g
    dx = through + 2 * derror[..., None].to(wide) * (e - q)
    return masked(mask, torch.empty_like(x).copy_(torch.where((codes < 0)[..., None], g, dx)))


def _rotated(
    e: Tensor,  # [B, T, D]
    q: Tensor,  # [B, T, D]
    g: Tensor,  # [B, T, D]
) -> Tensor:  # [B, T, D]
    """lam (g - 2 (g.w) w + 2 (g.v) u): the transpose of the map that turns e onto q (Fifty et al. 2024, sec. 4.2)."""
    norm_e, norm_q = e.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    u, v = e / norm_e, q / norm_q
    middle = u + v
    square = middle.square().sum(-1, keepdim=True)
    w = torch.where(square < 1e-12, 0.0, middle * square.rsqrt())  # u = -v has no middle: reflect
    turned = g - 2 * (g * w).sum(-1, keepdim=True) * w + 2 * (g * v).sum(-1, keepdim=True) * u
    return torch.where((norm_e == 0) | (norm_q == 0), g, norm_q / norm_e * turned)


def codebook_stats(
    x: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    codebook_size: int,
) -> tuple[Tensor, Tensor]:  # counts [K], sums [K, D]
    """Counts and sums per code in token order; one thread adds each row, so the result never depends on threads."""
    wide = accumulation_dtype(x.dtype)
    flat = codes.reshape(-1)
    if not codes.is_cuda and codes.numel():  # on CUDA, where looking would wait for the device, they are left out
        torch._assert_async((flat < codebook_size).all(), f"codes: expected below codebook_size {codebook_size}")
    slot = torch.where(flat < 0, codebook_size, flat)  # invalid tokens land behind the last code
    order = slot.argsort(stable=True)
    ends = torch.searchsorted(slot[order], torch.arange(codebook_size + 1, device=x.device))
    tokens = x.reshape(-1, x.shape[-1])[order].double()  # [N, D]; many alike would drown a float32 sum
    sums = torch.segment_reduce(tokens, "sum", offsets=_with_end(ends, tokens.shape[0]), initial=0)
    return ends.diff().to(wide), sums[:codebook_size].to(wide)


def _with_end(
    ends: Tensor,  # [K + 1]
    n: int,
) -> Tensor:  # [K + 2]
    """Offsets of K + 1 segments, the last one holding the tokens without a code."""
    return torch.cat([ends, ends.new_full((1,), n)])


def ema_update_(
    codebook: Tensor,  # [K, D]
    cluster_size: Tensor,  # [K]
    embed_sum: Tensor,  # [K, D]
    counts: Tensor,  # [K]
    sums: Tensor,  # [K, D]
    revive: Tensor,  # bool [K]
    decay: float,
    eps: float,
    revived_size: float,
    normalize: bool,
    plain: bool = False,
    consume: bool = False,
) -> None:
    """Decay, Laplace smoothing (van den Oord et al. 2017, appendix A.1), revival; in place."""
    row_revive = revive[:, None]
    active = torch.where(revive, 0.0, counts).sum() > 0
    sample = _unit(sums) if normalize else sums
    size = torch.where(active, decay * cluster_size + (1 - decay) * counts, cluster_size)
    cluster_size.copy_(torch.where(revive, revived_size, size))
    embed = torch.where(active, decay * embed_sum + (1 - decay) * sums, embed_sum)
    embed_sum.copy_(torch.where(row_revive, sample * revived_size, embed))
    total = cluster_size.sum()
    smoothed = cluster_size + eps  # [K]
    if not plain:
        smoothed = smoothed / (total + codebook.shape[0] * eps) * total
    mean = embed_sum / smoothed[:, None]
    learned = torch.where(active, _unit(mean) if normalize else mean, codebook)
    codebook.copy_(torch.where(row_revive, sample, learned))
    clear_consumed(consume, counts, sums, revive)


def _unit(
    rows: Tensor,  # [K, D]
) -> Tensor:  # [K, D]
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


for _op in (gather, quantize_backward, codebook_stats, ema_update_):
    register(_op.__name__, "reference", _op)
register("quantize", "reference", quantize_in_steps(nearest, gather))
register("codebook_gradient", "reference", gradient_in_steps(codebook_stats))
register("add_statistics_", "reference", add_in_steps(codebook_stats))
register("ema_step_", "reference", step_in_steps(codebook_stats, ema_update_))
