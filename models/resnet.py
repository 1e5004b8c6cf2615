"""ResNet50 (He et al. 2016, "Deep Residual Learning for Image Recognition", table 1), an ImageNet classifier.

Its state_dict is torchvision's: a file saved there loads here. As there, the 3x3 convolution of a block has the stride,
and not the first 1x1 one as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4  # channels of a block's output as a multiple of those of its 3x3 convolution
STEM = 64  # channels of the first convolution


class Bottleneck(nn.Module):
    """relu(x + f(x)), f a 1x1, a 3x3 and a 1x1 convolution with BatchNorm; where sizes change, x is convolved too."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = width * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H / stride, W / stride]
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(y)) + shortcut)


class ResNet(nn.Module):
    """Logits of images; the defaults are ResNet50 with 25,557,032 weights.

    Args:
        blocks: of each of the four stages.
        widths: channels of the 3x3 convolutions of each stage.
        classes: how many logits come out.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 6, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        channels = STEM
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = nn.Sequential()
            for place in range(count):
                stage.append(Bottleneck(channels, width, stride=2 if number and not place else 1))
                channels = width * EXPANSION
            self.add_module(f"layer{number + 1}", stage)
        self.stages = len(blocks)
        self.fc = nn.Linear(channels, classes)

    def branch_scales(self) -> list[Tensor]:
        """The factors on what the blocks add."""
        return [module.bn3.weight for module in self.modules() if isinstance(module, Bottleneck)]

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, classes]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for number in range(self.stages):
            x = self.get_submodule(f"layer{number + 1}")(x)
        return self.fc(x.mean((2, 3)))
