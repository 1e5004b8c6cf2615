"""Models on top of the quantizers and beside them, their data, the training loop and code files.

Names are loaded when they are first used, so that what needs no torch (the configs) stays quick to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint
    from .code_files import CodesFile, CodesMeta, CodesWriter, open_codes
    from .config import TrainConfig, load_config, save_config
    from .continuous_config import GANConfig, KLVAEConfig
    from .convert import Converted, load_foreign, save_diffusers
    from .data import ImageFolder, bundled_photographs, held_out_photograph, list_images, load_image
    from .evaluation import evaluate_files
    from .evaluation_report import EvaluationOptions, EvaluationReport
    from .finite_guard import NonFiniteLossError
    from .gan import GAN, GANOutput
    from .hierarchy import HierarchicalCodes, HierarchicalOutput, HierarchicalVQVAE
    from .image_model import ImageModel, ModelOutput
    from .kl_vae import KLVAE, KLVAEOutput, Posterior
    from .model_config import HierarchicalVQVAEConfig, ViTConfig, VQGANConfig, VQVAEConfig
    from .presets import Preset, load_preset, preset_names
    from .pretrained import load_pretrained, make_model
    from .quantizer_config import (
        EntropyConfig,
        LookupFreeConfig,
        QuantizerConfig,
        VectorQuantizerConfig,
    )
    from .tokenizer import ImageTokenizer
    from .training import TrainProgress, TrainResult, train
    from .validation import Evaluation, evaluate
    from .vit import ViTTokenizer
    from .vqgan import VQGAN, VQGANOutput
    from .vqvae import VQVAE, VQVAEOutput

_HOMES = {
    "checkpoint": ("load_checkpoint",),
    "code_files": ("CodesFile", "CodesMeta", "CodesWriter", "open_codes"),
    "config": ("TrainConfig", "load_config", "save_config"),
    "continuous_config": ("GANConfig", "KLVAEConfig"),
    "convert": ("Converted", "load_foreign", "save_diffusers"),
    "data": ("ImageFolder", "bundled_photographs", "held_out_photograph", "list_images", "load_image"),
    "gan": ("GAN", "GANOutput"),
    "hierarchy": ("HierarchicalCodes", "HierarchicalOutput", "HierarchicalVQVAE"),
    "image_model": ("ImageModel", "ModelOutput"),
    "kl_vae": ("KLVAE", "KLVAEOutput", "Posterior"),
    "model_config": ("HierarchicalVQVAEConfig", "ViTConfig", "VQGANConfig", "VQVAEConfig"),
    "presets": ("Preset", "load_preset", "preset_names"),
    "quantizer_config": (
        "EntropyConfig",
        "LookupFreeConfig",
        "QuantizerConfig",
        "VectorQuantizerConfig",
    ),
    "pretrained": ("load_pretrained", "make_model"),
    "tokenizer": ("ImageTokenizer",),
    "evaluation": ("evaluate_files",),
    "evaluation_report": ("EvaluationOptions", "EvaluationReport"),
    "finite_guard": ("NonFiniteLossError",),
    "training": ("TrainProgress", "TrainResult", "train"),
    "validation": ("Evaluation", "evaluate"),
    "vit": ("ViTTokenizer",),
    "vqgan": ("VQGAN", "VQGANOutput"),
    "vqvae": ("VQVAE", "VQVAEOutput"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "GAN",
    "KLVAE",
    "VQGAN",
    "VQVAE",
    "CodesFile",
    "CodesMeta",
    "CodesWriter",
    "Converted",
    "EntropyConfig",
    "Evaluation",
    "EvaluationOptions",
    "EvaluationReport",
    "GANConfig",
    "GANOutput",
    "HierarchicalCodes",
    "HierarchicalOutput",
    "HierarchicalVQVAE",
    "HierarchicalVQVAEConfig",
    "ImageFolder",
    "ImageModel",
    "ImageTokenizer",
    "KLVAEConfig",
    "KLVAEOutput",
    "LookupFreeConfig",
    "ModelOutput",
    "NonFiniteLossError",
    "Posterior",
    "Preset",
    "QuantizerConfig",
    "TrainConfig",
    "TrainProgress",
    "TrainResult",
    "VQGANConfig",
    "VQGANOutput",
    "VQVAEConfig",
    "VQVAEOutput",
    "VectorQuantizerConfig",
    "ViTConfig",
    "ViTTokenizer",
    "bundled_photographs",
    "evaluate",
    "evaluate_files",
    "held_out_photograph",
    "list_images",
    "load_checkpoint",
    "load_config",
    "load_foreign",
    "load_image",
    "load_preset",
    "load_pretrained",
    "make_model",
    "open_codes",
    "preset_names",
    "save_config",
    "save_diffusers",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
