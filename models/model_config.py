"""The shapes of the models, as dataclasses of plain types. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .config_reader import LATER, convert
from .continuous_config import GANConfig, KLVAEConfig
from .decoder_config import AutoencoderConfig
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
class VQGANConfig(AutoencoderConfig):
    """Shape of a VQGAN (Esser et al. 2021); one token stands for 2**(levels - 1) image pixels each way.

    As the published ones, encoder and decoder have the same levels, and the decoder one more block in each.
    """

    kind: Literal["vqgan"] = "vqgan"
    """Tells this config from that of another model."""
    quantizer: AnyQuantizerConfig = field(default_factory=VectorQuantizerConfig)
    """The quantizer; its kind says which. Its codebook_dim (embed_dim) is that of the 1x1 convolutions around it; null
    is latent_channels."""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.quantizer = convert(self.quantizer, AnyQuantizerConfig, "quantizer")
        super().__post_init__()

    @property
    def codebook_dim(self) -> int:
        """Channels of a token."""
        return self.quantizer.codebook_dim or self.latent_channels


@dataclass
class FoldingConfig:
    """What the configs of networks that fold pixels into channels have in common (models/layers.py)."""

    kind: str = ""
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

    def __post_init__(self) -> None:
        for name in ("patch_size", "channels", "blocks", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be positive integers, got {self.channel_multipliers}")

    @property
    def widths(self) -> list[int]:
        """Channels of every level."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]


@dataclass
class VQVAEConfig(FoldingConfig):
    """Shape of a VQVAE; one latent pixel stands for patch_size * 2**(levels - 1) image pixels each way."""

    kind: Literal["vqvae"] = field(default="vqvae", metadata=LATER)
    """Tells this config from that of another model."""
    quantizer: AnyQuantizerConfig = field(default_factory=VectorQuantizerConfig)
    """The quantizer; its kind says which."""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.quantizer = convert(self.quantizer, AnyQuantizerConfig, "quantizer")
        super().__post_init__()

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, each way."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)


@dataclass
class HierarchicalVQVAEConfig(FoldingConfig):
    """Shape of a HierarchicalVQVAE, with a coarse map of codes (top) and one of twice its height and width (bottom).

    A bottom code stands for patch_size * 2**(levels - 1) image pixels each way, a top code for twice as many.
    """

    kind: Literal["vqvae2"] = "vqvae2"
    """Tells this config from that of another model."""
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Channels of every level down to the bottom codes as a multiple of `channels`; every level after the first halves
    the size. The top codes' level has as many as the last one."""
    latent_channels: int = 64
    """Channels of the tokens that the encoders hand to the quantizers."""
    top_quantizer: AnyQuantizerConfig = field(default_factory=VectorQuantizerConfig)
    """The quantizer of the coarse map; its kind says which."""
    bottom_quantizer: AnyQuantizerConfig = field(default_factory=VectorQuantizerConfig)
    """The quantizer of the fine map; its kind says which."""

    def __post_init__(self) -> None:
        for name in ("top_quantizer", "bottom_quantizer"):  # huggingface_hub restores them as plain dicts
            setattr(self, name, convert(getattr(self, name), AnyQuantizerConfig, name))
        super().__post_init__()

    @property
    def factor(self) -> int:
        """Image pixels per top code, each way."""
        return self.patch_size * 2 ** len(self.channel_multipliers)


def factorised_codes() -> VectorQuantizerConfig:
    """The quantizer of ViT-VQGAN: unit vectors of 32 dimensions, which learn by the gradient."""
    return VectorQuantizerConfig(
        codebook_size=8192, codebook_dim=32, metric="cosine", update="gradient", kmeans_init=False
    )


@dataclass
class ViTConfig:
    """Shape of a ViTTokenizer (Yu et al. 2021, ViT-VQGAN): encoder and decoder alike; a token is a patch of pixels."""

    kind: Literal["vit"] = "vit"
    """Tells this config from that of another model."""
    patch_size: int = 8
    """Image pixels per token, each way."""
    channels: int = 512
    """Channels of a token between the layers; divisible by heads and by 4."""
    layers: int = 8
    """Transformer blocks of the encoder, and of the decoder."""
    heads: int = 8
    """Heads of every attention."""
    mlp_ratio: float = 4.0
    """Channels inside every feed-forward layer, as a multiple of `channels`."""
    gradient_checkpointing: bool = False
    """Compute every block again in the backward pass instead of keeping its insides: slower, and far less memory."""
    quantizer: AnyQuantizerConfig = field(default_factory=factorised_codes)
    """The quantizer; its kind says which. Its codebook_dim is what tokens are projected to for the search (factorised
    codes)."""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.quantizer = convert(self.quantizer, AnyQuantizerConfig, "quantizer")
        for name in ("patch_size", "channels", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.channels % self.heads or self.channels % 4:
            raise ValueError(f"channels must be divisible by heads ({self.heads}) and by 4, got {self.channels}")
        if not self.hidden_channels >= 1:
            raise ValueError(f"mlp_ratio must give at least one channel, got {self.mlp_ratio}")

    @property
    def factor(self) -> int:
        """Image pixels per token, each way."""
        return self.patch_size

    @property
    def hidden_channels(self) -> int:
        """Channels inside a feed-forward layer."""
        return round(self.mlp_ratio * self.channels)


# told apart by `kind`; the first is meant where that is left out
ModelConfig: TypeAlias = VQVAEConfig | VQGANConfig | HierarchicalVQVAEConfig | ViTConfig | KLVAEConfig | GANConfig
