"""Models on top of the quantizers: VQVAE, its data, its training loop and its code files.

Names are loaded when they are first used, so that what needs no torch (the configs) stays quick to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint
    from .code_files import CodesFile, CodesMeta, CodesWriter, open_codes
    from .config import QuantizerConfig, TrainConfig, VQVAEConfig, load_config, save_config
    from .data import ImageFolder, bundled_photographs, held_out_photograph, list_images, load_image
    from .training import NonFiniteLossError, TrainProgress, TrainResult, train
    from .validation import Evaluation, evaluate
    from .vqvae import VQVAE, VQVAEOutput

_HOMES = {
    "checkpoint": ("load_checkpoint",),
    "code_files": ("CodesFile", "CodesMeta", "CodesWriter", "open_codes"),
    "config": ("QuantizerConfig", "TrainConfig", "VQVAEConfig", "load_config", "save_config"),
    "data": ("ImageFolder", "bundled_photographs", "held_out_photograph", "list_images", "load_image"),
    "training": ("NonFiniteLossError", "TrainProgress", "TrainResult", "train"),
    "validation": ("Evaluation", "evaluate"),
    "vqvae": ("VQVAE", "VQVAEOutput"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "VQVAE",
    "CodesFile",
    "CodesMeta",
    "CodesWriter",
    "Evaluation",
    "ImageFolder",
    "NonFiniteLossError",
    "QuantizerConfig",
    "TrainConfig",
    "TrainProgress",
    "TrainResult",
    "VQVAEConfig",
    "VQVAEOutput",
    "bundled_photographs",
    "evaluate",
    "held_out_photograph",
    "list_images",
    "load_checkpoint",
    "load_config",
    "load_image",
    "open_codes",
    "save_config",
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
