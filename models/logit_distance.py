"""How differently an ImageNet classifier judges two images: the mean squared difference of its logits.

    d(a, b) = mean over classes of (f(a)_c - f(b)_c)^2,   f after resizing to 224 x 224 and ImageNet's normalisation

f = ConvNeXt-S in TiTok (Yu et al. 2024, "An Image is Worth 32 Tokens"), where `lpips-convnext_s-1.0-0.1` with
perceptual_weight 1.1 is perceptual_weight 1.0 and logit_weight 0.1 here; f = ResNet50 in VQGAN+ (Weber et al. 2024,
"MaskBit"). Both take the mean over classes and batch, as here. The weights are the user's file, as torchvision saves
them; without it they are random, from a seed, and d is called by no published name.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convnext import TIMM_NAMES, ConvNeXt
from .published_weights import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    RANDOM_FEATURES,
    empty,
    fill,
    randomize,
    read_tensors,
    translated,
)
from .resnet import ResNet

SIDE = 224  # pixels that the classifiers were trained on
LABELS = {"convnext_s": "ConvNeXt-S logits", "resnet50": "ResNet50 logits"}


class LogitDistance(nn.Module):
    """d(a, b) as above; its weights are fixed and it stays in eval mode, gradients reach the images.

    Args:
        network: takes normalised images [B, 3, side, side] to logits [B, C].
        label: what a number may be called.
        side: that images are resized to, bilinear and antialiased.
    """

    network: nn.Module
    mean: Tensor  # [1, 3, 1, 1]
    deviation: Tensor  # [1, 3, 1, 1]

    def __init__(self, network: nn.Module, label: str, side: int = SIDE) -> None:
        super().__init__()
        self.network, self.label, self.side = network, label, side
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[None, :, None, None])
        self.register_buffer("deviation", torch.tensor(IMAGENET_DEVIATION)[None, :, None, None])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LogitDistance:
        """Stays in eval mode: batch statistics and dropout have no place in a measure."""
        return super().train(False)

    def logits(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> Tensor:  # [B, C]
        """What the classifier says."""
        size = (self.side, self.side)
        x = F.interpolate((images + 1) / 2, size, mode="bilinear", align_corners=False, antialias=True)
        return self.network((x - self.mean) / self.deviation)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
        others: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B]
        """The distance of every pair.

        Raises:
            ValueError: shapes that differ.
        """
        if images.shape != others.shape or images.dim() != 4 or images.shape[1] != 3:
            got = f"{list(images.shape)} and {list(others.shape)}"
            raise ValueError(f"images and others must have one shape [B, 3, H, W], got {got}")
        return (self.logits(images) - self.logits(others)).float().square().mean(1)


def make_logit_distance(
    network: str,
    weights_file: str | Path | None = None,
    option: str = "logit_weights_file",
) -> LogitDistance:
    """The distance by a published classifier.

    Args:
        network: "convnext_s" or "resnet50".
        weights_file: its weights as torchvision saves them, ConvNeXt's also as timm does; None: random ones.
        option: that named the file, for messages.

    Raises:
        FileNotFoundError, ValueError: a network of another name; a file that is not there, holds another network, or is
            not safe to read.
    """
    if network not in LABELS:
        raise ValueError(f"network must be one of {', '.join(LABELS)}, got {network!r}")
    own: ConvNeXt | ResNet = empty(ConvNeXt) if network == "convnext_s" else empty(ResNet)
    if weights_file is None:
        randomize(own, own.branch_scales())
        return LogitDistance(own, RANDOM_FEATURES)
    tensors = read_tensors(weights_file, option)
    if network == "convnext_s":
        tensors = translated(tensors, TIMM_NAMES)
    fill(own, tensors, f"{option}: {weights_file}")
    return LogitDistance(own, LABELS[network])
