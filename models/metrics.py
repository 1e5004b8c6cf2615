"""How good a reconstruction is, and how much a code array says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    pass

DATA_RANGE = 2.0  # images lie in [-1, 1]
SSIM_WINDOW = 11  # pixels of the Gaussian window of Wang et al. 2004


class CodeUsage(NamedTuple):
    """How a set of codes uses its codebook."""

    used: int  # codes that occur
    usage: float  # the same as a share of the codebook
    perplexity: float  # exp of the entropy: how many equally frequent codes would say as much
    entropy_bits: float  # bits per token of an ideal entropy coder without context


class BitsPerPixel(NamedTuple):
    """Size of the codes of an image."""

    fixed: float  # log2(codebook_size) bits per token
    entropy: float  # the entropy of these codes: what an ideal entropy coder without context needs


def _check_pair(images: Tensor, reconstructions: Tensor) -> None:
    if images.dim() != 4 or images.shape != reconstructions.shape:
        raise ValueError(
            "images and reconstructions must have one shape [B, 3, H, W], "
            f"got {list(images.shape)} and {list(reconstructions.shape)}"
        )


def psnr(
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    reconstructions: Tensor,  # [B, 3, H, W]
) -> Tensor:  # [B]
    """Peak signal-to-noise ratio of every image in dB; reconstructions are clamped to [-1, 1] first."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_pair(images, reconstructions)
    pairs = zip(reconstructions.float().clamp(-1, 1), images.float(), strict=True)
    return torch.stack([peak_signal_noise_ratio(one, other, data_range=DATA_RANGE) for one, other in pairs])


def ssim(
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    reconstructions: Tensor,  # [B, 3, H, W]
) -> Tensor:  # [B]
    """Structural similarity of every image (Wang et al. 2004), at most 1; reconstructions are clamped first.

    Raises:
        ValueError: the shapes differ, or the images are smaller than SSIM's window of 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(images, reconstructions)
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"images must be at least {SSIM_WINDOW} pixels each way, got {list(images.shape[2:])}")
    # in [0, 1]: its luminance term compares with 0, so that it is another figure in [-1, 1]
    ours, theirs = (pixels.float().add(1) / 2 for pixels in (reconstructions.clamp(-1, 1), images))
    values = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    return torch.as_tensor(values).reshape(-1)


def code_counts(
    codes: Tensor | np.ndarray,  # [...], of any integer type, memory-mapped too
    codebook_size: int,
) -> np.ndarray:  # [K]
    """How often every code occurs.

    Raises:
        ValueError: a code is outside [0, codebook_size), or there are none.
    """
    flat = (codes.detach().cpu().numpy() if isinstance(codes, Tensor) else codes).reshape(-1)
    if flat.size == 0:
        raise ValueError("codes must not be empty")
    counts = np.zeros(codebook_size, dtype=np.int64)
    for first in range(0, flat.size, 1 << 24):  # 128 MiB of int64 at a time, for arrays larger than memory
        chunk = flat[first : first + (1 << 24)].astype(np.int64)
        if chunk.min() < 0 or chunk.max() >= codebook_size:
            raise ValueError(f"codes must lie in [0, {codebook_size - 1}], got {chunk.min()} to {chunk.max()}")
        counts += np.bincount(chunk, minlength=codebook_size)
    return counts


def code_usage(
    codes: Tensor | np.ndarray,  # [...]
    codebook_size: int,
) -> CodeUsage:
    """Codes used, perplexity and entropy of an array of codes."""
    counts = code_counts(codes, codebook_size)
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log2(shares)).sum())
    return CodeUsage(len(shares), len(shares) / codebook_size, 2.0**entropy, entropy)


def bits_per_pixel(
    codes: Tensor | np.ndarray,  # [..., h, w]
    codebook_size: int,
    factor: int,
) -> BitsPerPixel:
    """Bits per image pixel of codes that stand for factor x factor pixels each."""
    entropy = code_usage(codes, codebook_size).entropy_bits
    return BitsPerPixel(math.log2(codebook_size) / factor**2, entropy / factor**2)
