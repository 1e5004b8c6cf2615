"""A discriminator on the features of a frozen DINO (Sauer et al. 2023, "StyleGAN-T", sec. 3.2), as in ImageFolder.

For every feature map a small head of one-dimensional convolutions over its tokens, with spectral norm and statistics of
few images at a time; one logit per token and head. Only the heads learn, and only they are in the state_dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .dino import DinoBackbone
from .published_weights import IMAGENET_DEVIATION, IMAGENET_MEAN, RANDOM_FEATURES

SLOPE = 0.2  # of every LeakyReLU
KERNEL = 9  # tokens that a head's second convolution sees
VIRTUAL_BATCH = 8  # images, at most, whose statistics are taken together
EPSILON = 1e-5  # of these statistics
SPECTRAL_EPSILON = 1e-12


class LocalBatchNorm(nn.Module):
    """BatchNorm by the statistics of up to VIRTUAL_BATCH neighbours; no running ones, and none over ranks.

    The batch is cut into as few parts as that allows, of sizes that differ by one at most.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Tensor,  # [B, C, N]
    ) -> Tensor:  # [B, C, N]
        parts = x.tensor_split(math.ceil(len(x) / VIRTUAL_BATCH))
        normal = [F.batch_norm(part, None, None, self.weight, self.bias, training=True, eps=EPSILON) for part in parts]
        return torch.cat(normal)


class _Convolution(nn.Conv1d):
    """Its weight is divided by its largest singular value in float32, under autocast too: there it would be rounded."""

    def forward(
        self,
        x: Tensor,  # [B, C, N]
    ) -> Tensor:  # [B, C_out, N]
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


def _convolution(channels: int, out_channels: int, kernel: int) -> nn.Module:
    layer = _Convolution(channels, out_channels, kernel, padding=kernel // 2, padding_mode="circular")
    return spectral_norm(layer, eps=SPECTRAL_EPSILON)


class Head(nn.Module):
    """Logits of one feature map: a layer, a residual layer that sees its neighbours, and a sum over the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.first_norm = _convolution(channels, channels, 1), LocalBatchNorm(channels)
        self.second, self.second_norm = _convolution(channels, channels, KERNEL), LocalBatchNorm(channels)
        self.logit = _convolution(channels, 1, 1)

    def forward(
        self,
        x: Tensor,  # [B, C, N]
    ) -> Tensor:  # [B, N]
        x = F.leaky_relu(self.first_norm(self.first(x)), SLOPE)
        y = F.leaky_relu(self.second_norm(self.second(x)), SLOPE)
        return self.logit((x + y) / math.sqrt(2)).squeeze(1)


class DinoDiscriminator(nn.Module):
    """Logits of the tokens of images.

    Images that are larger than ``side`` are, with probability ``crop``, cut to a random square of that side, the same
    in the whole batch; otherwise they are resized, by area means where they are larger and bicubically where smaller.

    Args:
        backbone: frozen; moved with the heads, but not part of the parameters or of the state_dict.
        blocks: of the backbone whose outputs are judged, from 0; its embedded patches are judged as well.
        side: of the squares that the backbone is given, a multiple of its patch.
        crop: probability.
        label: what the features may be called.

    Raises:
        ValueError: a side that does not suit the backbone, or blocks that it has not.
    """

    mean: Tensor  # [1, 3, 1, 1]
    deviation: Tensor  # [1, 3, 1, 1]

    def __init__(
        self,
        backbone: DinoBackbone,
        blocks: Sequence[int] = (2, 5, 8, 11),
        side: int = 224,
        crop: float = 0.5,
        label: str = RANDOM_FEATURES,
    ) -> None:
        super().__init__()
        if side % backbone.patch or side < 2 * backbone.patch:
            raise ValueError(f"side must be a multiple of the patch of {backbone.patch} pixels, from 2, got {side}")
        if len({*blocks}) != len(blocks) or not {*blocks} <= {*range(len(backbone.blocks))}:
            raise ValueError(f"blocks must be distinct numbers below {len(backbone.blocks)}, got {list(blocks)}")
        self.blocks, self.side, self.crop, self.label = tuple(blocks), side, crop, label
        self._frozen = (backbone,)  # in a tuple: torch then does not count it among the module's own
        self.heads = nn.ModuleList(Head(backbone.width) for _ in range(len(blocks) + 1))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[None, :, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(IMAGENET_DEVIATION)[None, :, None, None], persistent=False)

    @property
    def backbone(self) -> DinoBackbone:
        """The frozen network."""
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DinoDiscriminator:
        """What .to(), .double() and the like do to the heads happens to the backbone too."""
        self.backbone._apply(fn)
        return super()._apply(fn, recurse)

    def _fitted(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, 3, side, side]
        spare = [length - self.side for length in images.shape[2:]]
        if min(spare) >= 0 and any(spare) and torch.rand((), device="cpu") < self.crop:  # nothing waits for a GPU
            top, left = (int(torch.randint(each + 1, (), device="cpu")) for each in spare)
            return images[:, :, top : top + self.side, left : left + self.side]
        if not any(spare):
            return images
        if min(spare) >= 0:
            return F.interpolate(images, (self.side, self.side), mode="area")
        return F.interpolate(images, (self.side, self.side), mode="bicubic", align_corners=False)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> Tensor:  # [B, heads * tokens]
        """Logits, one a token and head; positive means real.

        Raises:
            ValueError: images of another shape.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape [B, 3, H, W], got {list(images.shape)}")
        x = ((self._fitted(images) + 1) / 2 - self.mean) / self.deviation
        features = self.backbone.features(x, self.blocks)
        return torch.cat([head(each) for head, each in zip(self.heads, features, strict=True)], dim=1)
