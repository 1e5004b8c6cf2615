"""A model's codes map by map, as pictures, figures, files and commands look at them: one map, or one for each level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .image_model import ImageModel
from .metrics import BitsPerPixel, CodeUsage, bits_per_pixel, code_usage
from .quantizer import Quantizer, code_table


@dataclass(frozen=True)
class CodeLevel:
    """The codes of some images at one level of a model."""

    name: str  # codes, or top and bottom
    codes: Tensor  # int64 [B, h, w], on the CPU
    codebook_size: int
    factor: int  # image pixels per code, each way
    places: Tensor  # int64 [B, h, w] the codes as rows of the table
    table: Tensor  # [K, D] the codebook, or where there is none the vectors of the codes that occur

    @property
    def usage(self) -> CodeUsage:
        """How these codes use their codebook."""
        return code_usage(self.codes, self.codebook_size)

    @property
    def bits_per_pixel(self) -> BitsPerPixel:
        """What they need."""
        return bits_per_pixel(self.codes, self.codebook_size, self.factor)

    def described(self) -> str:
        """A few words for a caption."""
        height, width = self.codes.shape[1:]
        return f"{width} x {height}, {self.usage.used} of {self.codebook_size} used"


class CodeMap(NamedTuple):
    """Where the codes of a level come from."""

    quantizer: Quantizer
    factor: int  # image pixels per code, each way


def make_levels(
    maps: dict[str, CodeMap],
    codes: Sequence[Tensor],  # int64 [B, h, w] each
) -> list[CodeLevel]:
    """The codes of some images, level by level, in the order of a model's maps."""
    levels = []
    for (name, (quantizer, factor)), each in zip(maps.items(), codes, strict=True):
        places, table = code_table(quantizer, each)
        levels.append(CodeLevel(name, each.cpu(), quantizer.codebook_size, factor, places, table))
    return levels


def total_bits(levels: Sequence[CodeLevel]) -> BitsPerPixel:
    """Bits per pixel of all levels together."""
    each = [level.bits_per_pixel for level in levels]
    return BitsPerPixel(sum(bits.fixed for bits in each), sum(bits.entropy for bits in each))


class CodedModel(ImageModel):
    """Base of the models whose latents are codes: one map of them, or one for each level.

    A subclass names its maps in `maps`; `encode` gives their codes in that order, `decode` takes them so.
    """

    @property
    def maps(self) -> dict[str, CodeMap]:
        """The maps of codes by name."""
        raise NotImplementedError

    def encode(
        self,
        images: Tensor,  # [B, C, H, W] in [-1, 1]
    ) -> Any:  # int64 [B, h, w], or a tuple with one of each map
        """Codes of images; changes nothing in the model, not differentiable."""
        raise NotImplementedError

    def decode(
        self,
        codes: Any,  # as of `encode`
    ) -> Tensor:  # [B, C, H, W]
        """Images of codes, clamped to [-1, 1]."""
        raise NotImplementedError

    def levels(
        self,
        codes: Tensor | Sequence[Tensor],  # [B, h, w], or one of each map
    ) -> list[CodeLevel]:
        """What pictures and figures look at: the codes of `encode`, map by map."""
        return make_levels(self.maps, [codes] if isinstance(codes, Tensor) else codes)
