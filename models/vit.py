"""ViTTokenizer: images to codes and back by transformers (Yu et al. 2021, "Vector-quantized Image Modeling with
Improved VQGAN").

    encoder     patches, positions, blocks, norm, linear, tanh, linear
    quantizer   linear to a few dimensions, nearest code of length 1, linear back           (factorised codes, sec. 3.2)
    decoder     positions, blocks, norm, linear, tanh, linear, patches
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config_reader import from_dict
from .image_model import MODEL_CARD
from .layers import run_part
from .model_config import ViTConfig
from .tokenizer import ImageTokenizer, make_quantizer

__all__ = ["ViTConfig", "ViTTokenizer"]

IMAGE_CHANNELS = 3
LONGEST_WAVE = 10_000.0  # of the positions, over 2 pi
INITIAL_DEVIATION = 0.02  # of linear layers


def _waves(
    count: int,
    channels: int,
    like: Tensor,  # gives the device
) -> Tensor:  # float32 [count, channels]
    """Sines, then cosines of the places 0 ... count - 1, at frequencies from 1 down to almost 1 / LONGEST_WAVE."""
    steps = torch.arange(channels // 2, device=like.device, dtype=torch.float32)
    frequencies = torch.exp(steps * (-math.log(LONGEST_WAVE) / (channels // 2)))
    angles = torch.arange(count, device=like.device, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def with_positions(
    x: Tensor,  # [B, h, w, C]
) -> Tensor:  # [B, h w, C]
    """Tokens with their places added: half of the channels tell the row, half the column. Fixed, for any h and w."""
    height, width, channels = x.shape[1:]
    rows = _waves(height, channels // 2, x)[:, None].expand(height, width, -1)
    columns = _waves(width, channels // 2, x)[None].expand(height, width, -1)
    return (x + torch.cat([rows, columns], dim=2).to(x.dtype)).flatten(1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); memory grows with the number of tokens alone."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        channels, hidden = config.channels, config.hidden_channels
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def _attention(
        self,
        x: Tensor,  # [B, N, C]
    ) -> Tensor:  # [B, N, C]
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1))  # [B, N, 3, heads, C / heads]
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, C / heads] each
        return self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(
        self,
        x: Tensor,  # [B, N, C]
    ) -> Tensor:  # [B, N, C]
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Positions, blocks and a norm, over a map."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.again = config.gradient_checkpointing
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.channels)

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, h, w, C]
        size = x.shape[2:]
        x = with_positions(x.movedim(1, -1))
        for block in self.blocks:
            x = run_part(block, x, self.again)
        return self.norm(x).unflatten(1, size)


class Encoder(nn.Module):
    """Images to tokens: a patch each."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patches = nn.Conv2d(IMAGE_CHANNELS, config.channels, config.patch_size, stride=config.patch_size)
        self.transformer = Transformer(config)
        channels, hidden = config.channels, config.hidden_channels
        self.head = nn.Sequential(nn.Linear(channels, hidden), nn.Tanh(), nn.Linear(hidden, channels))

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, C, H / patch_size, W / patch_size]
        return self.head(self.transformer(self.patches(images))).movedim(-1, 1)


class Decoder(nn.Module):
    """Tokens to images; the last layer is a 1x1 convolution, after which pixels only change places."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.transformer = Transformer(config)
        self.head = nn.Sequential(nn.Linear(config.channels, config.hidden_channels), nn.Tanh())
        self.conv_out = nn.Conv2d(config.hidden_channels, IMAGE_CHANNELS * config.patch_size**2, 1)

    def forward(
        self,
        tokens: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, 3, h * patch_size, w * patch_size]
        x = self.head(self.transformer(tokens)).movedim(-1, 1)
        return F.pixel_shuffle(self.conv_out(x), self.patch_size)


def _initialise(module: nn.Module) -> None:
    """Small normal weights, as in ViT: deep stacks then start near the identity."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(module.bias)


class ViTTokenizer(
    ImageTokenizer,
    model_card_template=MODEL_CARD % {"kind": "ViT-VQGAN", "name": "ViTTokenizer", "channels": IMAGE_CHANNELS},
):
    """Two transformers with a vector quantizer between them.

    Images are [B, 3, H, W] floats in [-1, 1], H and W any multiples of `patch_size`; codes are int64
    [B, H / patch_size, W / patch_size]. The positions are fixed waves, so images need not have the size of those it was
    trained on; how well it does on another size is for you to measure.

    Args:
        config: the shape of the model; a plain dict of the same options is taken too.

    Raises:
        ValueError: an option of the config is unknown or out of range.
    """

    config_type = ViTConfig
    config: ViTConfig
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: ViTConfig | None = None) -> None:
        super().__init__()
        self.config = from_dict(ViTConfig, {} if config is None else config)
        self.encoder = Encoder(self.config).apply(_initialise)
        quantizer = self.config.quantizer
        self.quantizer = make_quantizer(quantizer, self.config.channels, quantizer.codebook_dim)
        self.decoder = Decoder(self.config).apply(_initialise)

    def decays(
        self,
        name: str,
        weight: Tensor,  # [...]
    ) -> bool:
        """Kernels of convolutions, and of the transformers' linear layers; not the quantizer's."""
        linear = weight.dim() == 2 and name.startswith(("encoder.", "decoder."))
        return linear or super().decays(name, weight)
