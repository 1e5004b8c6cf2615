"""The shapes of the models, as dataclasses of plain types. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .config_reader import LATER, convert
from .quantizer_config import (
    AnyQuantizerConfig,
    EntropyConfig,
    LookupFreeConfig,
    QuantizerConfig,
    VectorQuantizerConfig,
)

__all__ = [
    "AnyQuantizerConfig",
    "EntropyConfig",
    "HierarchicalVQVAEConfig",
    "LookupFreeConfig",
    "ModelConfig",
    "QuantizerConfig",
    "VQGANConfig",
    "VQVAEConfig",
    "VectorQuantizerConfig",
]


@dataclass
class VQGANConfig:
    """Shape of a VQGAN (Esser et al. 2021); one token stands for 2**(levels - 1) image pixels each way.

    As the published ones, encoder and decoder have the same levels, and the decoder one more block in each.
    """

    kind: Literal["vqgan"] = "vqgan"
    """Tells this config from that of another model."""
    in_channels: int = 3
    """Channels of an image."""
    out_channels: int = 3
    """Channels of a reconstruction."""
    channels: int = 128
    """Channels after the first convolution (ch)."""
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    """Channels of every level as a multiple of `channels` (ch_mult); every level after the first halves the size."""
    blocks: int = 2
    """Residual blocks per level of the encoder (num_res_blocks)."""
    resolution: int = 256
    """Side of the images that attention_resolutions is counted for; images of other sizes work just as well."""
    attention_resolutions: list[int] | None = field(default_factory=lambda: [16])
    """Sides of the maps with attention after every block (attn_resolutions); null: the last level's, as in LlamaGen."""
    mid_attention: bool = True
    """Attention between the two blocks at the lowest resolution."""
    norm_groups: int = 32
    """Groups of every GroupNorm; divides the channels of every level."""
    latent_channels: int = 256
    """Channels that the encoder puts out and the decoder takes (z_channels)."""
    dropout: float = 0.0
    """Share of the channels' values that a residual block drops in training."""
    gradient_checkpointing: bool = False
    """Compute every level again in the backward pass instead of keeping its insides: slower, and far less memory."""
    quantizer: AnyQuantizerConfig = field(default_factory=VectorQuantizerConfig)
    """The quantizer; its kind says which. Its codebook_dim (embed_dim) is that of the 1x1 convolutions around it; null
    is latent_channels."""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.quantizer = convert(self.quantizer, AnyQuantizerConfig, "quantizer")
        positive = ("in_channels", "out_channels", "channels", "blocks", "resolution", "norm_groups", "latent_channels")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be positive integers, got {self.channel_multipliers}")
        for width in (self.channels, *self.widths):
            if width % self.norm_groups:
                raise ValueError(
                    f"norm_groups must divide channels and channels * channel_multipliers, "
                    f"got {self.norm_groups} for {width} channels"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        self._check_resolutions()

    def _check_resolutions(self) -> None:
        if self.resolution % self.factor:
            raise ValueError(f"resolution must be divisible by the model's factor {self.factor}, got {self.resolution}")
        sides = [self.resolution >> level for level in range(len(self.channel_multipliers))]
        for side in self.attention_resolutions or []:
            if side not in sides:
                raise ValueError(
                    f"attention_resolutions must be sides of the maps ({', '.join(map(str, sides))} for resolution "
                    f"{self.resolution}), got {side}"
                )

    @property
    def factor(self) -> int:
        """Image pixels per token, each way."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @property
    def widths(self) -> list[int]:
        """Channels of every level."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def codebook_dim(self) -> int:
        """Channels of a token."""
        return self.quantizer.codebook_dim or self.latent_channels

    @property
    def attention(self) -> list[bool]:
        """Whether the blocks of a level are followed by attention, level by level."""
        levels = range(len(self.channel_multipliers))
        if self.attention_resolutions is None:
            return [level == levels[-1] for level in levels]
        return [self.resolution >> level in self.attention_resolutions for level in levels]


@dataclass
class VQVAEConfig:
    """Shape of a VQVAE; one latent pixel stands for patch_size * 2**(levels - 1) image pixels each way."""

    kind: Literal["vqvae"] = field(default="vqvae", metadata=LATER)
    """Tells this config from that of another model."""
    patch_size: int = 1
    """Pixels each way that the first layer folds into channels; 1 is none, 2 or 4 make a model quicker."""
    channels: int = 64
    """Channels at the finest level."""
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Channels of every level as a multiple of `channels`; every level after the first halves the size."""
    blocks: int = 2
    """Residual blocks per level, in the encoder and in the decoder."""
    group_norm: bool = True
    """GroupNorm before every convolution of a residual block; without it the blocks are quicker on a CPU."""
    latent_channels: int = 32
    """Channels of the tokens that the encoder hands to the quantizer."""
    quantizer: AnyQuantizerConfig = field(default_factory=VectorQuantizerConfig)
    """The quantizer; its kind says which."""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.quantizer = convert(self.quantizer, AnyQuantizerConfig, "quantizer")
        for name in ("patch_size", "channels", "blocks", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be positive integers, got {self.channel_multipliers}")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, each way."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of every level."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]


@dataclass
class HierarchicalVQVAEConfig:
    """Shape of a HierarchicalVQVAE, with a coarse map of codes (top) and one of twice its height and width (bottom).

    A bottom code stands for patch_size * 2**(levels - 1) image pixels each way, a top code for twice as many.
    """

    kind: Literal["vqvae2"] = "vqvae2"
    """Tells this config from that of another model."""
    patch_size: int = 1
    """Pixels each way that the first layer folds into channels; 1 is none, 2 or 4 make a model quicker."""
    channels: int = 64
    """Channels at the finest level."""
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Channels of every level down to the bottom codes as a multiple of `channels`; every level after the first halves
    the size. The top codes' level has as many as the last one."""
    blocks: int = 2
    """Residual blocks per level, in the encoders and in the decoders."""
    group_norm: bool = True
    """GroupNorm before every convolution of a residual block; without it the blocks are quicker on a CPU."""
    latent_channels: int = 64
    """Channels of the tokens that the encoders hand to the quantizers."""
    top_quantizer: AnyQuantizerConfig = field(default_factory=VectorQuantizerConfig)
    """The quantizer of the coarse map; its kind says which."""
    bottom_quantizer: AnyQuantizerConfig = field(default_factory=VectorQuantizerConfig)
    """The quantizer of the fine map; its kind says which."""

    def __post_init__(self) -> None:
        for name in ("top_quantizer", "bottom_quantizer"):  # huggingface_hub restores them as plain dicts
            setattr(self, name, convert(getattr(self, name), AnyQuantizerConfig, name))
        for name in ("patch_size", "channels", "blocks", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be positive integers, got {self.channel_multipliers}")

    @property
    def factor(self) -> int:
        """Image pixels per top code, each way."""
        return self.patch_size * 2 ** len(self.channel_multipliers)

    @property
    def widths(self) -> list[int]:
        """Channels of every level down to the bottom codes."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]


# told apart by `kind`; the first is meant where that is left out
ModelConfig: TypeAlias = VQVAEConfig | VQGANConfig | HierarchicalVQVAEConfig
