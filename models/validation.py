"""A model on whole pictures: figures and the input | reconstruction | codes picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .data import ImageFolder, held_out_photograph, load_image
from .gan import GAN
from .image_model import ImageModel
from .metrics import SSIM_WINDOW, BitsPerPixel, CodeUsage, bits_per_pixel, code_usage, psnr, ssim
from .pictures import comparison, grid, pairs
from .tokenizer import ImageTokenizer

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
    codes: Tensor  # int64 [B, h, w]
    codebook: Tensor  # [K, D]
    psnr: float  # dB, mean over the images
    ssim: float  # mean over the images; NaN where they are smaller than its window
    usage: CodeUsage
    bits_per_pixel: BitsPerPixel

    def picture(self) -> Image.Image:
        """Input | reconstruction | codes, one row per image, at most 4."""
        size, (height, width) = len(self.codebook), self.images.shape[2:]
        details = (
            f"{width} x {height}",
            f"{self.psnr:.2f} dB",
            f"{self.codes.shape[2]} x {self.codes.shape[1]}, {self.usage.used} of {size} used",
        )
        images, reconstructions = self.images[:MAX_SHOWN], self.reconstructions[:MAX_SHOWN]
        return comparison(images, reconstructions, self.codes[:MAX_SHOWN], self.codebook, details=details)


def quality(
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    reconstructions: Tensor,  # [B, 3, H, W]
) -> tuple[float, float]:  # PSNR in dB, SSIM
    """Means over the images; SSIM is NaN where they are smaller than its window."""
    similarity = ssim(images, reconstructions).mean().item() if min(images.shape[2:]) >= SSIM_WINDOW else math.nan
    return psnr(images, reconstructions).mean().item(), similarity


@torch.no_grad()
def evaluate(
    model: ImageTokenizer,
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
) -> Evaluation:
    """Sends images through codes and back; changes nothing in the model."""
    device = next(model.parameters()).device
    codes = model.encode(images.to(device))
    reconstructions = model.decode(codes).cpu()
    images, codes, size = images.cpu(), codes.cpu(), model.config.quantizer.codebook_size
    fidelity, similarity = quality(images, reconstructions)
    return Evaluation(
        images=images,
        reconstructions=reconstructions,
        codes=codes,
        codebook=model.quantizer.codebook.detach().float().cpu(),
        psnr=fidelity,
        ssim=similarity,
        usage=code_usage(codes, size),
        bits_per_pixel=bits_per_pixel(codes, size, model.factor),
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
        if not isinstance(model, ImageTokenizer):
            return self._without_codes(model)
        found = evaluate(model, self.images)
        if not self.judges:
            return {}, found.picture()
        figures = {
            "held_out_psnr": found.psnr,
            "held_out_ssim": found.ssim,
            "held_out_perplexity": found.usage.perplexity,
            "held_out_usage": found.usage.usage,
            "held_out_bits_per_pixel": found.bits_per_pixel.entropy,
        }
        return {name: value for name, value in figures.items() if math.isfinite(value)}, found.picture()

    def _without_codes(self, model: ImageModel) -> tuple[dict[str, float], Image.Image]:
        reconstructions = model.reconstruct(self.images.to(next(model.parameters()).device)).cpu()
        fidelity, similarity = quality(self.images, reconstructions)
        height, width = self.images.shape[2:]
        shown = self.images[:MAX_SHOWN], reconstructions[:MAX_SHOWN]
        picture = pairs(*shown, details=(f"{width} x {height}", f"{fidelity:.2f} dB"))
        figures = {"held_out_psnr": fidelity, "held_out_ssim": similarity} if self.judges else {}
        return {name: value for name, value in figures.items() if math.isfinite(value)}, picture
