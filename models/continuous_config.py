"""The shapes of the models without codes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .decoder_config import AutoencoderConfig, DecoderConfig


@dataclass
class KLVAEConfig(AutoencoderConfig):
    """Shape of a KLVAE (Rombach et al. 2022, the KL-regularised first stage of latent diffusion)."""

    kind: Literal["klvae"] = "klvae"
    """Tells this config from that of another model."""
    latent_channels: int = 4
    """Channels of a latent pixel (z_channels, embed_dim); the encoder puts out twice as many (double_z)."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence beside the error, both as sums over an image, as published: see models/kl_vae.py."""

    def __post_init__(self) -> None:
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight must be 0 or greater, got {self.kl_weight}")
        super().__post_init__()

    @property
    def encoded_channels(self) -> int:
        """Channels that the encoder puts out: mean and logarithm of the variance."""
        return 2 * self.latent_channels


@dataclass
class GANConfig(DecoderConfig):
    """Shape of a GAN's generator: VQGAN's decoder, of latents drawn from N(0, 1)."""

    kind: Literal["gan"] = "gan"
    """Tells this config from that of another model."""
    latent_channels: int = 64
    """Channels of a latent pixel."""

    @property
    def in_channels(self) -> int:
        """Channels of the images that it learns from."""
        return self.out_channels
