"""What every image tokenizer here has in common: images to codes and back, saved to and loaded from folders."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from vqkernels.nn import IndexPropagationQuantizer, QuantizerOutput, VectorQuantizer

from .config import QuantizerConfig, from_dict
from .layers import widened

Model = TypeVar("Model", bound="ImageTokenizer")

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

MODEL_CARD = """---
{{ card_data }}
---

A %(kind)s of the package vqkernels. Images are floats [B, %(channels)s, H, W] in [-1, 1].

```python
from vqkernels.models import %(name)s

model = %(name)s.from_pretrained("this folder, or its name on the Hub")
codes = model.encode(images)
images = model.decode(codes)
```
"""


class TokenizerConfig(Protocol):
    """What the base class needs of a model's config, a dataclass."""

    quantizer: QuantizerConfig

    @property
    def factor(self) -> int: ...


class TokenizerOutput(NamedTuple):
    """What model(images) returns."""

    reconstruction: Tensor  # [B, C, H, W], not clamped; differentiable
    quantizer: QuantizerOutput  # codes [B, h, w], losses and usage


Quantizer: TypeAlias = VectorQuantizer | IndexPropagationQuantizer


def make_quantizer(config: QuantizerConfig, dim: int, codebook_dim: int | None) -> Quantizer:
    """The quantizer of a channels-first map of `dim` channels."""
    if config.gradient == "index_propagation":
        return IndexPropagationQuantizer(
            dim,
            config.codebook_size,
            codebook_dim=codebook_dim,
            metric=config.metric,
            channels="first",
            commitment_weight=config.commitment_weight,
            codebook_weight=config.codebook_weight,
        )
    options = {**asdict(config), "codebook_dim": codebook_dim}
    if config.update == "gradient":  # revival places codes by their moving averages
        options["dead_code_threshold"] = 0.0
    return VectorQuantizer(dim, options.pop("codebook_size"), channels="first", **options)


class ImageTokenizer(nn.Module, PyTorchModelHubMixin, library_name="vqkernels", pipeline_tag="image-to-image"):
    """Base of the models: encoder, quantizer, decoder.

    Images are [B, in_channels, H, W] floats in [-1, 1], H and W any multiples of `factor`; codes are int64
    [B, H / factor, W / factor]. A subclass makes `config`, `encoder`, `quantizer` and `decoder` and says what lies
    between them in `_encoded` and `_decoded`.
    """

    config_type: ClassVar[type]
    config: TokenizerConfig
    encoder: nn.Module
    quantizer: Quantizer
    decoder: nn.Module

    @property
    def factor(self) -> int:
        """Image pixels per code, each way."""
        return self.config.factor

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return 3

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

    def _check_images(
        self,
        images: Tensor,  # [B, C, H, W]
    ) -> None:
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must have shape [B, {self.in_channels}, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}")
        if images.shape[2] % self.factor or images.shape[3] % self.factor or 0 in images.shape[2:]:
            raise ValueError(
                f"height and width of images must be positive multiples of the model's factor {self.factor}, "
                f"got {images.shape[2]}x{images.shape[3]}"
            )

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
        size = self.config.quantizer.codebook_size
        if codes.dim() != 3 or codes.is_floating_point() or codes.dtype is torch.bool:
            raise ValueError(f"codes must be integers of shape [B, h, w], got {codes.dtype} {list(codes.shape)}")
        codes = codes.long()
        looking = not torch.compiler.is_compiling() and codes.numel()  # a graph cannot; lookup complains when it runs
        if looking and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(f"codes must lie in [0, {size - 1}], got {int(codes.min())} to {int(codes.max())}")
        return widened(self._image_of(self.quantizer.lookup(codes))).clamp(-1, 1)

    def fingerprint(self) -> str:
        """32 hex digits that change with the config or any weight or code; the same on every device.

        Statistics that do not touch the result (moving averages, usage windows) are left out.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())  # type: ignore[call-overload]
        tensors = {**dict(self.named_parameters()), "quantizer.codebook": self.quantizer.codebook}
        for name in sorted(tensors):
            values = tensors[name].detach().cpu()
            digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
            digest.update(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[Model],
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str = "cpu",
    ) -> Model:
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
            is_run = not (folder / CONFIG_FILE).exists() and (folder / "model").is_dir()
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
    def _from_folder(cls: type[Model], folder: Path, map_location: str) -> Model:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"model folder {str(folder)!r} has no {file}")
        try:
            config: Any = from_dict(cls.config_type, json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE} is not the config of a {cls.__name__}: {error}") from error
        model = cls(config)  # type: ignore[call-arg]
        return cls._load_as_safetensor(model, str(folder / WEIGHTS_FILE), map_location, strict=True)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Strict, whatever huggingface_hub asks for: a missing weight would stay random without a word."""
        import safetensors.torch

        try:
            safetensors.torch.load_model(model, model_file, strict=True, device=map_location)
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{model_file} does not fit the config beside it: {error}") from error
        return model.eval()
