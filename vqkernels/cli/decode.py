"""`vqkernels decode`: codes back to PNG images, with the model that made them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from vqkernels.models import CodesFile, open_codes
from vqkernels.models.code_files import level_folders
from vqkernels.models.data import to_picture
from vqkernels.models.levels import CodedModel

from .loading import choose_device, load_coded
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


def _open_levels(path: str, model: CodedModel) -> list[CodesFile]:
    """The codes of every level.

    Raises:
        ValueError: the codes are another model's, out of range, or the levels are not of the same images.
    """
    opened = [open_codes(folder, model) for folder in level_folders(path, model).values()]
    for name, each in zip(model.maps, opened, strict=True):
        if each.meta.files != opened[0].meta.files:
            raise ValueError(f"{path}: expected {name} codes of the same images as {next(iter(model.maps))} codes")
    return opened


def run(config: DecodeConfig) -> None:
    """Writes one PNG per image of the codes.

    Raises:
        ValueError: the codes are another model's, or out of range.
    """
    if config.batch_size < 1:
        raise ValueError(f"--batch_size: expected at least 1, got {config.batch_size}")
    console, device = make_console(), choose_device(config.device)
    model, folder = load_coded(config.model, device), Path(config.output)
    opened = _open_levels(config.codes, model)
    taken: set[Path] = set()
    targets = [_target(folder, name, taken) for name in opened[0].meta.files]
    starts = range(0, len(targets), config.batch_size)
    with quiet_libraries():
        for start in tracked(console, starts, "decoding"):
            rows = slice(start, start + config.batch_size)
            maps = [torch.from_numpy(np.asarray(each.codes[rows], dtype=np.int64)).to(device) for each in opened]
            codes: Any = maps[0] if len(maps) == 1 else tuple(maps)
            with torch.no_grad():
                images = model.decode(codes)
            for image, target in zip(images, targets[rows], strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                to_picture(image).save(target)
    console.print(f"{len(targets)} images saved in {folder}/", markup=False)
