"""Encoder and decoder of VQGAN (Esser et al. 2021, Taming Transformers) and of latent diffusion's first stages.

Parameters have the names of the published checkpoints (`down.0.block.1.conv1.weight`, `mid.attn_1.q.weight`,
`up.4.upsample.conv.bias`), so that those need no translation. What differs is how it is computed: attention
without a table of all pairs of pixels, and levels that can be computed again in the backward pass.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .decoder_config import AutoencoderConfig, DecoderConfig
from .layers import run_part

EPSILON = 1e-6  # of every GroupNorm


def _norm(channels: int, config: DecoderConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=EPSILON)


class ResnetBlock(nn.Module):
    """x + conv(dropout(swish(norm(conv(swish(norm(x))))))), with a 1x1 convolution of x where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, config: DecoderConfig) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H, W]
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return self.nin_shortcut(x) + y


class Attention(nn.Module):
    """Self-attention of one head over all pixels, added to its input; memory grows with their number alone."""

    def __init__(self, channels: int, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = _norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H, W]
        y = self.norm(x)
        # with channels last in memory: from other strides torch would build the table of all pairs of pixels
        q, k, v = (conv(y).flatten(2).mT.contiguous().unsqueeze(1) for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H W, C]; scaled by C^-1/2
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves the size by a 3x3 convolution of stride 2, with one row of zeros below and one column to the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H / 2, W / 2]
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the size by repeating pixels, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, 2 H, 2 W]
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, with attention after each where asked for."""

    def __init__(self, channels: list[int], attention: bool, config: DecoderConfig) -> None:  # before and after blocks
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(before, after, config) for before, after in pairwise(channels))
        self.attn = nn.ModuleList(Attention(after, config) for after in channels[1:] if attention)

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H, W]
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x


class DownLevel(Level):
    """A level of the encoder; every one but the last halves the size at its end."""

    def __init__(self, channels: list[int], attention: bool, last: bool, config: DecoderConfig) -> None:
        super().__init__(channels, attention, config)
        self.downsample = nn.Identity() if last else Downsample(channels[-1])

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H / 2, W / 2]
        return self.downsample(super().forward(x))


class UpLevel(Level):
    """A level of the decoder; every one but the finest doubles the size at its end."""

    def __init__(self, channels: list[int], attention: bool, finest: bool, config: DecoderConfig) -> None:
        super().__init__(channels, attention, config)
        self.upsample = nn.Identity() if finest else Upsample(channels[-1])

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, 2 H, 2 W]
        return self.upsample(super().forward(x))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, config: DecoderConfig) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config)
        self.attn_1 = Attention(channels, config) if config.mid_attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, config)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H, W]
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images to latents: a convolution, the levels from fine to coarse, the middle, a convolution."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.again = config.gradient_checkpointing
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, after) in enumerate(pairwise([config.channels, *widths])):
            channels = [before, *[after] * config.blocks]
            self.down.append(DownLevel(channels, config.attention[level], level == len(widths) - 1, config))
        self.mid = Middle(widths[-1], config)
        self.norm_out = _norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], config.encoded_channels, 3, padding=1)

    def forward(
        self,
        images: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, encoded_channels, H / factor, W / factor]
        x = self.conv_in(images)
        for level in self.down:
            x = run_part(level, x, self.again)
        x = run_part(self.mid, x, self.again)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents to images: a convolution, the middle, the levels from coarse to fine, a convolution.

    `up[0]` is the finest level, which comes last.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.again = config.gradient_checkpointing
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList()
        for level, (after, before) in enumerate(pairwise([*widths, widths[-1]])):
            channels = [before, *[after] * (config.blocks + 1)]
            self.up.append(UpLevel(channels, config.attention[level], level == 0, config))
        self.norm_out = _norm(widths[0], config)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,  # [B, latent_channels, h, w]
    ) -> Tensor:  # [B, out_channels, h * factor, w * factor]
        x = run_part(self.mid, self.conv_in(latents), self.again)
        for level in reversed(self.up):
            x = run_part(level, x, self.again)
        return self.conv_out(F.silu(self.norm_out(x)))
