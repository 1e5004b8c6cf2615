"""`vqkernels evaluate` and what stands behind it: every figure against its formula, and awkward files and models."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from vqkernels.models import (
    GAN,
    VQVAE,
    EvaluationOptions,
    GANConfig,
    HierarchicalVQVAE,
    HierarchicalVQVAEConfig,
    ImageModel,
    VQVAEConfig,
    crops,
    evaluate_files,
    evaluation,
    open_codes,
    similarity,
)
from vqkernels.models.crops import read_crops
from vqkernels.models.data import ImageFolder, centre_crop
from vqkernels.models.evaluation import pair_figures, to_levels
from vqkernels.models.evaluation_report import code_map_use, mean_figure, pair_kinds, set_kind
from vqkernels.models.metrics import bits_per_pixel, code_usage
from vqkernels.models.metrics import ssim as batch_ssim
from vqkernels.models.similarity import SCALE_WEIGHTS, SMALLEST_MULTISCALE, similarities

from vqkernels.cli.evaluate import code_pictures
from vqkernels.cli.evaluate_page import difference, render
from vqkernels.cli.main import main
from vqkernels.cli.options import EvaluateConfig

SIZE = 32
PAIRS = ("psnr", "ssim", "ms_ssim", "l1")


def _picture(seed: int, width: int, height: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def model() -> VQVAE:
    torch.manual_seed(0)
    shape = {"channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "latent_channels": 4, "patch_size": 2}
    model = VQVAE(VQVAEConfig(**shape, quantizer={"codebook_size": 24, "dead_code_threshold": 0.0}))
    with torch.no_grad():
        model.quantizer.codebook.copy_(model.tokens(_pixels(24, 8) / 127.5 - 1).flatten(1)[:, :4] * 0.7)
    return model.eval()


def _pixels(count: int, size: int) -> Tensor:  # float [count, 3, size, size] in 0 ... 255
    pictures = (np.asarray(_picture(seed, size, size)) for seed in range(count))
    return torch.stack([torch.from_numpy(array.copy()).permute(2, 0, 1).float() for array in pictures])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Nine pictures of several sizes and modes, and two that cannot be used."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(((40, 32), (32, 32), (97, 33), (31, 64), (20, 25))):
        _picture(number, *size).save(folder / f"{number}.png")
    _picture(7, 44, 38).convert("CMYK").save(folder / "cmyk.jpg")
    deep = (np.asarray(_picture(8, 36, 36).convert("L")).astype(np.uint16)) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    _picture(9, 50, 40).convert("RGBA").resize((64, 48)).save(folder / "clear.png")
    _picture(10, 40, 40).convert("P").save(folder / "palette.gif")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:90])
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def report(model, folder):
    return evaluate_files(model, _files(folder), EvaluationOptions(image_size=SIZE, batch_size=4, shown=2))


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
    images = _pixels(3, 24)
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

    images = _pixels(2, SMALLEST_MULTISCALE)
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
    images = _pixels(1, 60)[..., :41]
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
    picture = _picture(3, *size)
    crop = np.asarray(centre_crop(picture, 32))
    expected = _scaled_then_cropped(picture, 32)
    assert crop.shape == (32, 32, 3)
    assert np.abs(crop.astype(int) - expected).max() <= 1
    assert (crop == expected).mean() > 0.99


def test_encoding_evaluation_and_held_out_figures_see_the_same_pixels(model, saved, folder, report, tmp_path):
    files = [Path(file) for file in report.files]
    crops = torch.stack([crop for _, crop in read_crops(files, SIZE, [])]).float() / 127.5 - 1
    held_out = ImageFolder(files, SIZE, augment=False)
    assert torch.equal(torch.stack([held_out[place] for place in range(len(files))]), crops)
    words = ["encode", str(saved), str(folder), "-o", str(tmp_path), "--image_size", str(SIZE), "--device", "cpu"]
    assert main(words) == 0
    codes = open_codes(tmp_path, model)
    assert codes.meta.files == [file.name for file in files]
    for example in report.worst:
        place = report.files.index(example.file)
        assert np.array_equal(codes.codes[place], example.codes[0].numpy())


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


# A whole evaluation


def test_figures_are_means_over_the_readable_pictures(model, folder, report):
    assert {Path(file).name for file, _ in report.skipped} == {"one.png", "torn.png"}
    assert [Path(file).name for file in report.files] == [
        file.name for file in _files(folder) if file.name not in ("one.png", "torn.png")
    ]
    crops = torch.stack([crop for _, crop in read_crops(list(map(Path, report.files)), SIZE, [])]).float()
    made = model.reconstruct(crops / 127.5 - 1)
    expected = pair_figures(crops, to_levels(made))
    for key in ("psnr", "ssim", "l1"):
        np.testing.assert_allclose(report.per_image[key], expected[key].numpy(), rtol=1e-6)
        assert report.figures[key].value == pytest.approx(expected[key].mean().item(), rel=1e-6)
        assert report.figures[key].images == 9
    assert report.figures["ms_ssim"].value is None
    assert "176" in report.figures["ms_ssim"].missing
    assert "ms_ssim" not in report.per_image


def test_code_use_counts_all_pictures_together(model, report):
    crops = torch.stack([crop for _, crop in read_crops(list(map(Path, report.files)), SIZE, [])]).float()
    codes = model.encode(crops / 127.5 - 1)
    usage, bits = code_usage(codes, 24), bits_per_pixel(codes, 24, model.factor)
    (found,) = report.codes.maps
    assert (found.used, found.tokens, found.codebook_size) == (usage.used, codes.numel(), 24)
    assert 1 < found.used < 24
    assert (found.usage, found.perplexity) == (pytest.approx(usage.usage), pytest.approx(usage.perplexity))
    assert report.codes.bits_per_pixel == pytest.approx(bits.fixed)
    assert report.codes.entropy_bits_per_pixel == pytest.approx(bits.entropy)
    curve = np.array(found.curve)
    assert curve[0].tolist() == [0, 0]
    assert curve[-1].tolist() == pytest.approx([1, 1])
    assert (np.diff(curve, axis=0) >= 0).all()
    assert (curve[:, 1] >= curve[:, 0] - 1e-12).all()


def test_the_batch_size_changes_nothing(model, folder, report):
    for batch_size in (1, 8):
        other = evaluate_files(
            model, _files(folder), EvaluationOptions(image_size=SIZE, batch_size=batch_size, shown=2)
        )
        assert other.files == report.files
        for key, values in report.per_image.items():
            np.testing.assert_allclose(other.per_image[key], values, rtol=1e-6)
        assert other.codes == report.codes
        assert [example.file for example in other.worst] == [example.file for example in report.worst]


def test_the_worst_and_the_best_are_kept(report):
    order = sorted(zip(report.per_image["psnr"], report.files, strict=True))
    assert [example.file for example in report.worst] == [file for _, file in order[:2]]
    assert [example.file for example in report.best] == [file for _, file in order[:-3:-1]]
    for example in (*report.worst, *report.best):
        mse = (example.image.double() - example.reconstruction.double()).square().mean().item()
        assert example.psnr == pytest.approx(10 * math.log10(255**2 / mse))
        assert example.codes[0].shape == (SIZE // 4, SIZE // 4)


def test_no_picture_is_shown_twice(model, folder):
    few = evaluate_files(model, _files(folder)[:3], EvaluationOptions(image_size=SIZE, shown=4))
    assert len(few.worst) == 3
    assert few.best == []
    none = evaluate_files(model, _files(folder)[:3], EvaluationOptions(image_size=SIZE, shown=0))
    assert none.worst == none.best == []


def test_the_model_is_left_as_it_was(model, folder):
    model.train()
    before = model.fingerprint()
    evaluate_files(model, _files(folder)[:2], EvaluationOptions(image_size=SIZE))
    assert model.training
    assert model.fingerprint() == before
    model.eval()


# Names that figures may carry


def test_published_names_need_the_weight_files():
    named = {
        (None, None, False): "lpips",  # shown as '-'
        (None, None, True): "random_feature_distance",
        ("v", None, True): "vgg16_distance",
        ("v", "l", False): "lpips",
    }
    for (vgg, lpips, random), key in named.items():
        kind = pair_kinds(EvaluationOptions(vgg=vgg, lpips=lpips, random_features=random))[-1]
        assert kind.key == key
        assert ("not LPIPS" in kind.label) == (key != "lpips")
    for samples, key in ((False, "rfid"), (True, "fid")):
        assert set_kind(EvaluationOptions(inception="i", random_features=True), samples=samples).key == key
        kind = set_kind(EvaluationOptions(random_features=True), samples=samples)
        assert (kind.key, kind.label) == ("random_inception_distance", "random-feature distance (not FID)")
    assert "pytorch-fid" in set_kind(EvaluationOptions(inception_resize="pytorch"), samples=False).convention


class _SmallFeatures(nn.Module):
    """Stands for the Inception network: means of each channel and their squares."""

    def __init__(self, weights: str | None, *, resize: str) -> None:
        super().__init__()
        self.is_published = weights is not None

    def forward(self, pictures: Tensor) -> Tensor:
        means = pictures.double().mean((2, 3)) / 255
        return torch.cat([means, means.square()], 1)


@pytest.fixture
def small_features(monkeypatch, tmp_path) -> str:
    """Puts the small network in the place of Inception's; gives the path of a weight file for it."""
    (tmp_path / "small.pth").write_bytes(b"weights")
    monkeypatch.setattr(evaluation, "InceptionFeatures", _SmallFeatures)
    monkeypatch.setattr(evaluation, "FEATURES", 6)
    return str(tmp_path / "small.pth")


def test_random_features_never_carry_a_published_name(model, folder, small_features):
    options = EvaluationOptions(image_size=SIZE, batch_size=3, random_features=True, shown=0)
    found = evaluate_files(model, _files(folder)[:6], options)
    assert found.figures["random_inception_distance"].value > 0
    assert found.figures["random_feature_distance"].value > 0
    assert len(found.per_image["random_feature_distance"]) == len(found.files)
    labels = [figure.kind.label for figure in found.figures.values() if figure.value is not None]
    keys = set(found.figures)
    assert not {"lpips", "rfid", "fid"} & keys
    assert [label for label in labels if "LPIPS" in label or "FID" in label] == [
        "random-feature distance (not LPIPS)",
        "random-feature distance (not FID)",
    ]
    assert any("covariances are singular" in warning for warning in found.warnings)
    assert not any(warning.startswith("rFID") for warning in found.warnings)


def test_rfid_is_the_distance_of_the_two_sets(model, folder, small_features):
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = _SmallFeatures("weights", resize="tensorflow")
    network.num_features = 6
    metric = FrechetInceptionDistance(feature=network, normalize=True)
    found = evaluate_files(
        model, _files(folder), EvaluationOptions(image_size=SIZE, batch_size=2, inception=small_features, shown=0)
    )
    crops = torch.stack([crop for _, crop in read_crops(list(map(Path, found.files)), SIZE, [])]).float()
    metric.update(crops, real=True)
    metric.update(to_levels(model.reconstruct(crops / 127.5 - 1)), real=False)
    assert found.figures["rfid"].value == pytest.approx(metric.compute().item(), rel=1e-4, abs=1e-6)
    assert found.weights == {"inception": {"file": small_features, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    first, second = found.warnings
    assert "not the published file byte for byte" in first
    assert second == "rFID falls as the number of pictures rises: 9 here, 50,000 in published tables"


# Other kinds of models


@dataclasses.dataclass
class _Config:
    factor: int = 4


class _Smoother(ImageModel):
    """Reconstructs without codes."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.weight = _Config(), nn.Parameter(torch.ones(1))

    def reconstruct(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 3, 1, 1)


class _Generator(ImageModel):
    """Makes pictures and reconstructs none."""

    reconstructs = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []
        self.config, self.weight = _Config(), nn.Parameter(torch.ones(1))

    def generate(self, count: int, seed: int = 0, *, height: int, width: int) -> Tensor:
        self.calls.append((count, seed, height, width))
        return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class _Neither(ImageModel):
    reconstructs = False

    def __init__(self) -> None:
        super().__init__()
        self.config, self.weight = _Config(), nn.Parameter(torch.ones(1))


def test_a_model_without_codes_has_no_code_use(folder):
    found = evaluate_files(_Smoother(), _files(folder), EvaluationOptions(image_size=SIZE))
    assert found.codes is None
    assert found.figures["psnr"].value > 5
    assert found.worst[0].codes == ()
    assert found.document()["codes"] is None


def test_a_generator_gets_fid_of_its_samples_alone(folder, small_features):
    with pytest.raises(ValueError, match="only FID of its samples applies: expected inception"):
        evaluate_files(_Generator(), _files(folder))
    generator, options = _Generator(), EvaluationOptions(image_size=8, inception=small_features, batch_size=4)
    found = evaluate_files(generator, _files(folder), options)
    assert generator.calls == [(4, 0, 8, 8), (4, 4, 8, 8), (1, 8, 8, 8)]
    assert set(found.figures) == {"fid"}
    assert found.figures["fid"].value > 0
    assert found.figures["fid"].images == 9
    again = evaluate_files(_Generator(), _files(folder), options)
    assert again.figures["fid"].value == found.figures["fid"].value
    with pytest.raises(ValueError, match="neither reconstructs pictures nor generates them"):
        evaluate_files(_Neither(), _files(folder))


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_have_the_size_and_the_colours_of_the_pictures(folder, small_features, monkeypatch, channels):
    torch.manual_seed(0)
    shape = {"channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "norm_groups": 4, "attention_resolutions": []}
    gan = GAN(GANConfig(**shape, latent_channels=2, resolution=16, out_channels=channels)).eval()
    seen, forward = [], _SmallFeatures.forward
    monkeypatch.setattr(
        _SmallFeatures, "forward", lambda self, pictures: seen.append(pictures.shape) or forward(self, pictures)
    )
    options = EvaluationOptions(image_size=8, batch_size=5, inception=small_features)
    if channels == 3:
        assert evaluate_files(gan, _files(folder), options).figures["fid"].value > 0
        assert set(seen) == {(5, 3, 8, 8), (4, 3, 8, 8)}
        options, said = dataclasses.replace(options, image_size=9), "multiple of the model's factor 2, got 9"
    else:
        said = "expected a model of colour pictures, got one of 1 channels"
    with pytest.raises(ValueError, match=said):
        evaluate_files(gan, _files(folder), options)


def test_a_codebook_too_large_for_an_array_is_counted():
    counts = np.array([3, 1, 4])
    use = code_map_use(counts, 2**62, (2, 4))
    assert (use.used, use.tokens, use.curve[-1]) == (3, 8, [1.0, 1.0])
    assert use.perplexity == pytest.approx(code_map_use(counts, 3, (2, 4)).perplexity)


def _hierarchy() -> HierarchicalVQVAE:
    torch.manual_seed(0)
    quantizers = {f"{name}_quantizer": {"codebook_size": size} for name, size in (("top", 8), ("bottom", 24))}
    shape = {"patch_size": 2, "channels": 8, "channel_multipliers": [1, 1], "blocks": 1, "latent_channels": 4}
    return HierarchicalVQVAE(HierarchicalVQVAEConfig(**shape, **quantizers)).eval()


def test_codes_on_two_maps_add_up(folder):
    found = evaluate_files(_hierarchy(), _files(folder), EvaluationOptions(image_size=SIZE))
    first, second = found.codes.maps
    assert (first.rows * 2, first.codebook_size) == (second.rows, 8)
    assert first.tokens * 4 == second.tokens
    counts = first.rows**2, second.rows**2
    assert found.codes.bits_per_pixel == pytest.approx((3 * counts[0] + math.log2(24) * counts[1]) / SIZE**2)
    entropy = (counts[0] * first.entropy_bits + counts[1] * second.entropy_bits) / SIZE**2
    assert found.codes.entropy_bits_per_pixel == pytest.approx(entropy)
    assert len(found.worst[0].codes) == 2


def _broken_on(encoder: nn.Module, brightness: float):
    """From here on the encoder overflows in one place of pictures that are at least so bright; gives the hook."""

    def overflow(_module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        out = out.clone()
        out[inputs[0].mean((1, 2, 3)) >= brightness, :, 0, 0] = math.nan
        return out

    return encoder.register_forward_hook(overflow)


def test_tokens_that_are_not_finite_break_their_picture_alone(model, folder, report):
    crops = torch.stack([crop for _, crop in read_crops(list(map(Path, report.files)), SIZE, [])]).float()
    brightness = (crops / 127.5 - 1).mean((1, 2, 3))
    broken = int(brightness.argmax())
    options = EvaluationOptions(image_size=SIZE, batch_size=4, shown=2)
    with _broken_on(model.encoder, brightness.max().item() - 1e-4):
        found = evaluate_files(model, _files(folder), options)
    for key, values in found.per_image.items():
        assert [math.isnan(value) for value in values] == [place == broken for place in range(9)]
        kept = [place for place in range(9) if place != broken]
        np.testing.assert_allclose([values[i] for i in kept], [report.per_image[key][i] for i in kept], rtol=1e-6)
    (use,) = found.codes.maps
    kept_codes = model.encode((crops / 127.5 - 1)[[place for place in range(9) if place != broken]])
    assert (use.tokens, use.used) == (8 * 64, code_usage(kept_codes, 24).used)
    name = Path(report.files[broken]).name
    assert found.warnings == [
        "1 of 9 reconstructions hold values that are not finite, and the figures with them, and their codes are not "
        f"counted: {name}"
    ]
    assert Path(found.worst[0].file).name == name
    assert (found.worst[0].codes[0] == -1).sum() == 1
    page = render(
        dataclasses.replace(found, model={**found.model, "source": "here"}),
        code_pictures(model, found),
        {"vqkernels": "1"},
    )
    assert "<span>not finite</span>" in page
    with _broken_on(model.encoder, -1.0):
        nothing = evaluate_files(model, _files(folder)[:3], options)
    assert nothing.codes is None
    assert nothing.document()["figures"]["psnr"]["value"] is None


def test_a_hierarchy_with_tokens_that_are_not_finite(folder):
    model = _hierarchy()
    with _broken_on(model.bottom_encoder, -1.0):
        codes = model.encode(torch.zeros(1, 3, SIZE, SIZE))
        assert [int(each.min()) for each in codes] == [-1, -1]
        found = evaluate_files(model, _files(folder)[:3], EvaluationOptions(image_size=SIZE))
    assert found.codes is None
    assert found.warnings[0].startswith("3 of 3 reconstructions hold values that are not finite")


def test_codes_without_a_codebook_get_the_colours_of_their_vectors(folder):
    torch.manual_seed(0)
    shape = {"channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "latent_channels": 4, "patch_size": 2}
    model = VQVAE(VQVAEConfig(**shape, quantizer={"kind": "lfq", "codebook_dim": 20})).eval()
    found = evaluate_files(model, _files(folder), EvaluationOptions(image_size=SIZE, shown=2))
    shown = [*found.worst, *found.best]
    codes = torch.stack([example.codes[0] for example in shown])
    painted = torch.stack([colours for (colours,) in code_pictures(model, found)])
    assert painted.shape == (4, SIZE // 4, SIZE // 4, 3)
    pairs = set(zip(codes.flatten().tolist(), map(tuple, painted.flatten(0, 2).tolist()), strict=True))
    assert len(pairs) == len(codes.unique()) > 10  # one colour for each code in all the pictures


# The command


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(saved, folder, tmp_path_factory) -> Path:
    """The folder that the command leaves."""
    output = tmp_path_factory.mktemp("evaluation") / "out"
    words = ["evaluate", str(saved), str(folder), "-o", str(output), "--image_size", str(SIZE), "--shown", "2"]
    assert main([*words, "--device", "cpu"]) == 0
    return output


NUMBER = (int, float)
OPTIONAL = (int, float, type(None))
FIGURE = {
    "label": str, "unit": str, "better": str, "convention": str, "missing": str, "value": OPTIONAL, "images": int,
    "standard_error": OPTIONAL, "median": OPTIONAL, "minimum": OPTIONAL, "maximum": OPTIONAL,
}  # fmt: skip
MAP = {
    "rows": int, "columns": int, "codebook_size": int, "tokens": int, "used": int, "usage": NUMBER,
    "perplexity": NUMBER, "entropy_bits": NUMBER, "curve": list,
}  # fmt: skip
SCHEMA = {
    "format": str,
    "model": {"class": str, "fingerprint": str, "parameters": int, "factor": int, "config": dict, "source": str},
    "images": {"count": int, "size": int, "crop": str},
    "options": {entry.name: (str, int, type(None)) for entry in dataclasses.fields(EvaluationOptions)},
    "figures": dict.fromkeys((*PAIRS, "lpips", "rfid"), FIGURE),
    "codes": {"maps": [MAP], "bits_per_pixel": NUMBER, "entropy_bits_per_pixel": NUMBER},
    "per_image": [{"file": str, "psnr": NUMBER, "ssim": NUMBER, "l1": NUMBER}],
    "skipped": [{"file": str, "reason": str}],
    "warnings": list,
    "weights": dict,
    "device": str,
    "seconds": NUMBER,
    "versions": {"vqkernels": str, "torch": str, "numpy": str, "pillow": str},
}


def _check_schema(value, schema, place: str = "document") -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict), place
        assert set(value) == set(schema), place
        for key, inner in schema.items():
            _check_schema(value[key], inner, f"{place}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), place
        assert value, place
        for each in value:
            _check_schema(each, schema[0], place)
    else:
        assert isinstance(value, schema), (place, value)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_the_json_holds_everything(written, report):
    document = json.loads((written / "evaluation.json").read_text(encoding="utf-8"), parse_constant=_refuse)
    _check_schema(document, SCHEMA)
    assert document["images"]["count"] == len(document["per_image"]) == 9
    assert document["figures"]["psnr"]["value"] == pytest.approx(report.figures["psnr"].value, rel=1e-6)
    assert document["figures"]["rfid"]["value"] is None
    assert document["model"]["fingerprint"] == report.model["fingerprint"]
    assert {Path(entry["file"]).name for entry in document["skipped"]} == {"one.png", "torn.png"}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img":
            self.images.append(found)
        elif tag not in ("meta", "br"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_from_outside(written, report):
    markup = (written / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(markup)
    assert page.open == []
    sections = {"worst", "best", "spread", "codes", "figures", "skipped", "run"}
    assert set(page.ids) == sections | {f"{name}-title" for name in sections}
    assert not re.search(r"https?:|@import|url\(", markup)
    assert len(page.images) == 4 * 4
    shown = []
    for image in page.images:
        assert image["alt"]
        data = image["src"].removeprefix("data:image/png;base64,")
        shown.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    first = report.worst[0]
    assert (shown[0] == first.image.permute(1, 2, 0).numpy()).all()
    assert (shown[2] == difference(first.image, first.reconstruction).permute(1, 2, 0).numpy()).all()
    assert shown[3].shape == (SIZE // 4, SIZE // 4, 3)
    text = " ".join(page.text)
    for figure in report.figures.values():
        assert figure.kind.label in text
        assert figure.kind.convention in text
    assert f"{report.figures['psnr'].text()} dB" in text
    assert "cannot read image" in text


def test_the_difference_is_amplified_and_clipped():
    image, other = (torch.tensor(values, dtype=torch.uint8).view(1, 1, 4) for values in ([0, 9, 250, 7], [2, 6, 0, 7]))
    assert difference(image, other).flatten().tolist() == [8, 12, 255, 0]


def test_the_table_shows_what_was_measured_and_what_not(saved, folder, tmp_path, capsys):
    words = ["evaluate", str(saved), str(folder / "0.png"), "-o", str(tmp_path / "out"), "--image_size", str(SIZE)]
    assert main([*words, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "VQVAE on 1 picture of 32 x 32" in shown
    for expected in (r"PSNR, dB +\d+\.\d\d ", r"LPIPS \(VGG16\) +- ", r"rFID +- ", r"perplexity +\d", r"MS-SSIM +- "):
        assert re.search(expected, shown), (expected, shown)
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_command_has_the_options_of_the_function():
    config = EvaluateConfig("model", ["image"])
    for entry in dataclasses.fields(EvaluationOptions):
        assert getattr(config, entry.name) == entry.default, entry.name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image_size", "30"], "image_size must be a multiple of the model's factor 4, got 30"),
        (["--image_size", "0"], "image_size must be at least 1, got 0"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--lpips", "weights.pth"], "vgg must be given where lpips is"),
        (["--inception", "missing.pth"], "missing.pth: no such file"),
        (["--vgg", "missing.pth"], "missing.pth"),
        (["--inception", "TORN"], "expected a file that ends in"),
        (["--pixels", "int4"], "one of 'uint8', 'float'"),
        (["--inceptio", "x"], "did you mean 'inception'"),
    ],
)
def test_mistakes_are_one_line(saved, folder, tmp_path, capsys, words, said):
    words = [str(folder / "torn.png") if word == "TORN" else word for word in words]
    base = ["evaluate", str(saved), str(folder), "-o", str(tmp_path / "out"), "--device", "cpu"]
    size = [] if "--image_size" in words else ["--image_size", str(SIZE)]
    assert main([*base, *size, *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_readable_picture_is_named(saved, folder, tmp_path, capsys):
    words = ["evaluate", str(saved), str(folder / "torn.png"), str(folder / "one.png"), "--image_size", str(SIZE)]
    assert main([*words, "-o", str(tmp_path / "out"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "none of the 2 images can be read; the first: cannot read image" in said
    assert "torn.png" in said
