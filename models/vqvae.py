"""VQVAE: images to codes and back (van den Oord et al. 2017, Neural Discrete Representation Learning)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from vqkernels._dtypes import HALF
from vqkernels.nn import QuantizerOutput, VectorQuantizer

from .config import QuantizerConfig, VQVAEConfig, from_dict
from .layers import Fold, ResidualBlock, Unfold

__all__ = ["VQVAE", "QuantizerConfig", "VQVAEConfig", "VQVAEOutput"]

IMAGE_CHANNELS = 3

MODEL_CARD = """---
{{ card_data }}
---

A VQ-VAE of the package vqkernels. Images are floats [B, 3, H, W] in [-1, 1].

```python
from vqkernels.models import VQVAE

model = VQVAE.from_pretrained("this folder, or its name on the Hub")
codes = model.encode(images)
images = model.decode(codes)
```
"""


class VQVAEOutput(NamedTuple):
    """What VQVAE(images) returns."""

    reconstruction: Tensor  # [B, 3, H, W], not clamped; differentiable
    quantizer: QuantizerOutput  # codes [B, h, w], losses and usage


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


def _quantizer(config: VQVAEConfig) -> VectorQuantizer:
    options = asdict(config.quantizer)
    if config.quantizer.update == "gradient":  # revival places codes by their moving averages
        options["dead_code_threshold"] = 0.0
    return VectorQuantizer(config.latent_channels, options.pop("codebook_size"), channels="first", **options)


class VQVAE(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="vqkernels",
    model_card_template=MODEL_CARD,
    pipeline_tag="image-to-image",
):
    """A convolutional autoencoder with a vector quantizer in the middle.

    Images are [B, 3, H, W] floats in [-1, 1], H and W any multiples of `factor`; codes are int64
    [B, H / factor, W / factor]. The network has no positions and no attention, so any size works.

    Args:
        config: the shape of the model; a plain dict of the same options is taken too.

    Raises:
        ValueError: an option of the config is unknown or out of range.
    """

    def __init__(self, config: VQVAEConfig | None = None) -> None:
        super().__init__()
        self.config = from_dict(VQVAEConfig, {} if config is None else config)
        self.encoder = _encoder(self.config)
        self.quantizer = _quantizer(self.config)
        self.decoder = _decoder(self.config)

    @property
    def factor(self) -> int:
        """Image pixels per code, each way."""
        return self.config.factor

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution; after it pixels only change places."""
        layer = self.decoder[-2]
        assert isinstance(layer, nn.Conv2d)
        return layer

    def _check_images(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> None:
        if images.dim() != 4 or images.shape[1] != IMAGE_CHANNELS:
            raise ValueError(f"images must have shape [B, {IMAGE_CHANNELS}, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}")
        if images.shape[2] % self.factor or images.shape[3] % self.factor or 0 in images.shape[2:]:
            raise ValueError(
                f"height and width of images must be positive multiples of the model's factor {self.factor}, "
                f"got {images.shape[2]}x{images.shape[3]}"
            )

    def _tokens(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, latent_channels, h, w]
        """At least float32, also under autocast: neighbouring codes differ by less than bf16 resolves."""
        self._check_images(images)
        tokens = self.encoder(images)
        return tokens.float() if tokens.dtype in HALF else tokens

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> VQVAEOutput:
        """Reconstructs images; in training mode the codebook learns from them as well.

        Args:
            images: [B, 3, H, W] floats in [-1, 1], H and W multiples of `factor`.

        Returns:
            reconstruction [B, 3, H, W] (not clamped, differentiable) and the quantizer's output.

        Raises:
            ValueError: wrong shape or dtype of images.
        """
        out = self.quantizer(self._tokens(images))
        return VQVAEOutput(self.decoder(out.quantized), out)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> Tensor:  # [B, h, w]
        """Codes int64 [B, H / factor, W / factor] of images; changes nothing in the model, not differentiable."""
        was_training = self.quantizer.training
        self.quantizer.eval()
        try:
            return self.quantizer(self._tokens(images)).codes
        finally:
            self.quantizer.train(was_training)

    def decode(
        self,
        codes: Tensor,  # [B, h, w]
    ) -> Tensor:  # [B, 3, h * factor, w * factor]
        """Images of codes, clamped to [-1, 1].

        Raises:
            ValueError: codes that are not integers of shape [B, h, w], or out of range.
        """
        size = self.config.quantizer.codebook_size
        if codes.dim() != 3 or codes.is_floating_point() or codes.dtype is torch.bool:
            raise ValueError(f"codes must be integers of shape [B, h, w], got {codes.dtype} {list(codes.shape)}")
        codes = codes.long()
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(f"codes must lie in [0, {size - 1}], got {int(codes.min())} to {int(codes.max())}")
        return self.decoder(self.quantizer.lookup(codes)).float().clamp(-1, 1)

    def fingerprint(self) -> str:
        """32 hex digits that change with the config or any weight or code; the same on every device.

        Statistics that do not touch the result (moving averages, usage windows) are left out.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        tensors = {**dict(self.named_parameters()), "quantizer.codebook": self.quantizer.codebook}
        for name in sorted(tensors):
            values = tensors[name].detach().cpu()
            digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
            digest.update(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str = "cpu",
    ) -> VQVAE:
        """Loads a model that save_pretrained wrote, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder of save_pretrained or of a training run, or `owner/name` on the
                Hugging Face Hub.
            revision, cache_dir, local_files_only, token: for the Hub only.
            map_location: device of the loaded weights.

        Raises:
            FileNotFoundError: there is no such folder, or no model in it.
            ValueError: the weights do not belong to the config beside them.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(name)
        if folder.is_dir():
            is_run = not (folder / "config.json").exists() and (folder / "model").is_dir()
            return cls._from_folder(folder / "model" if is_run else folder, map_location)
        looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or folder.parent.is_dir()
        if looks_local:
            raise FileNotFoundError(f"model {name!r} is neither a folder nor the name of a model on the Hub")
        return super().from_pretrained(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            map_location=map_location,
        )

    @classmethod
    def _from_folder(cls, folder: Path, map_location: str) -> VQVAE:
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"model folder {str(folder)!r} has no {file}")
        try:
            model = cls(from_dict(VQVAEConfig, json.loads((folder / "config.json").read_text(encoding="utf-8"))))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'} is not the config of a VQVAE: {error}") from error
        return cls._load_as_safetensor(model, str(folder / "model.safetensors"), map_location, strict=True)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Strict, whatever huggingface_hub asks for: a missing weight would stay random without a word."""
        import safetensors.torch

        try:
            safetensors.torch.load_model(model, model_file, strict=True, device=map_location)
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{model_file} does not fit the config beside it: {error}") from error
        return model.eval()
