"""The published VQGANs as configs, each with what its authors report and what was measured here. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from .config import CONFIG_FOLDER, VQGANConfig, from_dict, load_config

PRESETS = CONFIG_FOLDER / "vqgan"


@dataclass
class VQGANPreset:
    """A published model: models/configs/vqgan/NAME.yaml."""

    source: str
    """Who published it, and what it was trained on."""
    published: str
    """The figures that its authors report."""
    here: str
    """What this package measured with it."""
    model: VQGANConfig = field(default_factory=VQGANConfig)
    """The shape of the network and its quantizer."""

    def __post_init__(self) -> None:
        if isinstance(self.model, dict):
            self.model = from_dict(VQGANConfig, self.model, "model")


def preset_names() -> list[str]:
    """The bundled presets by name."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> VQGANPreset:
    """A bundled preset: `VQGAN(load_preset("f16-1024").model)` is that network with new weights.

    Raises:
        FileNotFoundError: no preset of that name; lists them.
    """
    if name not in preset_names():
        raise FileNotFoundError(f"preset {name!r} does not exist; expected one of {', '.join(preset_names())}")
    return load_config(PRESETS / f"{name}.yaml", VQGANPreset)
