"""GAN: images out of noise (Goodfellow et al. 2014), VQGAN's decoder being the generator.

It is trained by the loop of the other models: the discriminator's opinion is all that weighs, and the images of a batch
give it what is real, and the size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .autoencoder import Decoder
from .config_reader import from_dict
from .continuous_config import GANConfig
from .image_model import ImageModel
from .layers import check_latents, widened
from .noise import Noise

__all__ = ["GAN", "GANConfig", "GANOutput"]

MODEL_CARD = """---
{{ card_data }}
---

A generator of images of the package vqkernels.

```python
from vqkernels.models import GAN

model = GAN.from_pretrained("this folder, or its name on the Hub")
images = model.generate(4, seed=0)  # floats [4, out_channels, H, W] in [-1, 1]
```
"""


class GANOutput(NamedTuple):
    """What model(images) returns."""

    reconstruction: Tensor  # [B, C, H, W] generated, of the images' size but not of them; not clamped; differentiable
    loss: Tensor  # [] 0


class GAN(
    ImageModel,
    model_card_template=MODEL_CARD,
    pipeline_tag="unconditional-image-generation",
):
    """A decoder of latents that are drawn from N(0, 1).

    Latents are [B, latent_channels, h, w], images [B, out_channels, h * factor, w * factor].

    Args:
        config: the shape of the model; a plain dict of the same options is taken too.

    Raises:
        ValueError: an option of the config is unknown or out of range.
    """

    config_type = GANConfig
    config: GANConfig
    figure_names = ()
    reconstructs = False

    def __init__(self, config: GANConfig | None = None) -> None:
        super().__init__()
        self.config = from_dict(GANConfig, {} if config is None else config)
        self.noise = Noise()
        self.decoder = Decoder(self.config)

    def figures(
        self,
        out: GANOutput,
    ) -> tuple[Tensor, ...]:
        """None."""
        return ()

    def forward(
        self,
        images: Tensor,  # [B, C, H, W] in [-1, 1]
    ) -> GANOutput:
        """As many generated images, of the same size; every call draws new latents.

        Raises:
            ValueError: wrong shape or dtype of images.
        """
        self._check_images(images)
        batch, height, width = images.shape[0], *(side // self.factor for side in images.shape[2:])
        latents = self.noise((batch, self.config.latent_channels, height, width))
        return GANOutput(self.decoder(latents.to(self.last_layer.weight.dtype)), latents.new_zeros(()))

    @torch.no_grad()
    def generate(
        self,
        count: int,
        seed: int = 0,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:  # [count, C, height, width]
        """Images in [-1, 1]; the same latents for a seed on every device, and the first ones for every count.

        Args:
            count: how many.
            seed: of the latents.
            height, width: of the images in pixels, multiples of `factor`; the config's resolution when None.

        Raises:
            ValueError: no image is asked for, or a size that is no multiple of `factor`.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        sides = [self.config.resolution if side is None else side for side in (height, width)]
        for name, side in zip(("height", "width"), sides, strict=True):
            if side < 1 or side % self.factor:
                raise ValueError(f"{name} must be a positive multiple of the model's factor {self.factor}, got {side}")
        shape = self.config.latent_channels, *(side // self.factor for side in sides)
        generator = torch.Generator().manual_seed(seed)
        latents = torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])
        return self.decode(latents.to(self.last_layer.weight.device))

    def decode(
        self,
        latents: Tensor,  # [B, latent_channels, h, w]
    ) -> Tensor:  # [B, C, h * factor, w * factor]
        """Images of latents, clamped to [-1, 1]; differentiable.

        Raises:
            ValueError: wrong shape or dtype of latents.
        """
        check_latents(latents, self.config.latent_channels)
        return widened(self.decoder(latents.to(self.last_layer.weight.dtype))).clamp(-1, 1)

    def reconstruct(
        self,
        images: Tensor,  # [B, C, H, W]
    ) -> Tensor:
        """Refused.

        Raises:
            TypeError: always: it has no encoder.
        """
        raise TypeError("a GAN only generates images: it has no encoder, so it cannot reconstruct one")
