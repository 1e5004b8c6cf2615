"""ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s", sec. 2), an ImageNet classifier.

Its state_dict is torchvision's: a file saved there loads here, and one of timm's by TIMM_NAMES.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL = 7  # of the depthwise convolutions
STEM = 4  # side of the pixel patches that the first layer takes
EPSILON = 1e-6  # of every LayerNorm
LAYER_SCALE = 1e-6  # of a new network's blocks
_BLOCK = (
    (r"gamma", "layer_scale"),
    (r"conv_dw\.(\w+)", r"block.0.\2"),
    (r"norm\.(\w+)", r"block.2.\2"),
    (r"mlp\.fc1\.(\w+)", r"block.3.\2"),
    (r"mlp\.fc2\.(\w+)", r"block.5.\2"),
)
TIMM_NAMES = (  # patterns of timm's names, and the same in torchvision's
    (r"stem\.(\d)\.(\w+)", r"features.0.\1.\2"),
    *((rf"stages\.{n}\.downsample\.(\d)\.(\w+)", rf"features.{2 * n}.\1.\2") for n in (1, 2, 3)),
    *((rf"stages\.{n}\.blocks\.(\d+)\.{a}", rf"features.{2 * n + 1}.\1.{b}") for n in range(4) for a, b in _BLOCK),
    (r"head\.norm\.(\w+)", r"classifier.0.\1"),
    (r"head\.fc\.(\w+)", r"classifier.2.\1"),
)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPSILON)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H, W]
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """x + scale * (depthwise convolution, LayerNorm, and two 1x1 layers with GELU between)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))
        self.block = nn.ModuleDict(  # the numbers are torchvision's places, with what has no weights between
            {
                "0": nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=channels),
                "2": nn.LayerNorm(channels, eps=EPSILON),
                "3": nn.Linear(channels, 4 * channels),
                "5": nn.Linear(4 * channels, channels),
            }
        )

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H, W]
        y = self.block["0"](x).movedim(1, -1)
        y = self.block["5"](F.gelu(self.block["3"](self.block["2"](y))))
        return x + self.layer_scale * y.movedim(-1, 1)


class ConvNeXt(nn.Module):
    """Logits of images; the defaults are ConvNeXt-S with 50,223,688 weights.

    Args:
        blocks: of each stage.
        widths: channels of each stage.
        classes: how many logits come out.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 3, 27, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        classes: int = 1000,
    ) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, widths[0], STEM, stride=STEM), ChannelNorm(widths[0]))
        stages = [nn.Sequential(*(Block(width) for _ in range(n))) for n, width in zip(blocks, widths, strict=True)]
        downs = [nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, 2, stride=2)) for a, b in itertools.pairwise(widths)]
        alternating = [each for pair in zip(downs, stages[1:], strict=True) for each in pair]
        self.features = nn.Sequential(stem, stages[0], *alternating)
        self.classifier = nn.Sequential(ChannelNorm(widths[-1]), nn.Flatten(1), nn.Linear(widths[-1], classes))

    def branch_scales(self) -> list[Tensor]:
        """The factors on what the blocks add."""
        return [module.layer_scale for module in self.modules() if isinstance(module, Block)]

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, classes]
        return self.classifier(self.features(x).mean((2, 3), keepdim=True))
