"""What the image models have in common: a config, reconstructions, losses, saving to and loading from folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from vqkernels.nn import Codebook
from vqkernels.nn.health import mean_length

from .config_reader import from_dict, lasting_options

Model = TypeVar("Model", bound="ImageModel")

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


def model_folder(folder: Path) -> Path:
    """Where the model of a folder lies: in itself, or in the `model` of a training run."""
    is_run = not (folder / CONFIG_FILE).is_file() and (folder / "model").is_dir()
    return folder / "model" if is_run else folder


class ImageConfig(Protocol):
    """What the base class needs of a model's config, a dataclass."""

    @property
    def factor(self) -> int: ...


class ModelOutput(Protocol):
    """What model(images) returns; training reads it, and `figures` of the model that made it."""

    @property
    def reconstruction(self) -> Tensor: ...  # [B, C, H, W], not clamped; differentiable

    @property
    def loss(self) -> Tensor: ...  # [] what the bottleneck adds to the loss; differentiable


class ImageModel(nn.Module, PyTorchModelHubMixin, library_name="vqkernels", pipeline_tag="image-to-image"):
    """Base of the models: images [B, in_channels, H, W] in [-1, 1] to reconstructions of the same size.

    H and W are any multiples of `factor`. A subclass sets `config_type` and `figure_names`, makes `config` and
    `decoder` and says in `forward`, `figures`, `encode` and `decode` what it is; in `last_layer` and `reconstruct` too
    where they are not as here.
    """

    config_type: ClassVar[type]
    reconstructs: ClassVar[bool] = True  # False where model(images) makes other images of that size, as a GAN does
    config: Any

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, each way."""
        return int(self.config.factor)

    @property
    def in_channels(self) -> int:
        """Channels of an image: 3 where the config leaves no choice."""
        return int(getattr(self.config, "in_channels", 3))

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution, at which adversarial training balances its losses."""
        return self.decoder.conv_out  # type: ignore[union-attr,return-value]

    @property
    def figure_names(self) -> tuple[str, ...]:
        """Of what `figures` returns, as the training log names them."""
        raise NotImplementedError

    def figures(
        self,
        out: Any,
    ) -> tuple[Tensor, ...]:  # [] each
        """What the training log tells of the bottleneck, as `figure_names`: device scalars of one forward's output."""
        raise NotImplementedError

    def decays(
        self,
        name: str,
        weight: Tensor,  # [...]
    ) -> bool:
        """Whether weight decay takes this parameter: kernels of convolutions, not norms, biases and codebooks."""
        return weight.dim() == 4

    def reconstruct(
        self,
        images: Tensor,  # [B, C, H, W] in [-1, 1]
    ) -> Tensor:  # [B, C, H, W]
        """Images through codes or latents and back, clamped to [-1, 1]; changes nothing, not differentiable."""
        with torch.no_grad():
            return self.decode(self.encode(images))  # type: ignore[operator]

    def update_codebooks(self) -> None:
        """Applies what the codebooks have collected in training forwards."""
        for module in self.modules():
            if isinstance(module, Codebook):
                module.update_codebook()

    def discard_codebook_updates(self) -> None:
        """Forgets what the codebooks have collected since their last update, as for a step that is left out."""
        for module in self.modules():
            if isinstance(module, Codebook):
                module.discard_update()

    def health(self) -> dict[str, Tensor]:  # [] each
        """Share of dead codes (see `vqkernels.nn.CodebookHealth`) and mean length of the codes, whose drift tells of a
        codebook that runs away; by the quantizer's name where there are several."""
        found = {name: module for name, module in self.named_modules() if isinstance(module, Codebook)}
        figures: dict[str, Tensor] = {}
        for name, module in found.items():
            prefix = "" if len(found) == 1 else f"{name}."
            figures[f"{prefix}dead_share"] = module.health().dead_share
            figures[f"{prefix}code_length"] = mean_length(module.codebook.detach())
        return figures

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

    def fingerprint(self) -> str:
        """32 hex digits that change with the config or any weight or code; the same on every device.

        Statistics that do not touch the result (moving averages, usage windows) are left out.
        """
        digest = hashlib.sha256(json.dumps(lasting_options(self.config), sort_keys=True).encode())
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        tensors |= {name: values for name, values in self.named_buffers() if name.endswith("quantizer.codebook")}
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
            return cls._from_folder(model_folder(folder), map_location)
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
