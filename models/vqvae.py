"""VQVAE: images to codes and back (van den Oord et al. 2017, Neural Discrete Representation Learning)."""

from __future__ import annotations

from torch import nn

from .config_reader import from_dict
from .image_model import MODEL_CARD
from .layers import Fold, ResidualBlock, Unfold
from .model_config import QuantizerConfig, VQVAEConfig
from .tokenizer import ImageTokenizer, TokenizerOutput, make_quantizer

__all__ = ["VQVAE", "QuantizerConfig", "VQVAEConfig", "VQVAEOutput"]

IMAGE_CHANNELS = 3

VQVAEOutput = TokenizerOutput


def _encoder(config: VQVAEConfig) -> nn.Sequential:
    widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
    folded = IMAGE_CHANNELS * config.patch_size**2
    layers: list[nn.Module] = [nn.PixelUnshuffle(config.patch_size), nn.Conv2d(folded, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        if level:
            layers.append(Fold(widths[level - 1], width, 2))
        layers += [ResidualBlock(width, config.group_norm) for _ in range(config.blocks)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], config.latent_channels, 1))


def _decoder(config: VQVAEConfig) -> nn.Sequential:
    widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
    folded = IMAGE_CHANNELS * config.patch_size**2
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)]
    for level in reversed(range(len(widths))):
        layers += [ResidualBlock(widths[level], config.group_norm) for _ in range(config.blocks)]
        if level:
            layers.append(Unfold(widths[level], widths[level - 1], 2))
    return nn.Sequential(*layers, nn.Conv2d(widths[0], folded, 3, padding=1), nn.PixelShuffle(config.patch_size))


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
        self.encoder = _encoder(self.config)
        quantizer = self.config.quantizer
        self.quantizer = make_quantizer(quantizer, self.config.latent_channels, quantizer.codebook_dim)
        self.decoder = _decoder(self.config)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution; after it pixels only change places."""
        layer = self.decoder[-2]
        assert isinstance(layer, nn.Conv2d)
        return layer
