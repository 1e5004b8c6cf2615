"""The shapes of the models and of their quantizers, as dataclasses of plain types. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .config_reader import from_dict
from .continuous_config import GANConfig, KLVAEConfig
from .decoder_config import AutoencoderConfig


@dataclass
class QuantizerConfig:
    """The vector quantizer between encoder and decoder (see vqkernels.nn.VectorQuantizer)."""

    codebook_size: int = 1024
    """Number of codes K."""
    codebook_dim: int | None = None
    """Dimension of a code; null: the same as latent_channels, otherwise a learned projection lies between."""
    metric: Literal["euclidean", "cosine", "dot"] = "euclidean"
    """What nearest means; dot (the largest product) only with gradient: index_propagation."""
    update: Literal["ema", "gradient"] = "ema"
    """How the codebook learns: moving averages of its tokens, or the gradient of the codebook loss."""
    ema_decay: float = 0.99
    """Decay of the moving averages per optimizer step."""
    commitment_weight: float = 0.25
    """Weight of the loss that pulls the encoder towards its codes (beta in the papers)."""
    codebook_weight: float = 1.0
    """Weight of the loss that pulls the codes towards the encoder; only with update: gradient."""
    gradient: Literal["straight_through", "rotation", "index_propagation"] = "straight_through"
    """How the gradient passes the quantizer; index_propagation takes it to all codes, as in IBQ (Shi et al. 2024)."""
    dead_code_threshold: float = 0.1
    """A code with fewer tokens per step than this, on average, is placed anew; 0: none. Only with update: ema."""
    kmeans_init: bool = True
    """Take the first codebook from the first training batch by k-means."""
    precision: Literal["exact", "fast"] = "exact"
    """Exact nearest codes, or plain float32 scores."""

    def __post_init__(self) -> None:
        if self.gradient == "index_propagation" and self.update != "gradient":
            raise ValueError(f"update must be gradient with gradient: index_propagation, got {self.update}")
        if self.metric == "dot" and self.gradient != "index_propagation":
            raise ValueError(f"gradient must be index_propagation with metric: dot, got {self.gradient}")


@dataclass
class VQGANConfig(AutoencoderConfig):
    """Shape of a VQGAN (Esser et al. 2021); one token stands for 2**(levels - 1) image pixels each way.

    As the published ones, encoder and decoder have the same levels, and the decoder one more block in each.
    """

    kind: Literal["vqgan"] = "vqgan"
    """Tells this config from that of another model."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """The vector quantizer. Its codebook_dim (embed_dim) is that of the 1x1 convolutions around it; null is
    latent_channels."""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.quantizer = from_dict(QuantizerConfig, self.quantizer, "quantizer")
        super().__post_init__()

    @property
    def codebook_dim(self) -> int:
        """Channels of a token."""
        return self.quantizer.codebook_dim or self.latent_channels


@dataclass
class VQVAEConfig:
    """Shape of a VQVAE; one latent pixel stands for patch_size * 2**(levels - 1) image pixels each way."""

    kind: Literal["vqvae"] = "vqvae"
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
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """The vector quantizer."""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.quantizer = from_dict(QuantizerConfig, self.quantizer, "quantizer")
        for name in ("patch_size", "channels", "blocks", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be positive integers, got {self.channel_multipliers}")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, each way."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)


def factorised_codes() -> QuantizerConfig:
    """The quantizer of ViT-VQGAN: unit vectors of 32 dimensions, which learn by the gradient."""
    return QuantizerConfig(8192, codebook_dim=32, metric="cosine", update="gradient", kmeans_init=False)


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
    quantizer: QuantizerConfig = field(default_factory=factorised_codes)
    """The vector quantizer; its codebook_dim is what the tokens are projected to for the search (factorised codes)."""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.quantizer = from_dict(QuantizerConfig, self.quantizer, "quantizer")
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


ModelConfig: TypeAlias = (
    VQVAEConfig | VQGANConfig | ViTConfig | KLVAEConfig | GANConfig
)  # told apart by `kind`; the first is meant where that is left out
