"""Published models as configs, each with what its authors report and what was measured here. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .config import CONFIG_FOLDER, VQGANConfig, load_config
from .config_reader import convert
from .model_config import ModelConfig

KINDS = ("vqgan", "vit", "klvae")  # of models with presets: the folders in configs/


@dataclass
class Preset:
    """A published model: models/configs/KIND/NAME.yaml."""

    source: str
    """Who published it, and what it was trained on."""
    published: str
    """The figures that its authors report."""
    here: str
    """What this package measured with it."""
    model: ModelConfig = field(default_factory=VQGANConfig)
    """The shape of the network and its bottleneck."""

    def __post_init__(self) -> None:
        if isinstance(self.model, dict):
            self.model = convert(self.model, ModelConfig, "model")


def _files(kinds: tuple[str, ...]) -> dict[str, Path]:
    return {file.stem: file for kind in kinds for file in (CONFIG_FOLDER / kind).glob("*.yaml")}


def preset_names(kind: str | None = None) -> list[str]:
    """The bundled presets by name: of one kind of model ("vqgan" and so on), or all."""
    return sorted(_files(KINDS if kind is None else (kind,)))


def load_preset(name: str) -> Preset:
    """A bundled preset: `make_model(load_preset("f16-1024").model)` is that network with new weights.

    Raises:
        FileNotFoundError: no preset of that name; lists them.
    """
    files = _files(KINDS)
    if name not in files:
        raise FileNotFoundError(f"preset {name!r} does not exist; expected one of {', '.join(sorted(files))}")
    return load_config(files[name], Preset)
