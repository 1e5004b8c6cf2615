"""Discriminators: is an image, or a patch of it, real?

PatchDiscriminator   a few strided convolutions, one logit per patch (Isola et al. 2017, "Image-to-Image Translation
                     with Conditional Adversarial Networks", sec. 3.2.2), as VQGAN has it (Esser et al. 2021)
StyleDiscriminator   residual blocks down to 4 x 4, one logit per image (Karras et al. 2020, "Analyzing and Improving
                     the Image Quality of StyleGAN", sec. 4.1)
DinoDiscriminator    heads on the features of a frozen vision transformer: dino_discriminator.py
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.nn.distributed import all_reduce_packed

from .config import DiscriminatorConfig
from .dino import make_backbone
from .dino_discriminator import DinoDiscriminator

IMAGE_CHANNELS = 3
SLOPE = 0.2  # of every LeakyReLU
KERNEL = 4  # of a patch discriminator's convolutions
MOST_MULTIPLE = 8  # of its channels
STYLE_CHANNELS = 512  # at most
STYLE_PIXELS = 4  # side of the map that the style discriminator ends at
STD_GROUP = 4  # images whose spread is one more channel


class ActNorm(nn.Module):
    """(x + loc) * scale per channel; the first training batch sets both so that its channels have mean 0, deviation 1.

    Kingma & Dhariwal 2018, "Glow", sec. 3.1. Without running statistics: an image's logit never depends on the others.
    The first batch is that of all ranks together: each must have one. One that is not finite sets nothing.
    """

    initialized: Tensor  # uint8 []

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self._started = False

    @torch.no_grad()
    def _initialize(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> None:
        """Without waiting for the device: what is there stays where it had been set before."""
        wide = x.double()
        sums = wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), wide.new_full((1,), x.numel() / x.shape[1])
        total, squares, count = all_reduce_packed(*sums)
        mean = (total / count).view(1, -1, 1, 1)
        variance = (squares - total.square() / count) / (count - 1).clamp(min=1)
        deviation = variance.clamp(min=0).sqrt().view(1, -1, 1, 1)
        fresh = (self.initialized == 0) & mean.isfinite().all() & deviation.isfinite().all()
        self.loc.copy_(torch.where(fresh, -mean, self.loc))
        self.scale.copy_(torch.where(fresh, 1 / (deviation + 1e-6), self.scale))
        self.initialized.masked_fill_(fresh, 1)

    def look_again(self) -> None:
        """Lets the next training batch be the first, if none has been finite so far; for a step that was left out."""
        self._started = False

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H, W]
        if self.training and not self._started:
            self._initialize(x.detach())
            self._started = True  # what initialized says after a finite batch, known without waiting for the device
        return self.scale * (x + self.loc)


def _norm(kind: str, channels: int) -> nn.Module:
    return {"batch": nn.BatchNorm2d, "act": ActNorm}[kind](channels)


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches. Its state_dict is the one of taming-transformers' discriminator.

    Args:
        channels: after the first convolution; doubled by every other one, up to 8 times.
        layers: strided convolutions; 3 see patches of 70 pixels.
        norm: "batch" or "act" (see ActNorm).

    Raises:
        ValueError: fewer than one channel or layer, or a norm of another name.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "batch") -> None:
        super().__init__()
        if norm not in ("batch", "act"):
            raise ValueError(f"norm must be 'batch' or 'act', got {norm!r}")
        for name, value in (("channels", channels), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.layers = layers
        parts: list[nn.Module] = [nn.Conv2d(IMAGE_CHANNELS, channels, KERNEL, stride=2, padding=1)]
        parts.append(nn.LeakyReLU(SLOPE, inplace=True))
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, MOST_MULTIPLE)
            stride = 2 if layer < layers else 1
            parts.append(nn.Conv2d(width, wider, KERNEL, stride=stride, padding=1, bias=norm != "batch"))
            parts += [_norm(norm, wider), nn.LeakyReLU(SLOPE, inplace=True)]
            width = wider
        parts.append(nn.Conv2d(width, 1, KERNEL, padding=1))
        self.main = nn.Sequential(*parts)
        self.apply(_init_patch_layer)

    @property
    def smallest_side(self) -> int:
        """Pixels that an image needs each way: at least one logit comes out, and BatchNorm sees more than one value."""
        side = 1
        for layer in range(self.layers + 2):  # backwards: two convolutions keep the size but for one pixel
            side = side + 1 if layer < 2 else 2 * side
        return side

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, 1, h, w]
        """Logits, one a patch; positive means real.

        Raises:
            ValueError: images of another shape, or too small for one patch.
        """
        _check_images(images, self.smallest_side)
        return self.main(images)


def _init_patch_layer(module: nn.Module) -> None:
    """Normal weights of deviation 0.02, as in Isola et al. 2017, sec. 6.2."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _check_images(images: Tensor, smallest: int) -> None:
    if images.dim() != 4 or images.shape[1] != IMAGE_CHANNELS:
        raise ValueError(f"images must have shape [B, {IMAGE_CHANNELS}, H, W], got {list(images.shape)}")
    if min(images.shape[2:]) < smallest:
        raise ValueError(f"images must be at least {smallest} pixels each way, got {list(images.shape[2:])}")


class _Blur(nn.Module):
    """Binomial [1, 2, 1] smoothing, so that what a stride leaves out does not alias."""

    weight: Tensor  # [1, 1, 3, 3]

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("weight", (line[:, None] * line / 16)[None, None], persistent=False)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H, W]
        channels = x.shape[1]
        return F.conv2d(x, self.weight.to(x.dtype).expand(channels, 1, 3, 3), padding=1, groups=channels)


class _DownBlock(nn.Module):
    """Two convolutions and a halving, beside a halved shortcut; the sum keeps its variance."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
        self.blur = _Blur()

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H / 2, W / 2]
        y = F.leaky_relu(self.conv1(x), SLOPE)
        y = F.leaky_relu(self.conv2(self.blur(y)), SLOPE)
        return (y + self.skip(self.blur(x))) * math.sqrt(0.5)


def _with_spread(
    x: Tensor,  # [B, C, H, W]
) -> Tensor:  # [B, C + 1, H, W]
    """One more channel: how much images of a group differ (Karras et al. 2018, sec. 3), against collapse.

    The batch is cut into groups of up to STD_GROUP neighbours; image b belongs to group b mod (number of groups).
    """
    batch, channels, height, width = x.shape
    group = next(size for size in range(min(STD_GROUP, batch), 0, -1) if batch % size == 0)
    grouped = x.view(group, batch // group, channels, height, width)
    deviation = (grouped.var(0, unbiased=False) + 1e-8).sqrt()  # [B / group, C, H, W]
    spread = deviation.mean((1, 2, 3)).repeat(group)  # [B]
    return torch.cat([x, spread[:, None, None, None].expand(batch, 1, height, width)], dim=1)


class StyleDiscriminator(nn.Module):
    """One logit per image of a fixed size.

    Args:
        image_size: side of the images, a power of two from 8.
        channels: at the finest level; doubled by every halving, up to 512.

    Raises:
        ValueError: a side that is no power of two from 8, or fewer than one channel.
    """

    def __init__(self, image_size: int, channels: int = 64) -> None:
        super().__init__()
        if image_size < 2 * STYLE_PIXELS or image_size & (image_size - 1):
            raise ValueError(f"image_size must be a power of two from {2 * STYLE_PIXELS}, got {image_size}")
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        self.image_size = image_size
        halvings = int(math.log2(image_size // STYLE_PIXELS))
        widths = [min(channels * 2**level, STYLE_CHANNELS) for level in range(halvings + 1)]
        self.start = nn.Conv2d(IMAGE_CHANNELS, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*(_DownBlock(*pair) for pair in itertools.pairwise(widths)))
        self.mix = nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * STYLE_PIXELS**2, widths[-1])
        self.logit = nn.Linear(widths[-1], 1)
        self.apply(_init_style_layer)

    def forward(
        self,
        images: Tensor,  # [B, 3, S, S]
    ) -> Tensor:  # [B, 1]
        """Logits, one an image; positive means real.

        Raises:
            ValueError: images of another shape.
        """
        side = self.image_size
        if images.shape[1:] != (IMAGE_CHANNELS, side, side):
            raise ValueError(f"images must have shape [B, {IMAGE_CHANNELS}, {side}, {side}], got {list(images.shape)}")
        x = self.blocks(F.leaky_relu(self.start(images), SLOPE))
        x = F.leaky_relu(self.mix(_with_spread(x)), SLOPE)
        return self.logit(F.leaky_relu(self.hidden(x.flatten(1)), SLOPE))


def _init_style_layer(module: nn.Module) -> None:
    """He initialisation: with torch's own start hardly anything of an image would be left after the blocks."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, a=SLOPE, nonlinearity="leaky_relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def make_discriminator(
    config: DiscriminatorConfig, image_size: int
) -> PatchDiscriminator | StyleDiscriminator | DinoDiscriminator:
    """The discriminator of a config (kind "patch", "style" or "dino"), for images of ``image_size`` pixels each way.

    Raises:
        FileNotFoundError, ValueError: the images are too small for it, or of a size that it cannot take; its weight
            file is not there or holds something else. The option is named.
    """
    if config.kind == "style":
        return StyleDiscriminator(image_size, config.channels)
    if config.kind == "dino":
        backbone, label = make_backbone(config.backbone, config.weights_file, "discriminator.weights_file")
        return DinoDiscriminator(backbone, config.blocks, config.input_side, config.crop, label)
    patch = PatchDiscriminator(config.channels, config.layers, config.norm)
    if image_size < patch.smallest_side:
        raise ValueError(
            f"discriminator.layers must be smaller for image_size {image_size}: {config.layers} layers need "
            f"{patch.smallest_side} pixels"
        )
    return patch
