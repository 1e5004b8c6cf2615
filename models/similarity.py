"""SSIM (Wang et al. 2004) and MS-SSIM (Wang et al. 2003) of whole batches, both from one pass, in float64.

Gaussian window of 11 pixels with deviation 1.5, K1 = 0.01, K2 = 0.03, the mean over pixels and colour channels; five
scales, each half of the one before by means of 2 x 2 pixels. As in torchmetrics, whose numbers these are, the picture
is mirrored at its border for SSIM, and the windows of MS-SSIM's contrast lie inside it. A window is products with
matrices here, where torchmetrics filters in two dimensions, which takes longer on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11
DEVIATION = 1.5
STRIP = 128  # pixels filtered by one matrix
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SMALLEST_MULTISCALE = WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1)  # 176: the window must fit into the last scale


def _filter(length: int, first: int, like: Tensor) -> tuple[Tensor, slice]:  # [rows, inputs]
    """The window's weights around the pixels of a strip, and which pixels they take; the border mirrors the picture."""
    reach = WINDOW // 2
    last = min(first + STRIP, length)
    inputs = slice(max(first - reach, 0), min(last + reach, length))
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-offsets.double().square() / (2 * DEVIATION**2))
    places = (torch.arange(first, last)[:, None] + offsets).abs()
    places = torch.where(places < length, places, 2 * (length - 1) - places) - inputs.start  # [rows, 11]
    window = torch.zeros(last - first, inputs.stop - inputs.start, dtype=torch.float64)
    window.scatter_add_(1, places, (weights / weights.sum()).expand(last - first, WINDOW))
    return window.to(like.device), inputs


def _across(
    maps: Tensor,  # [..., W]
) -> Tensor:  # [..., W]
    """The window along the last axis, strip by strip, so that the work grows with the pixels and not with W^2."""
    parts = (_filter(maps.shape[-1], first, maps) for first in range(0, maps.shape[-1], STRIP))
    return torch.cat([maps[..., inputs] @ window.T for window, inputs in parts], dim=-1)


def _means(
    images: Tensor,  # [B, C, H, W]
    others: Tensor,  # [B, C, H, W]
    peak: float,
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """SSIM, and its factor of contrast and structure alone, that one without the border."""
    maps = torch.stack([images, others, images * images, others * others, images * others])
    mean, other, square, other_square, product = _across(_across(maps).mT).mT.unbind(0)
    first, second = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    variances = (square - mean * mean).clamp_min(0) + (other_square - other * other).clamp_min(0)
    structure = (2 * (product - mean * other) + second) / (variances + second)
    luminance = (2 * mean * other + first) / (mean * mean + other * other + first)
    inner = slice(WINDOW // 2, -(WINDOW // 2))
    return (structure * luminance).mean((1, 2, 3)), structure[..., inner, inner].mean((1, 2, 3))


def similarities(
    images: Tensor,  # [B, C, H, W] in [0, peak]
    others: Tensor,  # [B, C, H, W]
    *,
    peak: float = 255.0,
    multiscale: bool = True,
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """SSIM and MS-SSIM of every pair; NaN where the pictures are smaller than 11 or 176 pixels, or not asked for."""
    images, others = images.double(), others.double()
    missing = images.new_full((len(images),), float("nan"))
    if min(images.shape[2:]) < WINDOW:
        return missing, missing
    similarity, structure = _means(images, others, peak)
    if not multiscale or min(images.shape[2:]) < SMALLEST_MULTISCALE:
        return similarity, missing
    whole, product = similarity, torch.ones_like(similarity)
    for weight in SCALE_WEIGHTS[:-1]:
        product = product * structure.clamp_min(0) ** weight
        images, others = F.avg_pool2d(images, 2), F.avg_pool2d(others, 2)
        whole, structure = _means(images, others, peak)
    return similarity, product * whole.clamp_min(0) ** SCALE_WEIGHTS[-1]
