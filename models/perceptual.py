"""LPIPS: how different two images look to a VGG16 (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features
as a Perceptual Metric", eq. 1).

    d(a, b) = sum over layers of mean over pixels of sum_c w_c (a^_c - b^_c)^2,   ^ = scaled to length 1 over channels

The weights are the user's files: VGG16's as torchvision saves them, and LPIPS's as its authors do. Without them the
features are random, from a seed: a loss that still compares textures, but not LPIPS, and never called so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .published_weights import RANDOM_FEATURES, RANDOM_SEED, read_tensors

# channels of VGG16's convolutions; a new list begins after a max pooling, and each ends in one of the five features
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT = (-0.030, -0.088, -0.188)  # of images in [-1, 1] to ImageNet's mean and deviation
SCALE = (0.458, 0.448, 0.450)
SMALLEST_SIDE = 16  # four poolings


def _normalized(
    features: Tensor,  # [B, C, H, W]
) -> Tensor:  # [B, C, H, W]
    # vector_norm: its gradient is 0, not NaN, where no channel answers
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


class PerceptualDistance(nn.Module):
    """d(a, b) as above; its weights are fixed, gradients reach the images.

    Args:
        vgg: file with VGG16's weights ("features.0.weight" ...): .pth or .safetensors; None: random features.
        linear: file with LPIPS's linear weights ("lin0.model.1.weight" ...); None with ``vgg``: all ones / C, which is
            the unweighted form of the paper's sec. 3.

    Attributes:
        label: "LPIPS (VGG16)", "VGG16 features, unweighted" or "random features": what a number may be called.

    Raises:
        FileNotFoundError, ValueError: a file that is not there, holds other weights, or is not safe to read; "vgg" or
            "lpips", the option, stands before it.
    """

    shift: Tensor  # [1, 3, 1, 1]
    scale: Tensor  # [1, 3, 1, 1]

    def __init__(self, vgg: str | Path | None = None, linear: str | Path | None = None) -> None:
        super().__init__()
        if linear is not None and vgg is None:
            raise ValueError("vgg must be given where linear is: LPIPS's weights belong to VGG16's features")
        layers, channels = [], 3
        for widths in VGG16:
            for width in widths:
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
        self.convolutions = nn.ModuleList(layers)
        self.linear = nn.ParameterList([torch.full((widths[-1],), 1 / widths[-1]) for widths in VGG16])
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None])
        self.label = RANDOM_FEATURES
        if vgg is None:
            self._randomize()
        else:
            self.label = "LPIPS (VGG16)" if linear is not None else "VGG16 features, unweighted"
            self._load_vgg(Path(vgg))
        if linear is not None:
            self._load_linear(Path(linear))
        self.requires_grad_(False).eval()

    def _randomize(self) -> None:
        """He initialisation: every layer keeps the size of its input."""
        generator = torch.Generator().manual_seed(RANDOM_SEED)
        for layer in self.convolutions:
            assert isinstance(layer, nn.Conv2d)
            fan_in = layer.weight[0].numel()
            with torch.no_grad():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def _load_vgg(self, path: Path) -> None:
        weights, origin = read_tensors(path, "vgg"), f"vgg: {path}"
        place = 0  # of a convolution among torchvision's layers: each is followed by a ReLU, each block by a pooling
        convolutions = iter(self.convolutions)
        for widths in VGG16:
            for _ in widths:
                layer = next(convolutions)
                assert isinstance(layer, nn.Conv2d)
                assert layer.bias is not None
                _fill(layer.weight, weights, f"features.{place}.weight", origin)
                _fill(layer.bias, weights, f"features.{place}.bias", origin)
                place += 2
            place += 1

    @torch.no_grad()
    def _load_linear(self, path: Path) -> None:
        weights, origin = read_tensors(path, "lpips"), f"lpips: {path}"
        for number, own in enumerate(self.linear):
            _fill(own, weights, f"lin{number}.model.1.weight", origin)

    def features(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> list[Tensor]:  # five, [B, C, H / 2^i, W / 2^i]
        """After the last ReLU of each of VGG16's five blocks."""
        x = (images - self.shift) / self.scale
        found, convolutions = [], iter(self.convolutions)
        for block, widths in enumerate(VGG16):
            x = F.max_pool2d(x, 2) if block else x
            for _ in widths:
                x = F.relu(next(convolutions)(x))
            found.append(x)
        return found

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
        others: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B]
        """The distance of every pair.

        Raises:
            ValueError: shapes that differ, or images under 16 pixels.
        """
        if images.shape != others.shape or images.dim() != 4 or min(images.shape[2:]) < SMALLEST_SIDE:
            got = f"{list(images.shape)} and {list(others.shape)}"
            raise ValueError(
                f"images and others must have one shape [B, 3, H, W] from {SMALLEST_SIDE} pixels, got {got}"
            )
        total = images.new_zeros(images.shape[0])
        for own, other, weight in zip(self.features(images), self.features(others), self.linear, strict=True):
            difference = (_normalized(own) - _normalized(other)).square()  # [B, C, h, w]
            total = total + (difference.mean((2, 3)) * weight).sum(1)
        return total


def _fill(own: Tensor, weights: Mapping[str, Tensor], name: str, origin: str) -> None:
    if name not in weights:
        raise ValueError(f"{origin}: has no {name!r}")
    found = weights[name]
    if found.squeeze().shape != own.shape:
        raise ValueError(f"{origin}: {name} must have shape {list(own.shape)}, got {list(found.shape)}")
    own.copy_(found.reshape(own.shape))
