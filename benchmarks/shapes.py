"""Problem sizes: N tokens, K codes, D dim; by number, or by the model that has them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One problem size."""

    tokens: int
    codes: int
    dim: int
    name: str = ""

    def __str__(self) -> str:
        sizes = f"{self.tokens},{self.codes},{self.dim}"
        return f"{sizes} ({self.name})" if self.name else sizes


# K and D are the models'; N is a batch such as they train with.
NAMED = {
    shape.name: shape
    for shape in (
        Shape(4096, 1024, 256, "vqgan-1024"),  # 16 images of 256 px, one token per 16 x 16 pixels
        Shape(4096, 16384, 256, "vqgan-16384"),
        Shape(4096, 16384, 8, "llamagen"),
        Shape(4096, 262144, 18, "open-magvit2"),
        Shape(1024, 262144, 256, "ibq"),  # its published batch: 4 images a device
        Shape(5440, 4096, 32, "var"),  # 8 images of 680 tokens over ten scales
        Shape(4096, 4096, 12, "titok"),
        Shape(4800, 1024, 128, "encodec"),  # 64 clips of one second at 75 Hz
        Shape(5504, 1024, 8, "dac"),  # 64 clips of one second at 86 Hz
        Shape(65536, 512, 64, "kmeans"),
    )
}


def parse_shape(text: str) -> Shape:
    """``"4096,1024,256"`` or the name of a model's shape.

    Raises:
        ValueError: neither three positive integers nor a known name.
    """
    if text in NAMED:
        return NAMED[text]
    try:
        sizes = [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"shape: expected N,K,D (three positive integers) or one of {', '.join(NAMED)}; got {text!r}")
    tokens, codes, dim = sizes
    return Shape(tokens, codes, dim)
