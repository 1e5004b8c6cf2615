"""A saved model whatever its kind: the config beside the weights says which class it is."""

from __future__ import annotations

import json
from pathlib import Path

from .gan import GAN
from .hierarchy import HierarchicalVQVAE
from .image_model import CONFIG_FILE, ImageModel, model_folder
from .kl_vae import KLVAE
from .model_config import ModelConfig
from .vit import ViTTokenizer
from .vqgan import VQGAN
from .vqvae import VQVAE

MODELS: dict[str, type[ImageModel]] = {
    "vqvae": VQVAE,
    "vqgan": VQGAN,
    "vqvae2": HierarchicalVQVAE,
    "vit": ViTTokenizer,
    "klvae": KLVAE,
    "gan": GAN,
}


def make_model(config: ModelConfig) -> ImageModel:
    """A new model of the config's kind, with random weights."""
    return MODELS[config.kind](config)  # type: ignore[call-arg]


def _kind(config: Path) -> type[ImageModel]:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not the config of a model: {error}") from error
    # a VQVAE's has none: it was the only model
    kind = values.get("kind", "vqvae") if isinstance(values, dict) else None
    if kind not in MODELS:
        raise ValueError(f"{config}: kind: expected one of {', '.join(MODELS)}, got {kind!r}")
    return MODELS[kind]


def load_pretrained(name: str | Path) -> ImageModel:
    """The model of a folder of save_pretrained, of a run folder, or of `owner/name` on the Hugging Face Hub.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: the files there are not those of a model of this package.
    """
    folder = Path(name)
    if folder.is_dir():
        inner = model_folder(folder)
        config = inner / CONFIG_FILE
        return (_kind(config) if config.is_file() else VQVAE).from_pretrained(inner)
    if str(name).count("/") != 1 or folder.parent.is_dir():
        return VQVAE.from_pretrained(name)  # which says that there is no such folder
    from huggingface_hub import hf_hub_download

    return _kind(Path(hf_hub_download(str(name), CONFIG_FILE))).from_pretrained(name)
