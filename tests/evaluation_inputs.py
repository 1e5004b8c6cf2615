"""Small pictures and a small model to evaluate, shared by the tests of `vqkernels evaluate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from vqkernels.models import (
    VQVAE,
    VQVAEConfig,
)

SIZE = 32
PAIRS = ("psnr", "ssim", "ms_ssim", "l1")


def noise_picture(seed: int, width: int, height: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def noise_pixels(count: int, size: int) -> Tensor:  # float [count, 3, size, size] in 0 ... 255
    pictures = (np.asarray(noise_picture(seed, size, size)) for seed in range(count))
    return torch.stack([torch.from_numpy(array.copy()).permute(2, 0, 1).float() for array in pictures])


def make_model() -> VQVAE:
    torch.manual_seed(0)
    shape = {"channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "latent_channels": 4, "patch_size": 2}
    model = VQVAE(VQVAEConfig(**shape, quantizer={"codebook_size": 24, "dead_code_threshold": 0.0}))
    with torch.no_grad():
        model.quantizer.codebook.copy_(model.tokens(noise_pixels(24, 8) / 127.5 - 1).flatten(1)[:, :4] * 0.7)
    return model.eval()


def write_pictures(folder: Path) -> Path:
    """Nine pictures of several sizes and modes, and two that cannot be used."""
    for number, size in enumerate(((40, 32), (32, 32), (97, 33), (31, 64), (20, 25))):
        noise_picture(number, *size).save(folder / f"{number}.png")
    noise_picture(7, 44, 38).convert("CMYK").save(folder / "cmyk.jpg")
    deep = (np.asarray(noise_picture(8, 36, 36).convert("L")).astype(np.uint16)) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    noise_picture(9, 50, 40).convert("RGBA").resize((64, 48)).save(folder / "clear.png")
    noise_picture(10, 40, 40).convert("P").save(folder / "palette.gif")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:90])
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())
