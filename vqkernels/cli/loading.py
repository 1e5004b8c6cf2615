"""Models, devices and images as the commands name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from vqkernels.models import ImageModel, ImageTokenizer, load_pretrained
from vqkernels.models.data import list_images
from vqkernels.models.image_model import CONFIG_FILE, model_folder
from vqkernels.models.levels import CodedModel
from vqkernels.models.validation import crop_to_multiple

HUB = "hf://"
MOST_NAMED = 5  # unreadable files on the screen


def choose_device(name: str) -> torch.device:
    """The device of `--device`.

    Raises:
        ValueError: cuda was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device: expected a GPU that torch can use, found none")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def load_model(folder: str, device: torch.device) -> ImageModel:
    """The model of a run folder, of a model folder, or of hf://OWNER/NAME on the Hugging Face Hub.

    A name is not looked up on the Hub unasked: a mistyped folder must not go over the network.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: the files there are not those of a model of this package.
    """
    if folder.startswith(HUB):
        return load_pretrained(folder.removeprefix(HUB)).to(device).eval()
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with a model, found none of that name")
    path = model_folder(Path(folder))
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder}: expected a folder with config.json and model.safetensors, or a run folder")
    return load_pretrained(path).to(device).eval()


def load_coded(folder: str, device: torch.device) -> CodedModel:
    """`load_model`, for what needs codes.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: the files there are not those of a model of this package, or it has no codes.
    """
    model = load_model(folder, device)
    if not isinstance(model, CodedModel):
        raise ValueError(f"{folder}: expected a model with codes, got a {type(model).__name__}, which has none")
    return model


def load_tokenizer(folder: str, device: torch.device) -> ImageTokenizer:
    """`load_coded`, for what needs one map of codes.

    Raises:
        ValueError: it has several.
    """
    model = load_coded(folder, device)
    if not isinstance(model, ImageTokenizer):
        raise ValueError(f"{folder}: expected a model with one map of codes, got a {type(model).__name__}")
    return model


def collect_images(paths: Sequence[str]) -> list[Path]:
    """Files as they are named, folders as the images in them.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without images.
    """
    files: list[Path] = []
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such image or folder")
        found = list_images(path)
        if not found:
            raise ValueError(f"{path}: expected a folder with images, found none in it")
        files += found
    return files


def output_names(files: Sequence[Path]) -> list[str]:
    """A file name without suffix for each image; numbered where two images share one."""
    taken: dict[str, int] = {}
    names = []
    for file in files:
        taken[file.stem] = taken.get(file.stem, 0) + 1
        names.append(file.stem if taken[file.stem] == 1 else f"{file.stem}-{taken[file.stem]}")
    return names


def report_skipped(console: Console, skipped: Sequence[tuple[Path, str]]) -> None:
    """Counts the files that could not be read, and names the first of them."""
    if not skipped:
        return
    console.print(f"skipped {len(skipped)} file{'s' if len(skipped) > 1 else ''} that could not be read:")
    for path, reason in skipped[:MOST_NAMED]:
        text = reason if str(path) in reason else f"{path}: {reason}"
        console.print(f"  {text}", markup=False, soft_wrap=True)
    if len(skipped) > MOST_NAMED:
        console.print(f"  ... and {len(skipped) - MOST_NAMED} more")


def fit_to_factor(
    image: Tensor,  # [3, H, W]
    factor: int,
    how: str,
) -> Tensor:  # [3, H', W'] with H', W' multiples of the factor
    """Repeats the right and bottom border ("pad"), or cuts the middle out ("crop").

    Raises:
        ValueError: nothing is left of the image after the crop.
    """
    height, width = image.shape[1:]
    if how == "pad":
        return F.pad(image[None], (0, -width % factor, 0, -height % factor), mode="replicate")[0]
    if min(height, width) < factor:
        raise ValueError(f"expected at least {factor} pixels each way to crop, got {width}x{height}; try --fit pad")
    return crop_to_multiple(image, factor)
