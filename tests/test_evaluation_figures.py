"""What stands behind `vqkernels evaluate`: every figure against its formula, and what of a picture it sees."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_inputs import noise_picture, noise_pixels
from PIL import Image
from torch import Tensor
from vqkernels.models import (
    EvaluationOptions,
    crops,
    similarity,
)
from vqkernels.models.crops import read_crops
from vqkernels.models.data import centre_crop
from vqkernels.models.evaluation import pair_figures, to_levels
from vqkernels.models.evaluation_report import mean_figure, pair_kinds
from vqkernels.models.metrics import ssim as batch_ssim
from vqkernels.models.similarity import SCALE_WEIGHTS, SMALLEST_MULTISCALE, similarities

# The figures


def _ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Of one channel, window by window (Wang et al. 2004), the border mirrored."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    x, y = (
        np.lib.stride_tricks.sliding_window_view(np.pad(each, 5, mode="reflect"), (11, 11)) for each in (one, other)
    )
    mean_x, mean_y = (x * window).sum((-1, -2)), (y * window).sum((-1, -2))
    var_x, var_y = (x * x * window).sum((-1, -2)) - mean_x**2, (y * y * window).sum((-1, -2)) - mean_y**2
    covariance = (x * y * window).sum((-1, -2)) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    images = noise_pixels(3, 24)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 20
    return images, (images + noise).clamp(0, 255).round()


def test_figures_of_pairs_are_their_formulas(pair):
    found = pair_figures(*pair)
    for place, (image, other) in enumerate(zip(*(part.double().numpy() for part in pair), strict=True)):
        mse = ((image - other) ** 2).mean()
        assert found["psnr"][place].item() == pytest.approx(10 * math.log10(255**2 / mse), rel=1e-12)
        assert found["l1"][place].item() == pytest.approx(np.abs(image - other).mean() / 255, rel=1e-12)
        expected = np.mean([_ssim(image[channel], other[channel]) for channel in range(3)])
        assert found["ssim"][place].item() == pytest.approx(expected, rel=1e-10)
        assert math.isnan(found["ms_ssim"][place].item())


def test_multiscale_similarity_is_that_of_torchmetrics():
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as theirs

    images = noise_pixels(2, SMALLEST_MULTISCALE)
    others = (images + 30 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    expected = theirs(others.double(), images.double(), data_range=255.0, reduction="none")
    torch.testing.assert_close(similarities(images, others)[1], expected, rtol=1e-7, atol=0)  # its weights are float32
    assert sum(SCALE_WEIGHTS) == pytest.approx(1, abs=2e-4)
    with pytest.raises(ValueError, match="must be larger"):
        theirs(others[..., 1:], images[..., 1:], data_range=255.0)
    assert similarities(images[..., 1:], others[..., 1:])[1].isnan().all()


def test_the_older_ssim_is_the_same_figure(pair):
    images, others = pair
    expected = similarities(images, others)[0]
    torch.testing.assert_close(batch_ssim(images / 127.5 - 1, others / 127.5 - 1).double(), expected, rtol=1e-4, atol=0)


def test_long_pictures_are_filtered_in_strips(monkeypatch):
    images = noise_pixels(1, 60)[..., :41]
    others = (images + 20 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    whole = similarities(images, others)[0]
    for strip in (1, 7, 40, 60):
        monkeypatch.setattr(similarity, "STRIP", strip)
        torch.testing.assert_close(similarities(images, others)[0], whole, rtol=1e-12, atol=0)


def test_equal_pictures_are_infinitely_good(pair):
    found = pair_figures(pair[0], pair[0])
    assert found["psnr"].isinf().all()
    torch.testing.assert_close(found["ssim"], torch.ones(3, dtype=torch.float64))
    figure = mean_figure(pair_kinds(EvaluationOptions())[0], found["psnr"].tolist())
    assert (figure.text(), figure.standard_error) == ("inf", None)


def test_pixels_are_rounded_as_saving_a_picture_does():
    values = torch.tensor([-2.0, -1.0, -0.001, 0.1, 0.9999, 3.0]).expand(1, 3, 1, 6)
    assert to_levels(values)[0, 0, 0].tolist() == [0, 0, 127, 140, 255, 255]
    exact = to_levels(values, "float")[0, 0, 0].double()
    torch.testing.assert_close(exact[3:5], torch.tensor([140.25, 254.98725], dtype=torch.float64), rtol=1e-6, atol=0)


def test_standard_error_is_that_of_the_mean():
    values = [1.0, 2.0, 4.0, 9.0]
    figure = mean_figure(pair_kinds(EvaluationOptions())[0], values)
    assert (figure.value, figure.median, figure.minimum, figure.maximum) == (4.0, 3.0, 1.0, 9.0)
    assert figure.standard_error == pytest.approx(math.sqrt(((3**2) + 2**2 + 0 + 5**2) / 3 / 4))


# The crops


def _scaled_then_cropped(picture: Image.Image, size: int) -> np.ndarray:
    """The whole picture scaled, then its middle cut out."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), resample=Image.Resampling.BICUBIC)
    top, left = (picture.height - size) // 2, (picture.width - size) // 2
    return np.asarray(picture)[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(32, 32), (47, 33), (33, 90), (300, 140), (8, 11), (64, 64), (129, 64)])
def test_a_crop_is_the_middle_of_the_scaled_picture(size):
    picture = noise_picture(3, *size)
    crop = np.asarray(centre_crop(picture, 32))
    expected = _scaled_then_cropped(picture, 32)
    assert crop.shape == (32, 32, 3)
    assert np.abs(crop.astype(int) - expected).max() <= 1
    assert (crop == expected).mean() > 0.99


def test_reading_stays_a_few_pictures_ahead(monkeypatch, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(30)]
    opened = []

    def read(file: Path, size: int) -> Tensor | str:
        opened.append(file)
        return "broken" if file.stem in ("0", "17") else torch.full((3, size, size), int(file.stem), dtype=torch.uint8)

    monkeypatch.setattr(crops, "_try_crop", read)
    skipped: list[tuple[Path, str]] = []
    seen: list[tuple[int, int]] = []
    for number, (file, crop) in enumerate(
        read_crops(files, 4, skipped, ahead=3, progress=lambda *at: seen.append(at)), start=1
    ):
        assert int(file.stem) == crop[0, 0, 0]
        assert len(opened) <= number + len(skipped) + 3
    assert [file.stem for file, _ in skipped] == ["0", "17"]
    assert seen[-1] == (30, 30)
