"""KLVAE: images to continuous latents and back, the first stage of latent diffusion (Rombach et al. 2022, sec. 3.1 and
appendix G: "KL-reg.").

With mu and s^2 the mean and variance that the encoder gives to each latent:

    KL      sum over an image's latents of (mu^2 + s^2 - 1 - log s^2) / 2       (Kingma & Welling 2014, appendix B)
    loss    kl_weight * (mean of KL over the batch) / (C H W)

The published loss is the error summed over an image's C H W values, plus kl_weight * KL. The training loop takes the
mean of the error, so the divergence is divided by C H W too: kl_weight means what it means there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .autoencoder import Decoder, Encoder
from .config_reader import from_dict
from .continuous_config import KLVAEConfig
from .image_model import MODEL_CARD, ImageModel
from .layers import check_latents, widened
from .noise import Noise

__all__ = ["KLVAE", "KLVAEConfig", "KLVAEOutput", "Posterior"]

LOGVAR_RANGE = (-30.0, 20.0)  # as published; exp of it is a number in float32


class Posterior(NamedTuple):
    """Independent normal distributions, one per latent."""

    mean: Tensor  # [B, C, h, w]
    logvar: Tensor  # [B, C, h, w] of the variance, clamped to LOGVAR_RANGE

    def sample(
        self,
        noise: Tensor,  # [B, C, h, w] of N(0, 1)
    ) -> Tensor:  # [B, C, h, w]
        """Latents; differentiable."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:  # [B]
        """Divergence from N(0, 1) in nats, summed over an image's latents."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum((1, 2, 3))


class KLVAEOutput(NamedTuple):
    """What model(images) returns."""

    reconstruction: Tensor  # [B, C, H, W], not clamped; differentiable
    posterior: Posterior
    latents: Tensor  # [B, C, h, w] that were decoded
    kl: Tensor  # [] nats an image, mean over the batch
    loss: Tensor  # [] what the divergence adds to the loss


class KLVAE(
    ImageModel,
    model_card_template=(MODEL_CARD % {"kind": "KL-VAE", "name": "KLVAE", "channels": "in_channels"}).replace(
        "codes", "latents"
    ),
):
    """Encoder, 1x1 convolution, a normal distribution per latent, 1x1 convolution, decoder.

    Images are [B, in_channels, H, W] floats in [-1, 1], H and W any multiples of `factor`; latents are float32
    [B, latent_channels, H / factor, W / factor]. In training latents are drawn, else they are the means.
    `vqkernels.models.load_preset` has the published shapes, `load_foreign` reads their weights.

    Args:
        config: the shape of the model; a plain dict of the same options is taken too.

    Raises:
        ValueError: an option of the config is unknown or out of range.
    """

    config_type = KLVAEConfig
    config: KLVAEConfig
    figure_names = ("kl", "latent_std")

    def __init__(self, config: KLVAEConfig | None = None) -> None:
        super().__init__()
        self.config = from_dict(KLVAEConfig, {} if config is None else config)
        latent, encoded = self.config.latent_channels, self.config.encoded_channels
        self.encoder = Encoder(self.config)
        self.quant_conv = nn.Conv2d(encoded, encoded, 1)
        self.noise = Noise()
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.decoder = Decoder(self.config)

    def figures(
        self,
        out: KLVAEOutput,
    ) -> tuple[Tensor, ...]:  # [] each
        """The divergence in nats an image, and the standard deviation of all latents (1 / latent diffusion's scale)."""
        return out.kl, out.latents.detach().std(correction=0)

    def posterior(
        self,
        images: Tensor,  # [B, C, H, W] in [-1, 1]
    ) -> Posterior:
        """What the encoder says of images; differentiable. float32 also under autocast: it goes through exp.

        Raises:
            ValueError: wrong shape or dtype of images.
        """
        self._check_images(images)
        mean, logvar = widened(self.quant_conv(self.encoder(images))).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def _image_of(
        self,
        latents: Tensor,  # [B, latent_channels, h, w]
    ) -> Tensor:  # [B, C, H, W]
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))

    def forward(
        self,
        images: Tensor,  # [B, C, H, W] in [-1, 1]
    ) -> KLVAEOutput:
        """Reconstructs images, in training mode from drawn latents.

        Args:
            images: [B, in_channels, H, W] floats in [-1, 1], H and W multiples of `factor`.

        Raises:
            ValueError: wrong shape or dtype of images.
        """
        found = self.posterior(images)
        latents = found.sample(self.noise(found.mean.shape).to(found.mean.dtype)) if self.training else found.mean
        kl = found.kl().mean()
        loss = self.config.kl_weight * kl / images.shape[1:].numel()
        return KLVAEOutput(self._image_of(latents), found, latents, kl, loss)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,  # [B, C, H, W] in [-1, 1]
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # [B, latent_channels, h, w]
        """Latents of images; changes nothing in the model, not differentiable.

        Args:
            images: [B, in_channels, H, W] floats in [-1, 1], H and W multiples of `factor`.
            sample: draw them; otherwise they are the means.
            generator: to draw with, on the images' device; torch's own when None.
        """
        found = self.posterior(images)
        if not sample:
            return found.mean
        mean = found.mean
        return found.sample(torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device))

    def decode(
        self,
        latents: Tensor,  # [B, latent_channels, h, w]
    ) -> Tensor:  # [B, C, h * factor, w * factor]
        """Images of latents, clamped to [-1, 1]; differentiable.

        Raises:
            ValueError: wrong shape or dtype of latents.
        """
        check_latents(latents, self.config.latent_channels)
        return widened(self._image_of(latents)).clamp(-1, 1)
