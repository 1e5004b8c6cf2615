"""`vqkernels reconstruct`: images through a model and back, with their PSNR and SSIM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqkernels.models import ImageModel
from vqkernels.models.data import load_image, to_picture
from vqkernels.models.levels import CodedModel, CodeLevel, total_bits
from vqkernels.models.metrics import psnr, ssim
from vqkernels.models.pictures import comparison_of_maps, pairs
from vqkernels.models.similarity import WINDOW

from .loading import (
    choose_device,
    collect_images,
    fit_to_factor,
    load_model,
    output_names,
    report_skipped,
)
from .options import ReconstructConfig
from .terminal import make_console, make_table, quiet_libraries, tracked


class Score(NamedTuple):
    """How close a reconstruction is."""

    psnr: float  # dB
    ssim: float | None  # None where the image is smaller than SSIM's window


@dataclass(frozen=True)
class Reconstruction:
    """One image that went through a model."""

    image: Tensor  # [1, 3, H, W] in [-1, 1], as it was compared: after --fit crop, or as the file holds it
    reconstruction: Tensor  # [1, 3, H, W]
    levels: list[CodeLevel]  # its codes, [1, h, w] each; none of a model without codes
    note: str  # what was done to make its size fit

    def score(self) -> Score:
        """PSNR and SSIM over all pixels, not rounded to 8 bits."""
        similarity = None
        if min(self.image.shape[2:]) >= WINDOW:
            similarity = ssim(self.image, self.reconstruction).item()
        return Score(psnr(self.image, self.reconstruction).item(), similarity)


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"


@torch.no_grad()
def reconstruct_image(
    model: ImageModel,
    image: Tensor,  # [3, H, W] in [-1, 1]
    fit: str = "pad",
) -> Reconstruction:
    """Encodes and decodes one image of any size.

    Args:
        model: the model.
        image: the image.
        fit: "pad" repeats the border up to a multiple of the factor and cuts it off again; "crop" takes the middle.
    """
    device = next(model.parameters()).device
    fitted = fit_to_factor(image, model.factor, fit)
    if fitted.shape == image.shape:
        note = ""
    elif fit == "pad":
        note = f"{_size(image)} padded to {_size(fitted)} and cut back"
    else:
        note = f"{_size(image)} cropped to {_size(fitted)}"
    batch, levels = fitted[None].to(device), []
    if isinstance(model, CodedModel):
        codes: Any = model.encode(batch)
        decoded, levels = model.decode(codes).cpu(), model.levels(codes)
    else:
        decoded = model.reconstruct(batch).cpu()
    kept = image if fit == "pad" else fitted
    return Reconstruction(kept[None], decoded[:, :, : kept.shape[1], : kept.shape[2]], levels, note)


def _save(result: Reconstruction, score: Score, model: ImageModel, path: Path) -> None:
    """NAME.png is the reconstruction; NAME-comparison.png has the input and the code maps, if any, beside it."""
    to_picture(result.reconstruction[0]).save(path)
    pair = (result.image[0], result.reconstruction[0])
    image, decoded = (fit_to_factor(part, model.factor, "pad")[None] for part in pair)
    details = (_size(result.image), f"{score.psnr:.2f} dB", *(level.described() for level in result.levels))
    if result.levels:
        maps = [(level.name, level.places, level.table) for level in result.levels]
        picture = comparison_of_maps(image, decoded, maps, details=details)
    else:
        picture = pairs(image, decoded, details=details)
    picture.save(path.with_stem(f"{path.stem}-comparison"))


def _row(result: Reconstruction, score: Score, name: str) -> tuple[str, ...]:
    bits = f"{total_bits(result.levels).fixed:.3f}" if result.levels else "-"
    similarity = "-" if score.ssim is None else f"{score.ssim:.4f}"
    return name, result.note or _size(result.image), f"{score.psnr:.2f}", similarity, bits


def _mean_row(scores: list[Score]) -> tuple[str, ...]:
    similarities = [score.ssim for score in scores if score.ssim is not None]
    similarity = f"{sum(similarities) / len(similarities):.4f}" if similarities else "-"
    return f"mean of {len(scores)}", "", f"{sum(score.psnr for score in scores) / len(scores):.2f}", similarity, ""


def _targets(folder: Path, files: list[Path]) -> list[Path]:
    """Where each reconstruction goes.

    Raises:
        ValueError: one of them would overwrite an image that was given.
    """
    targets = [folder / f"{name}.png" for name in output_names(files)]
    given = {file.resolve() for file in files}
    for target in targets:
        if target.resolve() in given:
            raise ValueError(f"--output: expected another folder, as {target} would overwrite one of the images")
    return targets


def run(config: ReconstructConfig) -> None:
    """Saves a picture per image and prints the table."""
    console, device = make_console(), choose_device(config.device)
    model, files = load_model(config.model, device), collect_images(config.images)
    if not model.reconstructs:
        kind = type(model).__name__
        raise ValueError(
            f"{config.model}: expected a model that encodes images, got a {kind}, which only generates them"
        )
    jobs = list(zip(files, _targets(Path(config.output), files), strict=True))
    scores: list[Score] = []
    rows: list[tuple[str, ...]] = []
    skipped: list[tuple[Path, str]] = []
    with quiet_libraries():
        for file, target in tracked(console, jobs, "reconstructing"):
            try:
                image = load_image(file)
            except ValueError as error:
                skipped.append((file, str(error)))
                continue
            result = reconstruct_image(model, image, config.fit)
            scores.append(result.score())
            target.parent.mkdir(parents=True, exist_ok=True)
            _save(result, scores[-1], model, target)
            rows.append(_row(result, scores[-1], target.stem))
    if not scores:
        raise ValueError(skipped[0][1] if len(files) == 1 else f"none of the {len(files)} images can be read")
    report_skipped(console, skipped)
    if len(scores) > 1:
        rows.append(_mean_row(scores))
    columns = ("image", "size", "PSNR dB", "SSIM", "bits per pixel")
    console.print(make_table("Reconstructions", columns, rows, text_columns=2))
    beside = "NAME-comparison.png has the input beside it, and the codes where there are some"
    console.print(f"saved in {config.output}/ as NAME.png; {beside}", markup=False)
