"""VQGAN: the autoencoder of Esser et al. 2021 (Taming Transformers), of latent diffusion and of LlamaGen."""

from __future__ import annotations

from torch import Tensor, nn

from .autoencoder import Decoder, Encoder
from .config_reader import from_dict
from .image_model import MODEL_CARD
from .model_config import QuantizerConfig, VQGANConfig
from .tokenizer import ImageTokenizer, TokenizerOutput, make_quantizer

__all__ = ["VQGAN", "QuantizerConfig", "VQGANConfig", "VQGANOutput"]

VQGANOutput = TokenizerOutput


class VQGAN(
    ImageTokenizer,
    model_card_template=MODEL_CARD % {"kind": "VQGAN", "name": "VQGAN", "channels": "in_channels"},
):
    """Encoder, 1x1 convolution, vector quantizer, 1x1 convolution, decoder.

    Images are [B, in_channels, H, W] floats in [-1, 1], H and W any multiples of `factor`; codes are int64
    [B, H / factor, W / factor]. The config's defaults are the published f16 network with this package's own
    quantizer; `vqkernels.models.load_preset` has the published combinations, `load_foreign` their weights.

    Args:
        config: the shape of the model; a plain dict of the same options is taken too.

    Raises:
        ValueError: an option of the config is unknown or out of range.
    """

    config_type = VQGANConfig
    config: VQGANConfig
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = from_dict(VQGANConfig, {} if config is None else config)
        dim, latent_channels = self.config.codebook_dim, self.config.latent_channels
        self.encoder = Encoder(self.config)
        self.quant_conv = nn.Conv2d(latent_channels, dim, 1)
        self.quantizer = make_quantizer(self.config.quantizer, dim, dim)
        self.post_quant_conv = nn.Conv2d(dim, latent_channels, 1)
        self.decoder = Decoder(self.config)

    def _encoded(
        self,
        images: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, codebook_dim, h, w]
        return self.quant_conv(self.encoder(images))

    def _decoded(
        self,
        quantized: Tensor,  # [B, codebook_dim, h, w]
    ) -> Tensor:  # [B, out_channels, H, W]
        return self.decoder(self.post_quant_conv(quantized))
