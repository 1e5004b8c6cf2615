"""`vqkernels encode`: a folder of images as codes.npy and meta.json, of a hierarchy one such folder for each level."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from vqkernels.models import CodesWriter, list_images, open_codes
from vqkernels.models.code_files import level_folders
from vqkernels.models.crops import batches
from vqkernels.models.data import centre_crop, open_image, to_tensor
from vqkernels.models.levels import CodedModel
from vqkernels.models.metrics import bits_per_pixel, code_usage
from vqkernels.models.validation import crop_to_multiple
from vqkernels.nn import frozen_codebook

from .loading import choose_device, load_coded, report_skipped
from .options import EncodeConfig
from .terminal import make_console, make_table, quiet_libraries, tracked


def _prepared(file: Path, image_size: int | None, factor: int) -> Tensor:  # [3, H, W] in [-1, 1]
    """The image scaled and cropped to a square, or at its own size but for the crop to multiples of the factor."""
    picture = open_image(file)
    if image_size is None:
        return crop_to_multiple(to_tensor(picture), factor)
    return to_tensor(centre_crop(picture, image_size))


class _Reader:
    """Images of one size, in the order of their names; what cannot be read is collected in `skipped`."""

    def __init__(self, config: EncodeConfig, factor: int) -> None:
        self.folder, self.image_size, self.factor = Path(config.folder), config.image_size, factor
        self.files = list_images(self.folder)
        self.skipped: list[tuple[Path, str]] = []
        self.size: torch.Size | None = None
        if not self.files:
            raise ValueError(f"{config.folder}: expected a folder with images, found none in it")

    def images(self, console: Console) -> Iterator[tuple[str, Tensor]]:  # name, [3, H, W]
        for file in tracked(console, self.files, "encoding"):
            try:
                image = _prepared(file, self.image_size, self.factor)
            except ValueError as error:
                self.skipped.append((file, str(error)))
                continue
            self._check_size(file, image)
            yield file.relative_to(self.folder).as_posix() if self.folder.is_dir() else file.name, image

    def _check_size(self, file: Path, image: Tensor) -> None:
        self.size = self.size or image.shape
        if image.shape != self.size:
            expected, got = (f"{shape[2]}x{shape[1]}" for shape in (self.size, image.shape))
            raise ValueError(f"{file}: expected {expected} pixels like the images before, got {got}; give --image_size")


def _check(config: EncodeConfig, model: CodedModel) -> None:
    if config.batch_size < 1:
        raise ValueError(f"--batch_size: expected at least 1, got {config.batch_size}")
    size = config.image_size
    if size is not None and (size < 1 or size % model.factor):
        raise ValueError(f"--image_size: expected a multiple of the model's factor {model.factor}, got {size}")


def _print_summary(console: Console, output: Path) -> None:
    opened = open_codes(output)
    meta = opened.meta
    usage = code_usage(opened.codes, meta.codebook_size)
    bits = bits_per_pixel(opened.codes, meta.codebook_size, meta.factor)
    pixels = len(opened) * meta.shape[1] * meta.shape[2] * meta.factor**2
    size = os.path.getsize(output / "codes.npy")
    rows = [
        ("images", f"{len(opened)}"),
        ("codes per image", f"{meta.shape[1]} x {meta.shape[2]}"),
        ("codes used", f"{usage.used} of {meta.codebook_size}"),
        ("perplexity", f"{usage.perplexity:.1f}"),
        ("bits per pixel", f"{bits.fixed:.3f} fixed, {bits.entropy:.3f} entropy coded"),
        ("codes.npy", f"{size / 1e6:.2f} MB of {meta.dtype}; the pixels are {3 * pixels / 1e6:.2f} MB"),
    ]
    console.print(make_table(f"Codes in {output}", ("what", "value"), rows, text_columns=2))


def run(config: EncodeConfig) -> None:
    """Writes the codes and prints what they amount to."""
    console, device = make_console(), choose_device(config.device)
    model = load_coded(config.model, device)
    _check(config, model)
    reader = _Reader(config, model.factor)
    folders = level_folders(config.output, model)
    with quiet_libraries(), frozen_codebook(model), ExitStack() as stack:
        writers = [stack.enter_context(CodesWriter(folder, model, name)) for name, folder in folders.items()]
        for names, images in batches(reader.images(console), config.batch_size):
            codes = model.encode(images.to(device))
            for writer, each in zip(writers, [codes] if isinstance(codes, Tensor) else codes, strict=True):
                writer.append(each, names)
        if reader.size is None:
            raise ValueError(f"none of the {len(reader.files)} images in {config.folder} can be read")
    report_skipped(console, reader.skipped)
    for folder in folders.values():
        _print_summary(console, folder)
