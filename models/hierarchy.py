"""HierarchicalVQVAE: images to two maps of codes and back (Razavi et al. 2019, Generating Diverse High-Fidelity Images
with VQ-VAE-2).

    bottom features   b = E_bottom(image)                  one for f x f pixels
    top codes         t = Q_top(E_top(b))                  one for 2f x 2f pixels: what the picture is of
    bottom codes      q = Q_bottom(b, D_top(t))            what the top codes have not said
    image             D(t, q)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqkernels.nn import QuantizerOutput

from .config_reader import from_dict
from .image_model import MODEL_CARD
from .layers import Fold, ResidualBlock, Unfold, folding_layers, unfolding_layers, widened
from .levels import CodedModel, CodeMap
from .model_config import HierarchicalVQVAEConfig
from .quantizer import check_codes, figure_names, figures, make_quantizer

__all__ = ["HierarchicalCodes", "HierarchicalOutput", "HierarchicalVQVAE", "HierarchicalVQVAEConfig"]

IMAGE_CHANNELS = 3


class HierarchicalCodes(NamedTuple):
    """Codes of images at both levels."""

    top: Tensor  # int64 [B, h, w]
    bottom: Tensor  # int64 [B, 2 h, 2 w]


class HierarchicalOutput(NamedTuple):
    """What model(images) returns."""

    reconstruction: Tensor  # [B, 3, H, W], not clamped; differentiable
    top: QuantizerOutput  # codes [B, h, w], losses and usage
    bottom: QuantizerOutput  # codes [B, 2 h, 2 w], losses and usage

    @property
    def loss(self) -> Tensor:  # []
        """What the two quantizers add to the loss."""
        return self.top.loss + self.bottom.loss


class HierarchicalVQVAE(
    CodedModel,
    model_card_template=MODEL_CARD % {"kind": "VQ-VAE-2", "name": "HierarchicalVQVAE", "channels": IMAGE_CHANNELS},
):
    """A convolutional autoencoder with two maps of codes, the finer one conditioned on the coarser.

    Images are [B, 3, H, W] floats in [-1, 1], H and W any multiples of `factor`, the pixels of a top code each way;
    a bottom code stands for half as many. Codes are a pair of int64 maps, top [B, H / factor, W / factor] and bottom
    of twice the height and width. The network has no positions and no attention, so any size works.

    Args:
        config: the shape of the model; a plain dict of the same options is taken too.

    Raises:
        ValueError: an option of the config is unknown or out of range.
    """

    config_type = HierarchicalVQVAEConfig
    config: HierarchicalVQVAEConfig

    def __init__(self, config: HierarchicalVQVAEConfig | None = None) -> None:
        super().__init__()
        self.config = from_dict(HierarchicalVQVAEConfig, {} if config is None else config)
        config, latents, width = self.config, self.config.latent_channels, self.config.widths[-1]
        self.bottom_encoder = nn.Sequential(*folding_layers(IMAGE_CHANNELS, config))
        self.top_encoder = nn.Sequential(Fold(width, width, 2), *self._blocks())
        self.to_top = nn.Conv2d(width, latents, 1)
        self.top_quantizer = make_quantizer(config.top_quantizer, latents, config.top_quantizer.codebook_dim)
        enter = nn.Conv2d(latents, width, 3, padding=1)
        self.top_decoder = nn.Sequential(enter, *self._blocks(), Unfold(width, width, 2))
        self.to_bottom = nn.Conv2d(2 * width, latents, 1)
        self.bottom_quantizer = make_quantizer(config.bottom_quantizer, latents, config.bottom_quantizer.codebook_dim)
        self.widen_top = Unfold(latents, latents, 2)
        self.decoder = nn.Sequential(*unfolding_layers(2 * latents, IMAGE_CHANNELS, config))

    def _blocks(self) -> list[ResidualBlock]:
        config = self.config
        return [ResidualBlock(config.widths[-1], config.group_norm) for _ in range(config.blocks)]

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution; after it pixels only change places."""
        layer = self.decoder[-2]
        assert isinstance(layer, nn.Conv2d)
        return layer

    @property
    def figure_names(self) -> tuple[str, ...]:
        """The two quantizers' loss, and what each of them tells."""
        config = self.config
        top = (f"top_{name}" for name in figure_names(config.top_quantizer))
        bottom = (f"bottom_{name}" for name in figure_names(config.bottom_quantizer))
        return ("quantizer_loss", *top, *bottom)

    def figures(
        self,
        out: HierarchicalOutput,
    ) -> tuple[Tensor, ...]:  # [] each
        """As `figure_names`."""
        config = self.config
        return (out.loss, *figures(out.top, config.top_quantizer), *figures(out.bottom, config.bottom_quantizer))

    def _bottom_tokens(
        self,
        features: Tensor,  # [B, W, 2 h, 2 w] of the bottom encoder
        top: Tensor,  # [B, D, h, w] quantized
    ) -> Tensor:  # [B, D, 2 h, 2 w]
        """float32 also under autocast: neighbouring codes differ by less than bf16 resolves."""
        said = self.top_decoder(top.to(self.to_top.weight.dtype))
        return widened(self.to_bottom(torch.cat([features, said], dim=1)))

    def _image_of(
        self,
        top: Tensor,  # [B, D, h, w] quantized
        bottom: Tensor,  # [B, D, 2 h, 2 w] quantized
    ) -> Tensor:  # [B, 3, H, W]
        dtype = self.to_top.weight.dtype
        return self.decoder(torch.cat([self.widen_top(top.to(dtype)), bottom.to(dtype)], dim=1))

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> HierarchicalOutput:
        """Reconstructs images; in training mode the codebooks learn from them as well.

        Raises:
            ValueError: wrong shape or dtype of images.
        """
        self._check_images(images)
        features = self.bottom_encoder(images)
        top = self.top_quantizer(widened(self.to_top(self.top_encoder(features))))
        bottom = self.bottom_quantizer(self._bottom_tokens(features, top.quantized))
        return HierarchicalOutput(self._image_of(top.quantized, bottom.quantized), top, bottom)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> HierarchicalCodes:
        """The codes of both levels, -1 where a token is not finite; changes nothing in the model, not differentiable.

        Raises:
            ValueError: wrong shape or dtype of images.
        """
        self._check_images(images)
        features = self.bottom_encoder(images)
        top = self.top_quantizer.encode(widened(self.to_top(self.top_encoder(features))))
        said = self.top_quantizer.lookup(top.clamp_min(0))  # there is no vector of -1
        bottom = self.bottom_quantizer.encode(self._bottom_tokens(features, said))
        return HierarchicalCodes(top, bottom)

    def decode(
        self,
        codes: tuple[Tensor, Tensor],  # [B, h, w], [B, 2 h, 2 w]
    ) -> Tensor:  # [B, 3, h * factor, w * factor]
        """Images of a pair of codes (top, bottom), clamped to [-1, 1].

        Raises:
            ValueError: no pair of integer maps, maps that do not belong together, or codes out of range.
        """
        if len(codes) != 2:
            raise ValueError(f"codes must be a pair (top, bottom), got {len(codes)} of them")
        top = check_codes(codes[0], self.top_quantizer.codebook_size, "top codes")
        bottom = check_codes(codes[1], self.bottom_quantizer.codebook_size, "bottom codes")
        batch, height, width = top.shape
        if bottom.shape != (batch, 2 * height, 2 * width):
            raise ValueError(
                f"bottom codes must be {[batch, 2 * height, 2 * width]} for top codes {list(top.shape)}, "
                f"got {list(bottom.shape)}"
            )
        image = self._image_of(self.top_quantizer.lookup(top), self.bottom_quantizer.lookup(bottom))
        return widened(image).clamp(-1, 1)

    @property
    def maps(self) -> dict[str, CodeMap]:
        """The maps of codes by name."""
        return {
            "top": CodeMap(self.top_quantizer, self.factor),
            "bottom": CodeMap(self.bottom_quantizer, self.factor // 2),
        }
