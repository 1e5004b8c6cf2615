"""A model on whole pictures: figures and the input | reconstruction | codes picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .data import ImageFolder, held_out_photograph, load_image
from .gan import GAN
from .image_model import ImageModel
from .levels import CodedModel, CodeLevel, total_bits
from .metrics import BitsPerPixel, CodeUsage, psnr, ssim
from .pictures import comparison_of_maps, grid, pairs
from .similarity import WINDOW

MAX_PICTURES = 16  # held-out pictures per validation: enough for a trend, and short beside the training
MAX_SHOWN = 4  # rows of a sample picture


def crop_to_multiple(
    image: Tensor,  # [3, H, W]
    factor: int,
) -> Tensor:  # [3, H - H % factor, W - W % factor]
    """The middle of an image, cut to multiples of the model's factor.

    Raises:
        ValueError: the image is smaller than one factor x factor square.
    """
    height, width = (side - side % factor for side in image.shape[1:])
    if not height or not width:
        raise ValueError(f"image must be at least {factor}x{factor} pixels, got {image.shape[1]}x{image.shape[2]}")
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a batch of images of one size."""

    images: Tensor  # [B, 3, H, W]
    reconstructions: Tensor  # [B, 3, H, W]
    levels: list[CodeLevel]  # one map of codes, or top and bottom
    psnr: float  # dB, mean over the images
    ssim: float  # mean over the images; NaN where they are smaller than its window

    @property
    def codes(self) -> Tensor:  # int64 [B, h, w]
        """Of the first level, which is the only one but in a hierarchy."""
        return self.levels[0].codes

    @property
    def codebook_size(self) -> int:
        """Of the first level."""
        return self.levels[0].codebook_size

    @property
    def usage(self) -> CodeUsage:
        """Of the first level."""
        return self.levels[0].usage

    @property
    def bits_per_pixel(self) -> BitsPerPixel:
        """Of all levels together."""
        return total_bits(self.levels)

    def figures(self) -> dict[str, float]:
        """By their names in the training log; those of a level have its name in front where there are several."""
        found = {"held_out_psnr": self.psnr, "held_out_ssim": self.ssim}
        for level in self.levels:
            name, usage = "" if len(self.levels) == 1 else f"{level.name}_", level.usage
            found |= {f"held_out_{name}perplexity": usage.perplexity, f"held_out_{name}usage": usage.usage}
        found["held_out_bits_per_pixel"] = self.bits_per_pixel.entropy
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def picture(self) -> Image.Image:
        """Input | reconstruction | codes, one row per image, at most 4."""
        height, width = self.images.shape[2:]
        details = (f"{width} x {height}", f"{self.psnr:.2f} dB", *(level.described() for level in self.levels))
        images, reconstructions = self.images[:MAX_SHOWN], self.reconstructions[:MAX_SHOWN]
        maps = [(level.name, level.places[:MAX_SHOWN], level.table) for level in self.levels]
        return comparison_of_maps(images, reconstructions, maps, details=details)


def quality(
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    reconstructions: Tensor,  # [B, 3, H, W]
) -> tuple[float, float]:  # PSNR in dB, SSIM
    """Means over the images, of pixels not rounded to 8 bits; SSIM is NaN where they are smaller than its window."""
    similarity = ssim(images, reconstructions).mean().item() if min(images.shape[2:]) >= WINDOW else math.nan
    return psnr(images, reconstructions).mean().item(), similarity


@torch.no_grad()
def evaluate(
    model: CodedModel,
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
) -> Evaluation:
    """Sends images through codes and back; changes nothing in the model."""
    device = next(model.parameters()).device
    codes: Any = model.encode(images.to(device))
    reconstructions, images = model.decode(codes).cpu(), images.cpu()
    fidelity, similarity = quality(images, reconstructions)
    return Evaluation(
        images=images,
        reconstructions=reconstructions,
        levels=model.levels(codes),
        psnr=fidelity,
        ssim=similarity,
    )


class HeldOut:
    """The pictures that a training run is judged by: the astronaut, or square crops of a folder.

    Without any, `shown_instead` (training pictures, not augmented) still gives sample pictures, but no figures.
    """

    def __init__(
        self,
        validation: str | Path | None,
        data: str | Path | None,
        image_size: int,
        factor: int,
        shown_instead: Sequence[Path],
    ) -> None:
        self.judges, self.image_size = validation is not None or data is None, image_size
        if validation is None and data is None:
            self.images = crop_to_multiple(load_image(held_out_photograph()), factor)[None]
            return
        source = validation if validation is not None else list(shown_instead[:MAX_SHOWN])
        folder = ImageFolder(source, image_size, augment=False, cache_bytes=0)
        self.images = torch.stack([folder[index] for index in range(min(len(folder), MAX_PICTURES))])

    def evaluate(self, model: ImageModel) -> tuple[dict[str, float], Image.Image]:
        """Figures by name (none where nothing is held out, or of a GAN), and the sample picture."""
        if isinstance(model, GAN):
            size = self.image_size
            samples = model.generate(MAX_PICTURES, height=size, width=size)
            return {}, grid(samples.cpu(), detail=f"{size} x {size}")
        if not isinstance(model, CodedModel):
            return self._without_codes(model)
        found = evaluate(model, self.images)
        return found.figures() if self.judges else {}, found.picture()

    def _without_codes(self, model: ImageModel) -> tuple[dict[str, float], Image.Image]:
        reconstructions = model.reconstruct(self.images.to(next(model.parameters()).device)).cpu()
        fidelity, similarity = quality(self.images, reconstructions)
        height, width = self.images.shape[2:]
        shown = self.images[:MAX_SHOWN], reconstructions[:MAX_SHOWN]
        picture = pairs(*shown, details=(f"{width} x {height}", f"{fidelity:.2f} dB"))
        figures = {"held_out_psnr": fidelity, "held_out_ssim": similarity} if self.judges else {}
        return {name: value for name, value in figures.items() if math.isfinite(value)}, picture
