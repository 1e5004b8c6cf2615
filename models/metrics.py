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
CHUNK = 1 << 24  # codes looked at at once: 128 MiB of int64, for arrays larger than memory


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
) -> np.ndarray:  # [U]
    """How often every code that occurs does, in the order of the codes.

    Raises:
        ValueError: a code is outside [0, codebook_size), or there are none.
    """
    flat = (codes.detach().cpu().numpy() if isinstance(codes, Tensor) else codes).reshape(-1)
    if flat.size == 0:
        raise ValueError("codes must not be empty")
    found, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for first in range(0, flat.size, CHUNK):
        chunk = flat[first : first + CHUNK].astype(np.int64)
        if chunk.min() < 0 or chunk.max() >= codebook_size:
            raise ValueError(f"codes must lie in [0, {codebook_size - 1}], got {chunk.min()} to {chunk.max()}")
        found, counts = _added_up(found, counts, *_occurring(chunk, codebook_size))
    return counts


def _occurring(
    codes: np.ndarray,  # int64 [N]
    codebook_size: int,
) -> tuple[np.ndarray, np.ndarray]:  # the codes [U], ascending, and how often [U]
    if codebook_size > CHUNK:  # lookup-free quantizers have up to 2^62 codes
        return np.unique(codes, return_counts=True)
    counts = np.bincount(codes, minlength=codebook_size)
    found = counts.nonzero()[0]
    return found, counts[found]


def _added_up(
    codes: np.ndarray,  # [U]
    counts: np.ndarray,  # [U]
    more_codes: np.ndarray,  # [V]
    more_counts: np.ndarray,  # [V]
) -> tuple[np.ndarray, np.ndarray]:
    """Both lists as one, ascending."""
    if not len(codes):
        return more_codes, more_counts
    found, place = np.unique(np.concatenate([codes, more_codes]), return_inverse=True)
    total = np.zeros(len(found), dtype=np.int64)
    np.add.at(total, place.reshape(-1), np.concatenate([counts, more_counts]))
    return found, total


def code_usage(
    codes: Tensor | np.ndarray,  # [...]
    codebook_size: int,
) -> CodeUsage:
    """Codes used, perplexity and entropy of an array of codes."""
    counts = code_counts(codes, codebook_size)
    shares = counts / counts.sum()
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
