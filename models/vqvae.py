"""VQVAE: images to codes and back (van den Oord et al. 2017, Neural Discrete Representation Learning)."""

from __future__ import annotations

from torch import nn

from .config_reader import from_dict
from .image_model import MODEL_CARD
from .layers import folding_layers, unfolding_layers
from .model_config import QuantizerConfig, VQVAEConfig
from .tokenizer import ImageTokenizer, TokenizerOutput, make_quantizer

__all__ = ["VQVAE", "QuantizerConfig", "VQVAEConfig", "VQVAEOutput"]

IMAGE_CHANNELS = 3

VQVAEOutput = TokenizerOutput


class VQVAE(
    ImageTokenizer,
    model_card_template=MODEL_CARD % {"kind": "VQ-VAE", "name": "VQVAE", "channels": IMAGE_CHANNELS},
):
    """A convolutional autoencoder with a vector quantizer in the middle.

    Images are [B, 3, H, W] floats in [-1, 1], H and W any multiples of `factor`; codes are int64
    [B, H / factor, W / factor]. The network has no positions and no attention, so any size works.

    Args:
        config: the shape of the model; a plain dict of the same options is taken too.

    Raises:
        ValueError: an option of the config is unknown or out of range.
    """

    config_type = VQVAEConfig
    config: VQVAEConfig
    decoder: nn.Sequential

    def __init__(self, config: VQVAEConfig | None = None) -> None:
        super().__init__()
        self.config = from_dict(VQVAEConfig, {} if config is None else config)
        config, latents = self.config, self.config.latent_channels
        layers = folding_layers(IMAGE_CHANNELS, config)
        self.encoder = nn.Sequential(*layers, nn.Conv2d(config.widths[-1], latents, 1))
        self.quantizer = make_quantizer(config.quantizer, latents, config.quantizer.codebook_dim)
        self.decoder = nn.Sequential(*unfolding_layers(latents, IMAGE_CHANNELS, config))

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution; after it pixels only change places."""
        layer = self.decoder[-2]
        assert isinstance(layer, nn.Conv2d)
        return layer
