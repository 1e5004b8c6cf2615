"""KLVAE: its divergence by torch.distributions, its network by diffusers', sizes, folders, checkpoints and training."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence
from vqkernels.models import (
    KLVAE,
    VQGAN,
    KLVAEConfig,
    Posterior,
    TrainConfig,
    VQGANConfig,
    load_config,
    load_foreign,
    load_preset,
    load_pretrained,
    preset_names,
    save_config,
    save_diffusers,
    train,
)
from vqkernels.models.layouts import network_weights, to_diffusers
from vqkernels.models.noise import Noise, normal

from vqkernels.cli.main import main


def small_config(**changes) -> KLVAEConfig:
    options = {
        "channels": 32,
        "channel_multipliers": [1, 2],
        "blocks": 1,
        "resolution": 32,
        "attention_resolutions": [16],
        "latent_channels": 3,
    }
    return KLVAEConfig(**{**options, **changes})


def images_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def spread(model: KLVAE) -> KLVAE:
    """Weights large enough for means and variances that matter, some of them beyond the clamp."""
    with torch.no_grad():
        model.quant_conv.weight.mul_(8)
        model.quant_conv.bias[-1] = 25.0
    return model


@pytest.fixture
def model() -> KLVAE:
    torch.manual_seed(0)
    return KLVAE(small_config()).eval()


# The formula


def test_the_divergence_is_that_of_torch_distributions():
    torch.manual_seed(0)
    model = spread(KLVAE(small_config(kl_weight=0.5))).double()
    images = images_of(3, 3, 8, 12).double()
    moments = model.quant_conv(model.encoder(images))
    logvar = moments[:, 3:].clamp(-30, 20)
    assert (logvar == 20).any()
    of = Normal(moments[:, :3], logvar.exp().sqrt())
    expected = kl_divergence(of, Normal(0.0, 1.0)).sum() / 3  # summed over an image's latents, mean over the batch
    out = model(images)
    torch.testing.assert_close(out.kl, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss, 0.5 * expected / (3 * 8 * 12), rtol=1e-12, atol=0)
    mine = torch.autograd.grad(out.kl, model.quant_conv.weight)[0]
    theirs = torch.autograd.grad(expected, model.quant_conv.weight)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_balance_of_error_and_divergence_is_the_published_one(model):
    """Published: the sum of an image's absolute errors + kl_weight * KL; ours is that over the number of its values."""
    model.config.kl_weight = 0.3
    images = images_of(2, 3, 16, 16)
    out = model(images)
    published = (out.reconstruction - images).abs().sum() / 2 + 0.3 * out.posterior.kl().mean()
    ours = (out.reconstruction - images).abs().mean() + out.loss
    torch.testing.assert_close(ours * images[0].numel(), published)


def test_samples_have_mean_and_deviation_of_the_posterior():
    of = Posterior(torch.tensor([1.0, -2.0]).view(1, 2, 1, 1), torch.tensor([0.0, 2.0]).view(1, 2, 1, 1))
    noise = torch.randn(20_000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    drawn = of.sample(noise)
    torch.testing.assert_close(drawn.mean(0, keepdim=True), of.mean, rtol=0, atol=0.06)
    torch.testing.assert_close(drawn.std(0, keepdim=True), of.logvar.mul(0.5).exp(), rtol=0.02, atol=0)


def test_noise_is_normal_and_a_function_of_seed_and_step():
    seed, step = torch.tensor(3), torch.tensor(5)
    drawn = normal((4, 5, 50, 101), seed, step)
    assert torch.equal(drawn, normal((4, 5, 50, 101), seed, step))
    flat = drawn.flatten().double().sort().values
    assert flat.isfinite().all()
    expected = Normal(0.0, 1.0).cdf(flat)
    uniform = torch.arange(1, len(flat) + 1) / len(flat)
    assert (expected - uniform).abs().max() < 1.63 / len(flat) ** 0.5  # Kolmogorov and Smirnov, at 1 %
    halves = drawn.flatten()[: len(flat) // 2], drawn.flatten()[len(flat) // 2 :]  # of Box and Muller's pairs
    assert torch.corrcoef(torch.stack(halves))[0, 1].abs() < 4 / len(halves[0]) ** 0.5
    others = normal((4, 5, 50, 101), seed + 1, step), normal((4, 5, 50, 101), seed, step + 1)
    for other in others:
        assert torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1].abs() < 4 / len(flat) ** 0.5
    assert normal((3,), seed, step).shape == (3,)


def test_noise_goes_on_where_its_state_left_off_and_differs_between_ranks(monkeypatch):
    torch.manual_seed(0)
    one = Noise()
    one((2, 3))
    other = Noise()
    other.load_state_dict(one.state_dict())
    second = one((2, 3))
    assert torch.equal(other((2, 3)), second)
    other.draw -= 1
    monkeypatch.setattr("vqkernels.models.noise.rank_and_world", lambda: (1, 2))
    assert not torch.equal(other((2, 3)), second)


# The network


@pytest.mark.parametrize(
    "changes", [{}, {"attention_resolutions": [], "mid_attention": False}, {"channel_multipliers": [1, 1, 2]}]
)
def test_it_is_diffusers_autoencoder_kl(changes, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = spread(KLVAE(small_config(**changes))).eval()
    save_diffusers(model, tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path).eval()
    images = images_of(2, 3, 16, 24)
    with torch.no_grad():
        expected, found, out = theirs.encode(images).latent_dist, model.posterior(images), model(images)
        torch.testing.assert_close(found.mean, expected.mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.logvar, expected.logvar, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.kl(), expected.kl(), atol=0, rtol=1e-4)
        torch.testing.assert_close(out.reconstruction, theirs.decode(expected.mode()).sample, atol=1e-4, rtol=0)
    assert out.reconstruction.std() > 1e-2
    again = load_foreign(tmp_path)
    assert isinstance(again.model, KLVAE)
    assert again.layout == "diffusers"
    assert torch.equal(again.model.encode(images), model.encode(images))


def test_the_published_shape_is_that_of_diffusers():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        ours = to_diffusers(network_weights(KLVAE(load_preset("kl-f8").model)))
        theirs = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_checkpoints_of_latent_diffusion(model, prefix, tmp_path):
    """As its first stage alone is saved with the weights of its loss, and as a whole latent diffusion model is."""
    state = {prefix + name: x for name, x in network_weights(model).items()}
    beside = "model.diffusion_model.out.0.weight" if prefix else "loss.logvar"
    torch.save({"state_dict": {**state, beside: torch.zeros(3)}}, tmp_path / "model.ckpt")
    found = load_foreign(tmp_path / "model.ckpt", resolution=32)
    assert (found.layout, found.weights) == ("taming", "raw")
    assert sum(found.skipped.values()) == 1
    assert found.model.config == model.config
    assert found.model.fingerprint() == model.fingerprint()


def test_an_incomplete_checkpoint_is_named(model, tmp_path):
    state = network_weights(model)
    del state["quant_conv.bias"]
    torch.save(state, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"not those of one KLVAE: missing quant_conv.bias"):
        load_foreign(tmp_path / "model.ckpt")


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 1)])
def test_any_size_divisible_by_the_factor(grid, model):
    images = images_of(2, 3, 2 * grid[0], 2 * grid[1])
    latents = model.encode(images)
    assert latents.shape == (2, 3, *grid)
    assert model(images).reconstruction.shape == model.decode(latents).shape == images.shape
    with pytest.raises(ValueError, match="model's factor 2, got 3x4"):
        model.encode(torch.zeros(1, 3, 3, 4))


def test_decode_of_encode_is_the_forward_pass_and_trains_nothing(model):
    images = images_of(2, 3, 16, 24)
    with torch.no_grad():
        out = model(images)
    model.train()
    before = copy.deepcopy(model.state_dict())
    latents = model.encode(images)
    torch.testing.assert_close(model.decode(latents), out.reconstruction.clamp(-1, 1))
    assert torch.equal(model.reconstruct(images), model.decode(latents))
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    generators = (torch.Generator().manual_seed(seed) for seed in (0, 0, 1))
    first, same, other = (model.encode(images, sample=True, generator=each) for each in generators)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(model(images).latents, model(images).latents)


@pytest.mark.parametrize(
    "latents", [torch.zeros(1, 4, 2, 2), torch.zeros(3, 2, 2), torch.zeros(1, 3, 2, 2, dtype=torch.long)]
)
def test_wrong_latents_are_refused(model, latents):
    with pytest.raises(ValueError, match=r"latents must be floats of shape \[B, 3, h, w\], got torch"):
        model.decode(latents)


@pytest.mark.parametrize("again", [False, True])
def test_every_weight_learns(again):
    torch.manual_seed(0)
    model = KLVAE(small_config(gradient_checkpointing=again, kl_weight=1e-3))
    images = images_of(2, 3, 16, 16)
    out = model(images)
    ((out.reconstruction - images).square().mean() + out.loss).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        # adding to every key changes no softmax: that gradient is zero but for rounding
        assert name.endswith("k.bias") or weight.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_bit():
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = KLVAE(small_config(gradient_checkpointing=again, dropout=0.2))
        images = images_of(2, 3, 16, 16)
        out = model(images)
        ((out.reconstruction - images).square().mean() + out.loss).backward()
        found.append([out.latents.detach(), *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_compiled_and_other_number_formats(model):
    images = images_of(2, 3, 16, 16)
    fast = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(images), model.encode(images))
    wide = copy.deepcopy(model).double()
    assert wide(images.double()).reconstruction.dtype == torch.float64
    half = copy.deepcopy(model).bfloat16()
    assert half(images.bfloat16()).reconstruction.dtype == torch.bfloat16
    assert half.decode(half.encode(images.bfloat16())).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.posterior(images).logvar.dtype == torch.float32


def test_a_compiled_training_step_draws_as_an_eager_one():
    torch.manual_seed(0)
    model = KLVAE(small_config(attention_resolutions=[]))
    other = copy.deepcopy(model)
    images = images_of(1, 3, 8, 8)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(fast(images).latents, other(images).latents)
    assert model.noise.draw == 2


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    for loaded in (KLVAE.from_pretrained(tmp_path), load_pretrained(tmp_path)):
        assert isinstance(loaded, KLVAE)
        assert loaded.config == model.config
        assert loaded.fingerprint() == model.fingerprint()
    assert "latents = model.encode(images)" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_weight": -1.0}, r"kl_weight must be 0 or greater, got -1.0"),
        ({"kl_weight": float("nan")}, r"kl_weight must be 0 or greater, got nan"),
        ({"latent_channels": 0}, "latent_channels must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"norm_groups": 5}, "norm_groups must divide"),
    ],
)
def test_a_wrong_config_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(
    ("name", "factor", "channels", "attended"),
    [("kl-f4", 4, 3, []), ("kl-f8", 8, 4, []), ("kl-f16", 16, 16, [16]), ("kl-f32", 32, 64, [16, 8])],
)
def test_presets(name, factor, channels, attended, tmp_path):
    assert preset_names("klvae") == ["kl-f16", "kl-f32", "kl-f4", "kl-f8"]
    preset = load_preset(name)
    save_config(preset, tmp_path / "copy.yaml")
    assert load_config(tmp_path / "copy.yaml", type(preset)) == preset
    assert preset.here == "not reproduced here"
    config = preset.model
    assert (config.factor, config.latent_channels, config.kl_weight) == (factor, channels, 1e-6)
    assert [256 >> level for level, attends in enumerate(config.attention) if attends] == attended


def test_the_shared_part_of_the_config_left_the_vqgan_as_it_was():
    config = VQGANConfig(channels=32)
    assert next(iter(dataclasses.asdict(config))) == "kind"
    assert VQGAN(dataclasses.replace(config, latent_channels=8)).encoder.conv_out.weight.shape[0] == 8


# Training and commands


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    pixels = (np.random.default_rng(0).random((2, 8, 8, 3)) * 255).astype(np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "klvae"
    config = TrainConfig(
        data=str(pictures),
        validation=str(pictures),
        output=str(output),
        model=small_config(channels=16, norm_groups=8, attention_resolutions=[]),
        image_size=16,
        batch_size=4,
        steps=16,
        learning_rate=2e-3,
        warmup_steps=2,
        weight_ema_decay=0.5,
        threads=1,
        log_every=4,
        device="cpu",
    )
    history = train(config).history
    assert history[-2]["l1"] < history[0]["l1"]
    assert history[0].keys() >= {"psnr", "kl", "latent_std"}
    assert history[-1].keys() == {"step", "held_out_psnr", "held_out_ssim"}
    assert isinstance(load_pretrained(output), KLVAE)
    with Image.open(output / "samples" / "step-00000016.png") as picture:
        assert picture.width < 3 * 160  # two columns of the least width
    return output


def test_reconstruct_has_two_columns(run, pictures, tmp_path, capsys):
    assert main(["reconstruct", str(run), str(pictures), "-o", str(tmp_path)]) == 0
    assert "mean of 2" in capsys.readouterr().out
    with Image.open(tmp_path / "0.png") as plain, Image.open(tmp_path / "0-comparison.png") as beside:
        assert plain.size == (48, 48)
        assert 2 * 160 < beside.width < 3 * 160


def test_commands_that_need_codes_say_so(run, pictures, tmp_path, capsys):
    output = str(tmp_path / "out")
    for command in (
        ["encode", str(run), str(pictures), "-o", output],
        ["decode", str(run), str(pictures), "-o", output],
        ["audit", str(run), "--images", str(pictures)],
    ):
        assert main(command) == 2
        assert "expected a model with codes, got a KLVAE, which has none" in capsys.readouterr().err
    assert main(["profile", "--training", str(run / "config.yaml"), "-o", output]) == 2
    assert "expected a model with one quantizer that searches a codebook" in capsys.readouterr().err


def test_export_and_convert_take_it(run, tmp_path, capsys):
    assert main(["export", str(run), "-o", str(tmp_path / "exported")]) == 0
    assert "latents [B, 3, h, w]" in capsys.readouterr().out
    model, images = load_pretrained(run), images_of(3, 3, 8, 12)
    names = ("encoder", "decoder")
    encoder, decoder = (torch.export.load(tmp_path / "exported" / f"{name}.pt2").module() for name in names)
    torch.testing.assert_close(encoder(images), model.encode(images))
    torch.testing.assert_close(decoder(encoder(images)), model.reconstruct(images))
    assert main(["convert", str(run), "-o", str(tmp_path / "theirs"), "--to", "diffusers"]) == 0
    assert "diffusers.AutoencoderKL" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "back")]) == 0
    assert "3 channels, continuous" in capsys.readouterr().out
    assert torch.equal(load_pretrained(tmp_path / "back").encode(images), model.encode(images))
