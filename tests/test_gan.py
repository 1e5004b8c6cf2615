"""GAN: sizes, seeds, weights that learn, configs that are refused, and training that resumes bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from vqkernels.models import GAN, GANConfig, TrainConfig, evaluation, load_config, load_pretrained, make_model, train
from vqkernels.models.checkpoint import load_newest
from vqkernels.models.pictures import grid, pairs

from vqkernels.cli.main import main


def small_config(**changes) -> GANConfig:
    options = {
        "channels": 16,
        "channel_multipliers": [1, 2],
        "blocks": 1,
        "resolution": 16,
        "attention_resolutions": [8],
        "latent_channels": 6,
        "norm_groups": 8,
    }
    return GANConfig(**{**options, **changes})


@pytest.fixture
def model() -> GAN:
    torch.manual_seed(0)
    return GAN(small_config()).eval()


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 1)])
def test_images_of_any_size_divisible_by_the_factor(grid, model):
    height, width = 2 * grid[0], 2 * grid[1]
    images = torch.zeros(3, 3, height, width)
    assert model(images).reconstruction.shape == images.shape
    made = model.generate(3, seed=1, height=height, width=width)
    assert (made.shape, made.dtype) == (images.shape, torch.float32)
    assert made.abs().max() <= 1
    with pytest.raises(ValueError, match="model's factor 2, got 3x4"):
        model(torch.zeros(1, 3, 3, 4))
    with pytest.raises(ValueError, match="width must be a positive multiple of the model's factor 2, got 5"):
        model.generate(1, width=5)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        model.generate(0)


def test_wrong_latents_are_refused(model):
    channels = model.config.latent_channels
    shapes = ((1, channels + 1, 2, 2), (channels, 2, 2))
    for latents in (*map(torch.zeros, shapes), torch.zeros(1, channels, 2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=rf"latents must be floats of shape \[B, {channels}, h, w\], got torch"):
            model.decode(latents)


def test_a_seed_gives_the_same_images_and_changes_nothing(model):
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = model.generate(3, seed=5)
    assert first.shape == (3, 3, 16, 16)
    torch.testing.assert_close(model.generate(2, seed=5), first[:2])
    assert not torch.equal(model.generate(3, seed=6), first)
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    latents = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(model.decode(latents[None]), first[:1])


def test_a_training_forward_draws_new_latents_of_the_batch_alone(model):
    images = torch.zeros(2, 3, 8, 8)
    other = copy.deepcopy(model)
    first, second = model(images).reconstruction, model(images).reconstruction
    assert not torch.equal(first, second)
    assert torch.equal(other(images + 1).reconstruction, first)  # what the images show has no part in it
    assert model(images).loss == 0


@pytest.mark.parametrize("again", [False, True])
def test_every_weight_learns(again):
    torch.manual_seed(0)
    model = GAN(small_config(gradient_checkpointing=again))
    model(torch.zeros(2, 3, 16, 16)).reconstruction.square().mean().backward()
    for name, weight in model.named_parameters():
        # adding to every key changes no softmax: that gradient is zero but for rounding
        assert name.endswith("k.bias") or weight.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_bit():
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = GAN(small_config(gradient_checkpointing=again))
        out = model(torch.zeros(2, 3, 16, 16)).reconstruction
        out.square().mean().backward()
        found.append([out.detach(), model.noise.draw, *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_compiled_and_other_number_formats(model):
    images = torch.zeros(1, 3, 8, 8)
    other = copy.deepcopy(model)
    fast = torch.compile(other, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(images).reconstruction, model(images).reconstruction)
    assert copy.deepcopy(model).double()(images.double()).reconstruction.dtype == torch.float64
    half = copy.deepcopy(model).bfloat16()
    assert half(images.bfloat16()).reconstruction.dtype == torch.bfloat16
    assert half.generate(1).dtype == torch.float32


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    for loaded in (GAN.from_pretrained(tmp_path), load_pretrained(tmp_path)):
        assert isinstance(loaded, GAN)
        assert loaded.config == model.config
        assert torch.equal(loaded.generate(1), model.generate(1))
    card = (tmp_path / "README.md").read_text()
    assert "model.generate(4, seed=0)" in card
    assert "unconditional-image-generation" in card


def test_it_reconstructs_nothing(model):
    assert not model.reconstructs
    with pytest.raises(TypeError, match="a GAN only generates images"):
        model.reconstruct(torch.zeros(1, 3, 8, 8))


def test_pictures_of_images_alone():
    images = torch.zeros(6, 3, 200, 160)
    assert grid(images).height < 2 * 200  # two are left over, and a row has four
    assert grid(images[:2]).width < 3 * 160
    assert grid(images, columns=2).height > 3 * 200
    with pytest.raises(ValueError, match=r"must belong together, got \[6, 3, 200, 160\] and \[1, 3, 200, 160\]"):
        pairs(images, images[:1])


# Training


def run_config(data: Path, output: Path, **changes) -> TrainConfig:
    options = {
        "model": small_config(channels=8, attention_resolutions=[]),
        "l1_weight": 0.0,
        "l2_weight": 0.0,
        "discriminator": {"kind": "style", "channels": 8, "adaptive": False, "weight": 1.0, "r1_weight": 0.1},
        "image_size": 16,
        "batch_size": 4,
        "steps": 5,
        "warmup_steps": 2,
        "weight_ema_decay": 0.5,
        "threads": 1,
        "log_every": 1,
        "sample_every": 0,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    return TrainConfig(data=str(data), output=str(output), **{**options, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l1_weight": 1.0}, r"l1_weight must be 0 with model.kind: gan, got 1.0"),
        ({"l2_weight": 1.0}, r"l2_weight must be 0 with model.kind: gan, got 1.0"),
        ({"perceptual_weight": 1.0}, r"perceptual_weight must be 0 with model.kind: gan, got 1.0"),
        ({"discriminator": {}}, r"discriminator.kind must be patch, style or dino with model.kind: gan, got none"),
        ({"discriminator": {"kind": "patch"}}, r"discriminator.adaptive must be false with model.kind: gan, got true"),
        (
            {"discriminator": {"kind": "patch", "adaptive": False, "start_step": 3}},
            r"discriminator.start_step must be 0 with model.kind: gan, got 3",
        ),
        ({"model": {"kind": "gan", "in_channels": 3}}, r"unknown option 'model.in_channels'"),
        ({"model": {"kind": "gan", "latent_channels": 0}}, r"model\.latent_channels must be at least 1, got 0"),
    ],
)
def test_a_wrong_config_is_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_config(tmp_path, tmp_path, **changes)


def test_the_bundled_config_makes_a_model():
    config = load_config("gan-small")
    model = make_model(config.model)
    assert isinstance(model, GAN)
    assert model.generate(1).shape[2:] == (config.image_size, config.image_size)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    pixels = (np.random.default_rng(0).random((3, 8, 8, 3)) * 255).astype(np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    before = make_model(run_config(pictures, output).model)
    result = train(run_config(pictures, output))
    assert before.config == result.model.config
    assert result.history[-1].keys() >= {"loss", "adversarial_loss", "discriminator_loss", "real_logit", "grad_norm"}
    assert not {"psnr", "l1", "mse", "perceptual", "usage"} & {name for line in result.history for name in line}
    assert all(line["adaptive_weight"] == 1 and line["grad_norm"] > 0 for line in result.history)
    return output


class StopError(Exception):
    """Stands for whatever ends a run early."""


def test_resume_takes_the_exact_next_step(pictures, undisturbed, tmp_path):
    config = run_config(pictures, tmp_path / "run")

    def stop(report):
        if report.step == 3:
            raise StopError

    with pytest.raises(StopError):
        train(config, progress=stop)  # the checkpoint is of step 2
    torch.manual_seed(999)
    train(dataclasses.replace(config, resume=True))
    mine, theirs = (load_newest(folder / "checkpoints") for folder in (tmp_path / "run", undisturbed))
    assert mine["model"]["noise.draw"] == 5
    for part in ("model", "average", "optimizer", "discriminator"):
        leaves = (torch.utils._pytree.tree_leaves(state[part]) for state in (mine, theirs))
        for one, other in zip(*leaves, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, part
    samples = (folder / "samples" / "step-00000005.png" for folder in (tmp_path / "run", undisturbed))
    first, second = (path.read_bytes() for path in samples)
    assert first == second


def test_bf16_accumulation_and_a_patch_discriminator(pictures, tmp_path):
    discriminator = {"kind": "patch", "channels": 8, "layers": 1, "adaptive": False}
    options = {"mixed_precision": "bf16", "gradient_accumulation": 2, "batch_size": 2, "steps": 2, "trackers": []}
    result = train(run_config(pictures, tmp_path / "run", discriminator=discriminator, **options))
    assert load_newest(tmp_path / "run" / "checkpoints")["model"]["noise.draw"] == 4
    assert result.steps == 2


def test_commands_say_what_it_cannot_do(undisturbed, pictures, tmp_path, capsys):
    output = str(tmp_path / "out")
    for command, message in (
        (["reconstruct", str(undisturbed), str(pictures), "-o", output], "expected a model that encodes images"),
        (["encode", str(undisturbed), str(pictures), "-o", output], "expected a model with codes, got a GAN"),
        (["decode", str(undisturbed), str(pictures), "-o", output], "expected a model with codes, got a GAN"),
        (["audit", str(undisturbed), "--images", str(pictures)], "expected a model with codes, got a GAN"),
        (["export", str(undisturbed), "-o", output], "expected a model with one map of codes or latents, got a GAN"),
        (["convert", str(undisturbed), "-o", output], "expected a VQGAN or KLVAE, got a GAN"),
        (
            ["profile", "--training", str(undisturbed / "config.yaml"), "-o", str(tmp_path / "page")],
            "expected a model with one quantizer that searches a codebook",
        ),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class _MeanColours(nn.Module):
    """Stands for the Inception network, which takes seconds a picture."""

    def __init__(self, weights: str | None, *, resize: str) -> None:
        super().__init__()
        self.is_published = weights is not None

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.double().mean((2, 3)) / 255


@pytest.fixture
def mean_colours(monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "InceptionFeatures", _MeanColours)
    monkeypatch.setattr(evaluation, "FEATURES", 3)


def test_evaluate_measures_its_samples_and_says_so(model, mean_colours, pictures, tmp_path, capsys):
    model.save_pretrained(tmp_path / "gan")
    output = tmp_path / "out"
    words = ["evaluate", str(tmp_path / "gan"), str(pictures), "-o", str(output), "--device", "cpu"]
    assert main([*words, "--image_size", "8"]) == 2
    said = capsys.readouterr().err
    assert "a GAN generates pictures and reconstructs none" in said
    assert said.count("\n") == 1
    assert main([*words, "--image_size", "8", "--random_features", "true"]) == 0
    found = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    assert found["model"]["class"] == "GAN"
    assert set(found["figures"]) == {"random_inception_distance"}
    assert found["figures"]["random_inception_distance"]["value"] > 0
    assert found["figures"]["random_inception_distance"]["images"] == 3
    for text in ((output / "report.html").read_text(encoding="utf-8"), capsys.readouterr().out):
        assert "random-feature distance (not FID)" in text
