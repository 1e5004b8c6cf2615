"""Augmentations that gradients pass through, for what a discriminator sees (Zhao et al. 2020, "Differentiable
Augmentation for Data-Efficient GAN Training", sec. 3.2). Real and reconstructed images get the same kinds, each image
its own draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("color", "translation", "cutout")
TRANSLATION = 0.125  # of the side, each way at most
CUTOUT = 0.5  # of the side


def _uniform(images: Tensor, generator: torch.Generator | None) -> Tensor:  # [B, 1, 1, 1] in [0, 1)
    return torch.rand(images.shape[0], 1, 1, 1, device=images.device, generator=generator).to(images.dtype)


def _color(
    images: Tensor,  # [B, 3, H, W]
    generator: torch.Generator | None,
) -> Tensor:  # [B, 3, H, W]
    """Brightness +- 0.5, then saturation times 0 to 2, then contrast times 0.5 to 1.5."""
    images = images + (_uniform(images, generator) - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * _uniform(images, generator))
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.5 + _uniform(images, generator))


def _steps(images: Tensor, most: int, generator: torch.Generator | None) -> Tensor:  # int64 [B] in [-most, most]
    drawn = torch.randint(2 * most + 1, (images.shape[0],), device=images.device, generator=generator)
    return drawn - most


def _translation(
    images: Tensor,  # [B, 3, H, W]
    generator: torch.Generator | None,
) -> Tensor:  # [B, 3, H, W]
    """Moved by up to an eighth each way; zeros come in."""
    batch, _, height, width = images.shape
    down, right = (_steps(images, round(side * TRANSLATION), generator) for side in (height, width))
    rows = (torch.arange(height, device=images.device) - down[:, None]).clamp(-1, height)  # [B, H]
    columns = (torch.arange(width, device=images.device) - right[:, None]).clamp(-1, width)  # [B, W]
    framed = F.pad(images, (1, 1, 1, 1)).movedim(1, -1)  # [B, H + 2, W + 2, 3]: what lies outside is 0
    each = torch.arange(batch, device=images.device)[:, None, None]
    return framed[each, rows[:, :, None] + 1, columns[:, None, :] + 1].movedim(-1, 1)


def _cutout(
    images: Tensor,  # [B, 3, H, W]
    generator: torch.Generator | None,
) -> Tensor:  # [B, 3, H, W]
    """A square of half the side becomes 0, its centre anywhere in the image."""
    height, width = images.shape[2:]
    device = images.device
    inside = []
    for side in (height, width):
        size = round(side * CUTOUT)
        centre = torch.randint(side + 1 - size % 2, (images.shape[0], 1), device=device, generator=generator)
        first = centre - size // 2
        place = torch.arange(side, device=device)
        inside.append((place >= first) & (place < first + size))  # [B, side]
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(hole, 0)


_KINDS = {"color": _color, "translation": _translation, "cutout": _cutout}


def augment(
    images: Tensor,  # [B, 3, H, W]
    kinds: Sequence[str],
    generator: torch.Generator | None = None,
) -> Tensor:  # [B, 3, H, W]
    """``images`` after each of ``kinds`` in turn; differentiable; the images themselves where there is none.

    Args:
        kinds: of "color", "translation", "cutout".
        generator: of the random numbers, on the images' device; torch's own when left out.

    Raises:
        ValueError: a kind of another name.
    """
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(f"kinds must be of {AUGMENTATIONS}, got {kind!r}")
        images = _KINDS[kind](images, generator)
    return images
