"""How good a reconstruction is, and how much a code array says.

PSNR and SSIM here are of the network's numbers, clamped and not rounded to 8 bits; those of `evaluate_files` are of
rounded pixels unless it is asked for others, as a saved picture has them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .similarity import WINDOW, similarities

DATA_RANGE = 2.0  # images lie in [-1, 1]
DENSE = 1 << 16  # codebooks up to here are counted in an array of all codes, larger ones where the codes are as many
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
    """Peak signal-to-noise ratio of every image in dB; reconstructions are clamped to [-1, 1] first, not rounded."""
    _check_pair(images, reconstructions)
    mse = (reconstructions.float().clamp(-1, 1) - images.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(DATA_RANGE**2 / mse)


def ssim(
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    reconstructions: Tensor,  # [B, 3, H, W]
) -> Tensor:  # [B]
    """Structural similarity of every image (Wang et al. 2004), at most 1; reconstructions are clamped, not rounded.

    Raises:
        ValueError: the shapes differ, or the images are smaller than SSIM's window of 11 pixels.
    """
    _check_pair(images, reconstructions)
    if min(images.shape[2:]) < WINDOW:
        raise ValueError(f"images must be at least {WINDOW} pixels each way, got {list(images.shape[2:])}")
    # in [0, 1]: its luminance term compares with 0, so that it is another figure in [-1, 1]
    pair = (pixels.float().add(1) / 2 for pixels in (images, reconstructions.clamp(-1, 1)))
    return similarities(*pair, peak=1.0, multiscale=False)[0].float()


class CodeCounter:
    """How often every code occurs in codes that come part by part; memory holds those that occurred alone.

    Args:
        codebook_size: every code is below it; a quantizer of signs has up to 2^62.
    """

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        self.codes = np.zeros(0, dtype=np.int64)  # [U], ascending
        self.counts = np.zeros(0, dtype=np.int64)  # [U]

    def update(
        self,
        codes: Tensor | np.ndarray,  # [...], of any integer type, memory-mapped too
    ) -> None:
        """Adds some codes.

        Raises:
            ValueError: a code is outside [0, codebook_size).
        """
        flat = (codes.detach().cpu().numpy() if isinstance(codes, Tensor) else codes).reshape(-1)
        for first in range(0, flat.size, CHUNK):
            chunk = flat[first : first + CHUNK].astype(np.int64)
            if chunk.min() < 0 or chunk.max() >= self.codebook_size:
                raise ValueError(f"codes must lie in [0, {self.codebook_size - 1}], got {chunk.min()} to {chunk.max()}")
            self.codes, self.counts = _added_up(self.codes, self.counts, *_occurring(chunk, self.codebook_size))


def code_counts(
    codes: Tensor | np.ndarray,  # [...], of any integer type, memory-mapped too
    codebook_size: int,
) -> np.ndarray:  # [U]
    """How often every code that occurs does, in the order of the codes.

    Raises:
        ValueError: a code is outside [0, codebook_size), or there are none.
    """
    counter = CodeCounter(codebook_size)
    counter.update(codes)
    if not len(counter.counts):
        raise ValueError("codes must not be empty")
    return counter.counts


def _occurring(
    codes: np.ndarray,  # int64 [N]
    codebook_size: int,
) -> tuple[np.ndarray, np.ndarray]:  # the codes [U], ascending, and how often [U]
    if codebook_size > max(len(codes), DENSE):
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
