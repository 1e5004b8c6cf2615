"""The vision transformer of DINO (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers").

ViT-S of Touvron et al. 2021 (DeiT), pre-norm as Dosovitskiy et al. 2021, eq. 1 to 4. Its state_dict is that of the
published backbones (dino_deitsmall16_pretrain.pth, and timm's vit_small_patch16_224.dino).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .published_weights import RANDOM_FEATURES, empty, fill, randomize, read_tensors

EPSILON = 1e-6  # of every LayerNorm
RANDOM_DEVIATION = 0.02  # of a random network's class token and position embedding
PATCHES = {"vit_s16": 16, "vit_s8": 8}  # pixels of a patch each way
LABELS = {"vit_s16": "DINO ViT-S/16", "vit_s8": "DINO ViT-S/8"}


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of an image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
    ) -> Tensor:  # [B, N, C]
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))  # [B, heads, N, C / heads]
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """x + attention, then + two layers with GELU between, each of a LayerNorm of x."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(
        self,
        x: Tensor,  # [B, N, C]
    ) -> Tensor:  # [B, N, C]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class DinoBackbone(nn.Module):
    """Features of images; the defaults are ViT-S/16 with 21,665,664 weights.

    Args:
        patch: pixels of a token each way.
        width: channels of a token.
        depth: blocks.
        heads: of the attention.
        side: of the images that the position embedding is for; for others it is resized.
    """

    def __init__(self, patch: int = 16, width: int = 384, depth: int = 12, heads: int = 6, side: int = 224) -> None:
        super().__init__()
        self.width, self.patch = width, patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)  # in the files; the features are taken before it

    def randomize(self) -> None:
        """Random weights from a fixed seed."""
        randomize(self)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for embedding in (self.cls_token, self.pos_embed):
                embedding.copy_(torch.randn(embedding.shape, generator=generator) * RANDOM_DEVIATION)

    def _positions(self, height: int, width: int) -> Tensor:  # [1, 1 + height * width, C]
        """The position embedding for a grid of tokens, resized bilinearly as in StyleGAN-T where it is another."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (side, side))  # [1, C, side, side]
        grid = F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], dim=1)

    def features(
        self,
        images: Tensor,  # [B, 3, H, W], ImageNet's mean and deviation taken out; sides are multiples of the patch
        blocks: Sequence[int],
    ) -> list[Tensor]:  # [B, C, N] each: of the embedded patches, then after every block that is named
        """Tokens of the patches with the class token added to each, which StyleGAN-T calls the readout."""
        x = self.patch_embed["proj"](images)  # [B, C, h, w]
        positions = self._positions(*x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], dim=1) + positions
        found = [x]
        for number in range(max(blocks, default=-1) + 1):
            x = self.blocks[number](x)
            if number in blocks:
                found.append(x)
        return [(each[:, 1:] + each[:, :1]).mT for each in found]


def make_backbone(name: str, weights_file: str | Path | None, option: str) -> tuple[DinoBackbone, str]:
    """A frozen backbone, and what it may be called.

    Args:
        name: "vit_s16" or "vit_s8".
        weights_file: as DINO's authors publish it; None: random weights.
        option: that named the file, for messages.

    Raises:
        FileNotFoundError, ValueError: a file that is not there, holds another network, or is not safe to read.
    """
    backbone = empty(lambda: DinoBackbone(PATCHES[name]))
    if weights_file is None:
        backbone.randomize()
    else:
        fill(backbone, read_tensors(weights_file, option), f"{option}: {weights_file}")
    label = RANDOM_FEATURES if weights_file is None else LABELS[name]
    return backbone.requires_grad_(False).eval(), label
