"""`vqkernels decode`: codes back to PNG images, with the model that made them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import torch

from vqkernels.models import open_codes
from vqkernels.models.data import to_picture

from .loading import choose_device, load_tokenizer
from .options import DecodeConfig
from .terminal import make_console, quiet_libraries, tracked


def _target(folder: Path, name: str, taken: set[Path]) -> Path:
    """Where an image goes: its name in the codes, as PNG, inside the folder, and not over another one.

    Raises:
        ValueError: the name leads out of the folder.
    """
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"meta.json: expected file names inside one folder, got {name!r}")
    path = folder / inside.with_suffix(".png")
    number = 1
    while path in taken:
        number += 1
        path = folder / inside.with_name(f"{inside.stem}-{number}.png")
    taken.add(path)
    return path


def run(config: DecodeConfig) -> None:
    """Writes one PNG per image of the codes.

    Raises:
        ValueError: the codes are another model's, or out of range.
    """
    if config.batch_size < 1:
        raise ValueError(f"--batch_size: expected at least 1, got {config.batch_size}")
    console, device = make_console(), choose_device(config.device)
    model, folder = load_tokenizer(config.model, device), Path(config.output)
    opened = open_codes(config.codes, model)
    taken: set[Path] = set()
    targets = [_target(folder, name, taken) for name in opened.meta.files]
    starts = range(0, len(opened), config.batch_size)
    with quiet_libraries():
        for start in tracked(console, starts, "decoding"):
            chunk = np.asarray(opened.codes[start : start + config.batch_size], dtype=np.int64)
            with torch.no_grad():
                images = model.decode(torch.from_numpy(chunk).to(device))
            for image, target in zip(images, targets[start : start + config.batch_size], strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                to_picture(image).save(target)
    console.print(f"{len(opened)} images saved in {folder}/", markup=False)
