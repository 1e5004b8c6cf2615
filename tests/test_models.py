"""VQVAE: shapes, errors, saving and loading, fingerprint; configs from YAML; metrics and pictures."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from vqkernels.models import (
    VQVAE,
    QuantizerConfig,
    TrainConfig,
    VQVAEConfig,
    evaluate,
    load_config,
    save_config,
)
from vqkernels.models.metrics import bits_per_pixel, code_usage, psnr, ssim
from vqkernels.models.pictures import code_colours, code_map, comparison


def small_config(**changes) -> VQVAEConfig:
    options = {
        "channels": 16,
        "channel_multipliers": [1, 1, 2],
        "blocks": 1,
        "latent_channels": 8,
        "quantizer": QuantizerConfig(codebook_size=32),
    }
    return VQVAEConfig(**{**options, **changes})


def images_of(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator) * 2 - 1


@pytest.fixture
def model() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(small_config()).eval()


@pytest.mark.parametrize(
    ("patch_size", "multipliers", "factor"),
    [(1, [1, 1, 1], 4), (4, [1], 4), (2, [1, 2], 4), (2, [1, 1, 2], 8), (1, [1, 1, 1, 1, 2], 16), (4, [1, 1, 1], 16)],
)
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 1)])
def test_any_size_divisible_by_the_factor(patch_size, multipliers, factor, grid):
    model = VQVAE(small_config(patch_size=patch_size, channel_multipliers=multipliers))
    images = images_of(2, 3, grid[0] * factor, grid[1] * factor)
    out = model(images)
    codes = model.encode(images)
    assert model.factor == factor
    assert out.reconstruction.shape == images.shape
    assert codes.shape == (2, *grid)
    assert codes.dtype == torch.int64
    decoded = model.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"group_norm": False},
        {"quantizer": QuantizerConfig(32, codebook_dim=4)},
        {"quantizer": QuantizerConfig(32, metric="cosine")},
        {"quantizer": QuantizerConfig(32, update="gradient", gradient="rotation")},
    ],
)
def test_every_kind_learns_in_encoder_and_decoder(options):
    model = VQVAE(small_config(**options))
    with torch.no_grad():  # blocks start as the identity; a step's worth of noise opens them
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    images = images_of(2, 3, 32, 32)
    out = model(images)
    ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_decode_of_encode_is_the_forward_pass(model):
    images = images_of(2, 3, 16, 24)
    with torch.no_grad():
        out = model(images)
    codes = model.encode(images)
    assert torch.equal(codes, out.quantizer.codes)
    torch.testing.assert_close(model.decode(codes), out.reconstruction.clamp(-1, 1))
    assert torch.equal(model.decode(codes.to(torch.int32)), model.decode(codes))


def test_encode_leaves_a_training_model_as_it_is(model):
    model.train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    model.encode(images_of(1, 3, 16, 16))
    assert model.training
    assert model.quantizer.training
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name]), name


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 30), (3, 3), (0, 16)])
def test_size_not_divisible_by_the_factor_is_refused(model, height, width):
    with pytest.raises(ValueError, match=rf"images .* factor 4, got {height}x{width}"):
        model(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 16, 16), r"images must have shape \[B, 3, H, W\], got \[3, 16, 16\]"),
        (torch.zeros(1, 1, 16, 16), r"images must have shape \[B, 3, H, W\], got \[1, 1, 16, 16\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "images must be floating point"),
    ],
)
def test_wrong_images_are_refused(model, images, message):
    with pytest.raises(ValueError, match=message):
        model.encode(images)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 2, 2), 32), r"codes must lie in \[0, 31\], got 32 to 32"),
        (torch.full((1, 2, 2), -1), r"codes must lie in \[0, 31\], got -1 to -1"),
        (torch.zeros(2, 2, dtype=torch.long), r"codes must be integers of shape \[B, h, w\]"),
        (torch.zeros(1, 2, 2), r"codes must be integers of shape \[B, h, w\], got torch.float32"),
    ],
)
def test_wrong_codes_are_refused(model, codes, message):
    with pytest.raises(ValueError, match=message):
        model.decode(codes)


def test_save_and_load_round_trip(model, tmp_path, capsys):
    images = images_of(1, 3, 16, 16)
    model.save_pretrained(tmp_path / "model")
    loaded = VQVAE.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert isinstance(loaded.config.quantizer, QuantizerConfig)
    assert loaded.fingerprint() == model.fingerprint()
    assert not loaded.training
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert capsys.readouterr().out == ""


def test_loading_names_what_is_missing_or_foreign(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        VQVAE.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        VQVAE.from_pretrained(tmp_path)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "channels": 32}))
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the config"):
        VQVAE.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "chanels": 32}))
    with pytest.raises(ValueError, match=r"config.json .* unknown option 'chanels'; did you mean 'channels'"):
        VQVAE.from_pretrained(folder)


def test_fingerprint_follows_weights_codes_and_config(model):
    first = model.fingerprint()
    assert first == model.fingerprint()
    with torch.no_grad():
        model.decoder[0].bias[0] += 1e-6
    second = model.fingerprint()
    with torch.no_grad():
        model.quantizer.codebook[3, 1] += 1e-6
    third = model.fingerprint()
    other = VQVAE(small_config(quantizer=QuantizerConfig(codebook_size=32, metric="cosine")))
    other.load_state_dict(model.state_dict())
    assert len({first, second, third, other.fingerprint()}) == 4


def test_training_statistics_do_not_touch_the_fingerprint(model):
    before = model.fingerprint()
    model.quantizer.cluster_size.add_(1)
    assert model.fingerprint() == before


@pytest.mark.parametrize("name", ["demo", "vqvae-f8", "vqvae-f16"])
def test_bundled_configs_load_and_survive_a_round_trip(name, tmp_path):
    config = load_config(name)
    save_config(config, tmp_path / "copy.yaml")
    assert load_config(tmp_path / "copy.yaml") == config
    factor = {"demo": 4, "vqvae-f8": 8, "vqvae-f16": 16}[name]
    assert config.model.factor == factor


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", r"bad.yaml: unknown option 'stepps'; did you mean 'steps'"),
        ("model: {quantizer: {codebok_size: 3}}", r"unknown option 'model.quantizer.codebok_size'"),
        ("steps: many", r"option 'steps' must be of type int, got 'many'"),
        ("batch_size: true", r"option 'batch_size' must be of type int, got True"),
        ("mixed_precision: fp8", r"option 'mixed_precision' must be one of no, bf16, fp16, got 'fp8'"),
        ("model: 3", r"option 'model' must be a group of options, got 3"),
        ("model: {channel_multipliers: [1, two]}", r"option 'model.channel_multipliers\[1\]' must be of type int"),
        ("discriminator: {weight: .nan}", r"option 'discriminator.weight' must be a finite number, got nan"),
        ("learning_rate: .inf", r"option 'learning_rate' must be a finite number, got inf"),
        ("betas: [0.9, nan]", r"option 'betas\[1\]' must be a finite number, got 'nan'"),
        ("discriminator: {channels: 0}", r"bad.yaml: discriminator\.channels must be at least 1, got 0"),
        ("discriminator: {crop: 2}", r"bad.yaml: discriminator\.crop must lie in \[0, 1\], got 2"),
        ("model: {channels: 0}", r"bad.yaml: model\.channels must be at least 1, got 0"),
        ("model: {quantizer: {update: ema, metric: dot}}", r"bad.yaml: model\.quantizer\.gradient must be"),
        (
            "model: {quantizer: {entropy: {weight: -1}}}",
            r"bad.yaml: model\.quantizer\.entropy\.weight must be 0 or greater, got -1",
        ),
        ("image_size: 66", r"bad.yaml: image_size must be divisible by the model's factor 4, got 66"),
        ("steps: [", r"bad.yaml"),
    ],
)
def test_a_wrong_config_gets_one_clear_error(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "bad.yaml")


def test_numbers_in_scientific_notation_and_missing_files(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-3\nmax_seconds: 5")
    config = load_config(tmp_path / "a.yaml")
    assert (config.learning_rate, config.max_seconds, config.steps) == (1e-3, 5.0, None)
    with pytest.raises(FileNotFoundError, match=r"nothing.yaml.*demo.*vqvae-f16, vqvae-f8"):
        load_config(tmp_path / "nothing.yaml")


def test_configs_import_without_torch():
    code = "import sys; from vqkernels.models import load_config; load_config('demo'); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    assert TrainConfig().steps == 10_000


def test_metrics_of_known_cases():
    images = images_of(2, 3, 16, 16) * 0.5
    assert psnr(images, images + 0.2).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(images[..., :8, :8], images[..., :8, :8])
    codes = torch.tensor([[[0, 1], [2, 3]]])
    usage = code_usage(codes, 8)
    assert (usage.used, usage.usage, usage.perplexity, usage.entropy_bits) == (4, 0.5, 4.0, 2.0)
    assert bits_per_pixel(codes, 8, 4) == (3 / 16, 2 / 16)
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 2\], got 0 to 3"):
        code_usage(codes, 3)


def test_evaluation_and_its_picture(model):
    images = images_of(3, 3, 32, 48)
    found = evaluate(model, images)
    assert found.codes.shape == (3, 8, 12)
    assert math.isfinite(found.psnr)
    assert found.bits_per_pixel.fixed == pytest.approx(5 / 16)
    assert found.usage.used == found.codes.unique().numel()
    assert found.picture().mode == "RGB"
    assert math.isnan(evaluate(model, images_of(1, 3, 8, 8)).ssim)


@pytest.mark.parametrize(("codes", "dim"), [(1, 4), (2, 1), (300, 2), (64, 16)])
def test_every_code_has_a_colour(codes, dim):
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(codes, dim, generator=generator)
    colours = code_colours(codebook)
    assert colours.shape == (codes, 3)
    assert torch.equal(colours, code_colours(codebook.clone()))
    assert len(set(map(tuple, colours.tolist()))) >= 0.9 * codes
    picture = code_map(torch.tensor([[0, codes - 1]]), colours, 4)
    assert picture.size == (8, 4)
    assert picture.getpixel((7, 3)) == tuple(colours[-1].tolist())


def test_comparison_refuses_what_does_not_belong_together():
    images = images_of(2, 3, 8, 8)
    with pytest.raises(ValueError, match="must belong together"):
        comparison(images, images[:1], torch.zeros(2, 2, 2, dtype=torch.long), torch.randn(4, 2))
