"""Building blocks of the autoencoders: residual blocks, the changes of resolution, parts that are computed again."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqkernels._dtypes import HALF

GROUP_CHANNELS = 16  # channels per group of GroupNorm


def widened(
    x: Tensor,  # [...]
) -> Tensor:  # [...]
    """``x``, half precision as float32."""
    return x.float() if x.dtype in HALF else x


def run_part(
    part: nn.Module,
    x: Tensor,  # [B, ...]
    again: bool,
) -> Tensor:  # what the part makes of it
    """The part of x; its insides are computed again in the backward pass where `again`."""
    if again and torch.is_grad_enabled():
        out: Tensor = checkpoint(part, x, use_reentrant=False)
        return out
    return part(x)


def _norm(
    channels: int,
    enabled: bool,
) -> nn.Module:
    if not enabled:
        return nn.Identity()
    groups = channels // GROUP_CHANNELS if channels % GROUP_CHANNELS == 0 else 1
    return nn.GroupNorm(max(groups, 1), channels, eps=1e-6)


def check_latents(
    latents: Tensor,  # [B, channels, h, w]
    channels: int,
) -> None:
    """What a decoder of continuous latents takes.

    Raises:
        ValueError: another shape, or no floats.
    """
    if latents.dim() != 4 or latents.shape[1] != channels or not latents.is_floating_point():
        expected = f"floats of shape [B, {channels}, h, w]"
        raise ValueError(f"latents must be {expected}, got {latents.dtype} {list(latents.shape)}")


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), with GroupNorm before each activation when asked for.

    The last convolution starts at zero: a new network is a linear map of patches, which learns within the
    first steps, and the blocks grow out of it.
    """

    def __init__(self, channels: int, group_norm: bool) -> None:
        super().__init__()
        self.norm1 = _norm(channels, group_norm)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = _norm(channels, group_norm)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H, W]
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class Fold(nn.Module):
    """Halves (or more) the size: pixels go to channels, a 1x1 convolution mixes them."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.mix = nn.Conv2d(in_channels * factor * factor, out_channels, 1)

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H / factor, W / factor]
        return self.mix(F.pixel_unshuffle(x, self.factor))


class Unfold(nn.Module):
    """Doubles (or more) the size: the reverse of Fold."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.mix = nn.Conv2d(in_channels, out_channels * factor * factor, 1)

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H * factor, W * factor]
        return F.pixel_shuffle(self.mix(x), self.factor)


class LevelShape(Protocol):
    """What the layers below need of a model's config."""

    patch_size: int
    blocks: int
    group_norm: bool

    @property
    def widths(self) -> list[int]: ...  # channels of every level


def folding_layers(image_channels: int, shape: LevelShape) -> list[nn.Module]:
    """Images to features of the last width, level by level; every level after the first halves the size."""
    widths, folded = shape.widths, image_channels * shape.patch_size**2
    layers: list[nn.Module] = [nn.PixelUnshuffle(shape.patch_size), nn.Conv2d(folded, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        if level:
            layers.append(Fold(widths[level - 1], width, 2))
        layers += [ResidualBlock(width, shape.group_norm) for _ in range(shape.blocks)]
    return layers


def unfolding_layers(latent_channels: int, image_channels: int, shape: LevelShape) -> list[nn.Module]:
    """Latents to images: the levels of `folding_layers` backwards."""
    widths, folded = shape.widths, image_channels * shape.patch_size**2
    layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1)]
    for level in reversed(range(len(widths))):
        layers += [ResidualBlock(widths[level], shape.group_norm) for _ in range(shape.blocks)]
        if level:
            layers.append(Unfold(widths[level], widths[level - 1], 2))
    return [*layers, nn.Conv2d(widths[0], folded, 3, padding=1), nn.PixelShuffle(shape.patch_size)]
