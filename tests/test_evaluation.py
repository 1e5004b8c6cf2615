"""Evaluating models: what is counted and kept, names that figures may carry, awkward models."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_inputs import SIZE, files_of, make_model, write_pictures
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
    evaluate_files,
    evaluation,
)
from vqkernels.models.crops import read_crops
from vqkernels.models.evaluation import pair_figures, to_levels
from vqkernels.models.evaluation_report import code_map_use, pair_kinds, set_kind
from vqkernels.models.metrics import bits_per_pixel, code_usage

from vqkernels.cli.evaluate import code_pictures
from vqkernels.cli.evaluate_page import render


@pytest.fixture(scope="module")
def model() -> VQVAE:
    return make_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def report(model, folder):
    return evaluate_files(model, files_of(folder), EvaluationOptions(image_size=SIZE, batch_size=4, shown=2))


# A whole evaluation


def test_figures_are_means_over_the_readable_pictures(model, folder, report):
    assert {Path(file).name for file, _ in report.skipped} == {"one.png", "torn.png"}
    assert [Path(file).name for file in report.files] == [
        file.name for file in files_of(folder) if file.name not in ("one.png", "torn.png")
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
            model, files_of(folder), EvaluationOptions(image_size=SIZE, batch_size=batch_size, shown=2)
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
    few = evaluate_files(model, files_of(folder)[:3], EvaluationOptions(image_size=SIZE, shown=4))
    assert len(few.worst) == 3
    assert few.best == []
    none = evaluate_files(model, files_of(folder)[:3], EvaluationOptions(image_size=SIZE, shown=0))
    assert none.worst == none.best == []


def test_the_model_is_left_as_it_was(model, folder):
    model.train()
    before = model.fingerprint()
    evaluate_files(model, files_of(folder)[:2], EvaluationOptions(image_size=SIZE))
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
    found = evaluate_files(model, files_of(folder)[:6], options)
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
        model, files_of(folder), EvaluationOptions(image_size=SIZE, batch_size=2, inception=small_features, shown=0)
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
    found = evaluate_files(_Smoother(), files_of(folder), EvaluationOptions(image_size=SIZE))
    assert found.codes is None
    assert found.figures["psnr"].value > 5
    assert found.worst[0].codes == ()
    assert found.document()["codes"] is None


def test_a_generator_gets_fid_of_its_samples_alone(folder, small_features):
    with pytest.raises(ValueError, match="only FID of its samples applies: expected inception"):
        evaluate_files(_Generator(), files_of(folder))
    generator, options = _Generator(), EvaluationOptions(image_size=8, inception=small_features, batch_size=4)
    found = evaluate_files(generator, files_of(folder), options)
    assert generator.calls == [(4, 0, 8, 8), (4, 4, 8, 8), (1, 8, 8, 8)]
    assert set(found.figures) == {"fid"}
    assert found.figures["fid"].value > 0
    assert found.figures["fid"].images == 9
    again = evaluate_files(_Generator(), files_of(folder), options)
    assert again.figures["fid"].value == found.figures["fid"].value
    with pytest.raises(ValueError, match="neither reconstructs pictures nor generates them"):
        evaluate_files(_Neither(), files_of(folder))


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
        assert evaluate_files(gan, files_of(folder), options).figures["fid"].value > 0
        assert set(seen) == {(5, 3, 8, 8), (4, 3, 8, 8)}
        options, said = dataclasses.replace(options, image_size=9), "multiple of the model's factor 2, got 9"
    else:
        said = "expected a model of colour pictures, got one of 1 channels"
    with pytest.raises(ValueError, match=said):
        evaluate_files(gan, files_of(folder), options)


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
    found = evaluate_files(_hierarchy(), files_of(folder), EvaluationOptions(image_size=SIZE))
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
        found = evaluate_files(model, files_of(folder), options)
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
        nothing = evaluate_files(model, files_of(folder)[:3], options)
    assert nothing.codes is None
    assert nothing.document()["figures"]["psnr"]["value"] is None


def test_a_hierarchy_with_tokens_that_are_not_finite(folder):
    model = _hierarchy()
    with _broken_on(model.bottom_encoder, -1.0):
        codes = model.encode(torch.zeros(1, 3, SIZE, SIZE))
        assert [int(each.min()) for each in codes] == [-1, -1]
        found = evaluate_files(model, files_of(folder)[:3], EvaluationOptions(image_size=SIZE))
    assert found.codes is None
    assert found.warnings[0].startswith("3 of 3 reconstructions hold values that are not finite")


def test_codes_without_a_codebook_get_the_colours_of_their_vectors(folder):
    torch.manual_seed(0)
    shape = {"channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "latent_channels": 4, "patch_size": 2}
    model = VQVAE(VQVAEConfig(**shape, quantizer={"kind": "lfq", "codebook_dim": 20})).eval()
    found = evaluate_files(model, files_of(folder), EvaluationOptions(image_size=SIZE, shown=2))
    shown = [*found.worst, *found.best]
    codes = torch.stack([example.codes[0] for example in shown])
    painted = torch.stack([colours for (colours,) in code_pictures(model, found)])
    assert painted.shape == (4, SIZE // 4, SIZE // 4, 3)
    pairs = set(zip(codes.flatten().tolist(), map(tuple, painted.flatten(0, 2).tolist()), strict=True))
    assert len(pairs) == len(codes.unique()) > 10  # one colour for each code in all the pictures
