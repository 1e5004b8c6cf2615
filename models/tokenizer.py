"""What every image tokenizer here has in common: images to codes and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqkernels.nn import QuantizerOutput

from .layers import widened
from .levels import CodedModel, CodeMap
from .quantizer import Quantizer, check_codes, figure_names, figures, make_quantizer

__all__ = ["ImageTokenizer", "Quantizer", "TokenizerOutput", "make_quantizer"]


class TokenizerOutput(NamedTuple):
    """What model(images) returns."""

    reconstruction: Tensor  # [B, C, H, W], not clamped; differentiable
    quantizer: QuantizerOutput  # codes [B, h, w], losses and usage

    @property
    def loss(self) -> Tensor:  # []
        """What the quantizer adds to the loss."""
        return self.quantizer.loss


class ImageTokenizer(CodedModel):
    """Base of the models with one map of codes: encoder, quantizer, decoder.

    Images are [B, in_channels, H, W] floats in [-1, 1], H and W any multiples of `factor`; codes are int64
    [B, H / factor, W / factor]. A subclass makes `config`, `encoder`, `quantizer` and `decoder` and says what lies
    between them in `_encoded` and `_decoded`.
    """

    encoder: nn.Module
    quantizer: Quantizer
    decoder: nn.Module

    @property
    def figure_names(self) -> tuple[str, ...]:
        """Of the quantizer; its entropies where its loss has them."""
        return figure_names(self.config.quantizer)

    def figures(
        self,
        out: TokenizerOutput,
    ) -> tuple[Tensor, ...]:  # [] each
        """As `figure_names`."""
        return figures(out.quantizer, self.config.quantizer)

    def _encoded(
        self,
        images: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, D, h, w]
        return self.encoder(images)

    def _decoded(
        self,
        quantized: Tensor,  # [B, D, h, w]
    ) -> Tensor:  # [B, C, H, W]
        return self.decoder(quantized)

    def tokens(
        self,
        images: Tensor,  # [B, C, H, W] in [-1, 1]
    ) -> Tensor:  # [B, D, h, w]
        """What the quantizer is given for images; differentiable.

        float32 also under autocast: neighbouring codes differ by less than bf16 resolves.

        Raises:
            ValueError: wrong shape or dtype of images.
        """
        self._check_images(images)
        return widened(self._encoded(images))

    def _image_of(
        self,
        quantized: Tensor,  # [B, D, h, w]
    ) -> Tensor:  # [B, C, H, W]
        return self._decoded(quantized.to(next(self.decoder.parameters()).dtype))

    def forward(
        self,
        images: Tensor,  # [B, C, H, W] in [-1, 1]
    ) -> TokenizerOutput:
        """Reconstructs images; in training mode the codebook learns from them as well.

        Args:
            images: [B, in_channels, H, W] floats in [-1, 1], H and W multiples of `factor`.

        Returns:
            reconstruction [B, out_channels, H, W] (not clamped, differentiable) and the quantizer's output.

        Raises:
            ValueError: wrong shape or dtype of images.
        """
        out = self.quantizer(self.tokens(images))
        return TokenizerOutput(self._image_of(out.quantized), out)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,  # [B, C, H, W] in [-1, 1]
    ) -> Tensor:  # [B, h, w]
        """Codes int64 [B, H / factor, W / factor] of images; changes nothing in the model, not differentiable."""
        return self.quantizer.encode(self.tokens(images))

    def decode(
        self,
        codes: Tensor,  # [B, h, w]
    ) -> Tensor:  # [B, C, h * factor, w * factor]
        """Images of codes, clamped to [-1, 1].

        Raises:
            ValueError: codes that are not integers of shape [B, h, w], or out of range.
        """
        codes = check_codes(codes, self.config.quantizer.codebook_size)
        return widened(self._image_of(self.quantizer.lookup(codes))).clamp(-1, 1)

    @property
    def maps(self) -> dict[str, CodeMap]:
        """The maps of codes by name: this one."""
        return {"codes": CodeMap(self.quantizer, self.factor)}
