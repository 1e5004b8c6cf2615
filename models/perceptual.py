"""LPIPS: how different two images look to a VGG16 (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features
as a Perceptual Metric", eq. 1).

    d(a, b) = sum over layers of mean over pixels of sum_c w_c (a^_c - b^_c)^2,   ^ = scaled to length 1 over channels

The weights are the user's files: VGG16's as torchvision saves them, and LPIPS's as its authors do. Without them the
features are random, from a seed: a loss that still compares textures, but not LPIPS, and never called so.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .published_weights import RANDOM_FEATURES, empty, fill, randomize, read_tensors

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


def _vgg16() -> nn.ModuleDict:
    """The convolutions under torchvision's names: a ReLU stands behind each of them, a pooling behind each block."""
    layers, channels, place = {}, 3, 0
    for widths in VGG16:
        for width in widths:
            layers[str(place)] = nn.Conv2d(channels, width, 3, padding=1)
            channels, place = width, place + 2
        place += 1
    return nn.ModuleDict({"features": nn.ModuleDict(layers)})


def _linear() -> nn.ModuleDict:
    """LPIPS's weights of the channels under its authors' names: a dropout stands before each of them."""
    layers = (nn.Sequential(nn.Identity(), nn.Conv2d(widths[-1], 1, 1, bias=False)) for widths in VGG16)
    return nn.ModuleDict({f"lin{number}": nn.ModuleDict({"model": layer}) for number, layer in enumerate(layers)})


def _only(beginning: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a file that is needed: torchvision's has the classifier as well."""
    return {name: value for name, value in tensors.items() if name.startswith(beginning)}


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
        self.vgg, self.linear = empty(_vgg16), empty(_linear)
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None])
        self.label = RANDOM_FEATURES
        if vgg is None:
            randomize(self.vgg)
        else:
            self.label = "LPIPS (VGG16)" if linear is not None else "VGG16 features, unweighted"
            fill(self.vgg, _only("features.", read_tensors(vgg, "vgg")), f"vgg: {vgg}")
        if linear is None:
            for weight in self.linear.parameters():
                nn.init.constant_(weight, 1 / weight.shape[1])
        else:
            fill(self.linear, _only("lin", read_tensors(linear, "lpips")), f"lpips: {linear}")
        self.requires_grad_(False).eval()

    def _linear_weights(self) -> list[Tensor]:  # [C] each
        return [weight.flatten() for weight in self.linear.parameters()]

    def features(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> list[Tensor]:  # five, [B, C, H / 2^i, W / 2^i]
        """After the last ReLU of each of VGG16's five blocks."""
        x = (images - self.shift) / self.scale
        found, convolutions = [], iter(self.vgg["features"].children())
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
        features = self.features(images), self.features(others)
        for own, other, weight in zip(*features, self._linear_weights(), strict=True):
            difference = (_normalized(own) - _normalized(other)).square()  # [B, C, h, w]
            total = total + (difference.mean((2, 3)) * weight).sum(1)
        return total
