"""HierarchicalVQVAE: its two levels of codes, learning, files, training, pictures and commands."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from two_ranks import train_with_two_ranks
from vqkernels.models import (
    VQVAE,
    CodesWriter,
    EntropyConfig,
    HierarchicalVQVAE,
    HierarchicalVQVAEConfig,
    LookupFreeConfig,
    QuantizerConfig,
    TrainConfig,
    evaluate,
    load_config,
    load_pretrained,
    open_codes,
    train,
)
from vqkernels.models.code_files import level_folders
from vqkernels.models.run_log import read_metrics

from vqkernels.cli.main import main

GRADIENT = {"update": "gradient", "kmeans_init": False}


def small_config(**changes) -> HierarchicalVQVAEConfig:
    options = {
        "channels": 8,
        "channel_multipliers": [1, 2],
        "blocks": 1,
        "latent_channels": 6,
        "top_quantizer": QuantizerConfig(16, kmeans_init=False, dead_code_threshold=0.0),
        "bottom_quantizer": QuantizerConfig(32, kmeans_init=False, dead_code_threshold=0.0),
    }
    return HierarchicalVQVAEConfig(**{**options, **changes})


def images_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def model() -> HierarchicalVQVAE:
    torch.manual_seed(0)
    return HierarchicalVQVAE(small_config()).eval()


@pytest.mark.parametrize(
    ("patch_size", "multipliers", "factor"), [(1, [1], 2), (1, [1, 2], 4), (2, [1, 1], 8), (4, [1], 8)]
)
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_any_size_divisible_by_the_factor(patch_size, multipliers, factor, grid):
    model = HierarchicalVQVAE(small_config(patch_size=patch_size, channel_multipliers=multipliers))
    images = images_of(2, 3, grid[0] * factor, grid[1] * factor)
    codes = model.encode(images)
    assert model.factor == factor
    assert model(images).reconstruction.shape == images.shape
    assert codes.top.shape == (2, *grid)
    assert codes.bottom.shape == (2, 2 * grid[0], 2 * grid[1])
    assert codes.top.dtype == codes.bottom.dtype == torch.int64
    decoded = model.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1


def test_decode_of_encode_is_the_forward_pass_and_trains_nothing(model):
    images = images_of(2, 3, 16, 24)
    with torch.no_grad():
        out = model(images)
    model.train()
    before = copy.deepcopy(model.state_dict())
    codes = model.encode(images)
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    assert torch.equal(codes.top, out.top.codes)
    assert torch.equal(codes.bottom, out.bottom.codes)
    assert min(each.unique().numel() for each in codes) > 1
    torch.testing.assert_close(model.decode(codes), out.reconstruction.clamp(-1, 1))
    torch.testing.assert_close(model.reconstruct(images), model.decode(codes))
    assert torch.equal(model.decode((codes.top.int(), codes.bottom.int())), model.decode(codes))


def test_it_is_the_paper_in_plain_modules(model):
    """Eq. by eq., from the parts, in evaluation."""
    images = images_of(1, 3, 16, 16)
    with torch.no_grad():
        features = model.bottom_encoder(images)
        top = model.top_quantizer(model.to_top(model.top_encoder(features))).quantized
        said = model.top_decoder(top)
        assert said.shape == features.shape
        bottom = model.bottom_quantizer(model.to_bottom(torch.cat([features, said], 1))).quantized
        image = model.decoder(torch.cat([model.widen_top(top), bottom], 1))
        out = model(images)
    assert torch.equal(out.reconstruction, image)
    assert torch.equal(out.loss, out.top.loss + out.bottom.loss)


def test_the_bottom_codes_are_conditioned_on_the_top_ones(model):
    """Of the same features, other top codes ask for other bottom codes, and both reach the picture."""
    images = images_of(1, 3, 16, 16)
    with torch.no_grad():
        features, codes = model.bottom_encoder(images), model.encode(images)
        tokens = [model._bottom_tokens(features, model.top_quantizer.lookup(top)) for top in (codes.top, codes.top ^ 1)]
        assert not torch.allclose(*tokens)
        image = model.decode(codes)
        assert not torch.allclose(model.decode((codes.top ^ 1, codes.bottom)), image)
        assert not torch.allclose(model.decode((codes.top, codes.bottom ^ 1)), image)


@pytest.mark.parametrize(
    "quantizers",
    [
        {},
        {"top_quantizer": QuantizerConfig(16, codebook_dim=4, **GRADIENT), "group_norm": False},
        {"top_quantizer": LookupFreeConfig(codebook_dim=6), "bottom_quantizer": LookupFreeConfig(codebook_dim=5)},
    ],
)
def test_every_weight_learns(quantizers):
    torch.manual_seed(0)
    model, images = HierarchicalVQVAE(small_config(**quantizers)), images_of(2, 3, 16, 16)
    with torch.no_grad():  # blocks start as the identity; a step's worth of noise opens them
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    out = model(images)
    ((out.reconstruction - images).square().mean() + out.loss).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_both_codebooks_learn(model):
    model.train()
    before = [module.codebook.clone() for module in (model.top_quantizer, model.bottom_quantizer)]
    model(images_of(2, 3, 16, 16))
    model.update_codebooks()
    after = [module.codebook for module in (model.top_quantizer, model.bottom_quantizer)]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_figures_are_those_of_both_levels():
    entropy = EntropyConfig(weight=0.2)
    quantizer = QuantizerConfig(32, kmeans_init=False, entropy=entropy)
    model = HierarchicalVQVAE(small_config(bottom_quantizer=quantizer))
    out = model(images_of(2, 3, 16, 16))
    found = dict(zip(model.figure_names, model.figures(out), strict=True))
    names = ("commitment_loss", "perplexity", "usage")
    entropies = ("entropy_loss", "token_entropy", "batch_entropy")
    expected = [f"top_{name}" for name in names] + [f"bottom_{name}" for name in (*names, *entropies)]
    assert list(found) == ["quantizer_loss", *expected]
    assert found["quantizer_loss"] == out.top.loss + out.bottom.loss
    assert found["top_usage"] == out.top.usage
    assert found["bottom_token_entropy"] == out.bottom.token_entropy


def test_half_precision_and_autocast_keep_tokens_wide(model):
    images = images_of(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    assert out.top.quantized.dtype == out.bottom.quantized.dtype == torch.float32
    half = copy.deepcopy(model).bfloat16()
    assert half.decode(half.encode(images.bfloat16())).dtype == torch.float32


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path / "run" / "model")
    loaded = load_pretrained(tmp_path / "run")
    assert isinstance(loaded, HierarchicalVQVAE)
    assert loaded.config == model.config
    assert loaded.fingerprint() == model.fingerprint()
    images = images_of(1, 3, 16, 16)
    assert torch.equal(loaded.encode(images).bottom, model.encode(images).bottom)
    with torch.no_grad():
        loaded.top_quantizer.codebook[3, 1] += 1e-6
    assert loaded.fingerprint() != model.fingerprint()
    with pytest.raises(ValueError, match="is not the config of a VQVAE"):
        VQVAE.from_pretrained(tmp_path / "run")
    values = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert HierarchicalVQVAEConfig(**values) == model.config  # as huggingface_hub restores it


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ((torch.zeros(1, 2, 2).long(),), r"codes must be a pair \(top, bottom\), got 1 of them"),
        ((torch.full((1, 2, 2), 16), torch.zeros(1, 4, 4).long()), r"top codes must lie in \[0, 15\], got 16 to 16"),
        ((torch.zeros(1, 2, 2).long(), torch.full((1, 4, 4), -1)), r"bottom codes must lie in \[0, 31\], got -1 to -1"),
        ((torch.zeros(1, 2, 2), torch.zeros(1, 4, 4).long()), r"top codes must be integers of shape \[B, h, w\]"),
        (
            (torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 4).long()),
            r"bottom codes must be \[1, 4, 4\] for top codes \[1, 2, 2\], got \[1, 2, 4\]",
        ),
    ],
)
def test_wrong_codes_are_refused(model, codes, message):
    with pytest.raises(ValueError, match=message):
        model.decode(codes)


def test_wrong_images_are_refused(model):
    with pytest.raises(ValueError, match=r"images .* factor 4, got 18x16"):
        model.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\], got \[1, 1, 16, 16\]"):
        model(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 0}, r"channels must be at least 1, got 0"),
        ({"latent_channels": 0}, r"latent_channels must be at least 1, got 0"),
        ({"channel_multipliers": []}, r"channel_multipliers must be positive integers"),
        ({"top_quantizer": {"codebok_size": 3}}, r"unknown option 'top_quantizer.codebok_size'; did you mean"),
        ({"bottom_quantizer": {"kind": "rvq"}}, r"option 'bottom_quantizer.kind' must be one of vq, lfq, got 'rvq'"),
        ({"bottom_quantizer": {"metric": "dot"}}, r"gradient must be index_propagation with metric: dot"),
    ],
)
def test_a_wrong_config_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_the_bundled_config():
    config = load_config("vqvae2-256")
    assert (config.model.kind, config.model.factor) == ("vqvae2", 8)
    quantizers = (config.model.top_quantizer, config.model.bottom_quantizer)
    assert [each.codebook_size for each in quantizers] == [512, 512]


def test_evaluation_and_its_picture(model):
    found = evaluate(model, images_of(3, 3, 32, 48))
    assert [level.name for level in found.levels] == ["top", "bottom"]
    assert [level.codes.shape for level in found.levels] == [(3, 8, 12), (3, 16, 24)]
    assert found.bits_per_pixel.fixed == pytest.approx(4 / 16 + 5 / 4)
    figures = found.figures()
    assert figures["held_out_top_usage"] == found.levels[0].usage.usage
    assert figures["held_out_bottom_perplexity"] == found.levels[1].usage.perplexity
    assert figures["held_out_bits_per_pixel"] == pytest.approx(sum(x.bits_per_pixel.entropy for x in found.levels))
    whole = found.picture()
    single = dataclasses.replace(found, levels=found.levels[:1]).picture()
    assert whole.width > single.width  # a column for either level
    assert whole.height == single.height


def test_code_files_of_one_level_and_of_another(model, tmp_path):
    codes = model.encode(images_of(2, 3, 16, 16))
    folders = level_folders(tmp_path, model)
    assert folders == {"top": tmp_path / "top", "bottom": tmp_path / "bottom"}
    for (name, folder), each in zip(folders.items(), codes, strict=True):
        with CodesWriter(folder, model, name) as writer:
            writer.append(each, ["a.png", "b.png"])
    top, bottom = (open_codes(folder, model) for folder in folders.values())
    assert (top.meta.factor, top.meta.codebook_size, bottom.meta.factor, bottom.meta.codebook_size) == (4, 16, 2, 32)
    assert np.array_equal(bottom.codes, codes.bottom.numpy())
    for level in (None, "codes"):
        with pytest.raises(ValueError, match=rf"level: expected one of top, bottom, got {level!r}"):
            CodesWriter(tmp_path / "new", model, level)
    assert not (tmp_path / "new").exists()


# ---- training and the commands


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    down, across = np.mgrid[0:32, 0:32] / 32
    for number in range(3):
        waves = [np.sin(6 * (number + 1) * down + channel + 5 * across) for channel in range(3)]
        Image.fromarray((np.stack(waves, axis=-1) * 110 + 128).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def run_config(pictures: Path, output: Path, **changes) -> TrainConfig:
    options = {
        **{"image_size": 16, "batch_size": 4, "steps": 3, "warmup_steps": 2, "learning_rate": 2e-3, "threads": 1},
        **{"weight_ema_decay": 0.9, "device": "cpu", "log_every": 1, "model": small_config()},
    }
    return TrainConfig(data=str(pictures), output=str(output), **{**options, **changes})


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "hierarchy"
    train(run_config(pictures, output, validation=str(pictures), steps=40, log_every=10))
    return output


def test_training_lowers_the_loss_and_logs_both_levels(run):
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    for line in lines:
        assert {"quantizer_loss", "top_usage", "bottom_usage", "top_perplexity", "bottom_perplexity"} <= line.keys()
        assert line["loss"] == pytest.approx(line["l1"] + line["mse"] + line["quantizer_loss"], rel=1e-4)
    held_out = [line for line in read_metrics(run) if "held_out_psnr" in line][-1]
    assert {"held_out_top_usage", "held_out_bottom_usage", "held_out_bits_per_pixel"} <= held_out.keys()
    assert isinstance(load_pretrained(run), HierarchicalVQVAE)
    assert load_config(run / "config.yaml").model == small_config()
    with Image.open(next((run / "samples").glob("*.png"))) as picture:
        assert picture.width > 4 * 16


def test_a_collapse_of_either_level_is_reported(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("vqkernels.models.training.COLLAPSE_FROM", 1)
    with pytest.warns(UserWarning, match="of the codebook is in use"):
        train(run_config(pictures, tmp_path, collapse_usage=1.0, steps=1))


def test_resume_takes_the_exact_next_step(pictures, tmp_path):
    whole = train(run_config(pictures, tmp_path / "whole", steps=4))
    part = run_config(pictures, tmp_path / "parts", steps=4, checkpoint_every=2)

    class StopError(Exception):
        pass

    def stop(report) -> None:
        if report.step == 3:
            raise StopError

    with pytest.raises(StopError):
        train(part, progress=stop)
    resumed = train(dataclasses.replace(part, resume=True))
    assert resumed.model.fingerprint() == whole.model.fingerprint()


def test_two_processes_equal_one_with_the_joined_batch(pictures, tmp_path):
    alone = train(run_config(pictures, tmp_path / "alone", batch_size=4, steps=2))
    train_with_two_ranks(run_config(pictures, tmp_path / "both", batch_size=2, steps=2), tmp_path)
    both = load_pretrained(tmp_path / "both").state_dict()
    for name, values in alone.model.state_dict().items():
        # sums in another order differ by float32 rounding; one step moves a weight by up to 2e-3
        torch.testing.assert_close(both[name], values, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_the_commands(run, pictures, tmp_path, capsys):
    assert main(["reconstruct", str(run), str(pictures / "0.png"), "-o", str(tmp_path / "seen")]) == 0
    assert (tmp_path / "seen" / "0-comparison.png").is_file()
    assert main(["encode", str(run), str(pictures), "-o", str(tmp_path / "codes")]) == 0
    printed = capsys.readouterr().out
    assert "of 16" in printed
    assert "of 32" in printed
    assert main(["decode", str(run), str(tmp_path / "codes"), "-o", str(tmp_path / "decoded")]) == 0
    model = load_pretrained(run)
    top, bottom = (
        torch.from_numpy(open_codes(tmp_path / "codes" / name).codes.astype(np.int64)) for name in model.maps
    )
    image = model.decode((top[1:2], bottom[1:2]))[0]
    with Image.open(tmp_path / "decoded" / "1.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).movedim(-1, 0)
    torch.testing.assert_close(pixels / 127.5 - 1, image, atol=1 / 127, rtol=0)


def test_decode_refuses_levels_of_different_images(run, pictures, tmp_path, capsys):
    model = load_pretrained(run)
    codes = model.encode(images_of(2, 3, 16, 16))
    for name, each, files in (("top", codes.top, ["a", "b"]), ("bottom", codes.bottom, ["a", "c"])):
        with CodesWriter(tmp_path / name, model, name) as writer:
            writer.append(each, files)
    assert main(["decode", str(run), str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "expected bottom codes of the same images as top codes" in capsys.readouterr().err


def test_commands_for_one_map_of_codes_say_so(run, pictures, tmp_path, capsys):
    for words in (["export", str(run), "-o", str(tmp_path)], ["audit", str(run), "--images", str(pictures)]):
        assert main(words) == 2
        assert re.search("one map of codes.*, got a HierarchicalVQVAE", capsys.readouterr().err)
    assert main(["profile", "-c", str(run / "config.yaml"), "-o", str(tmp_path), "--device", "cpu"]) == 2
    assert "expected a model with one quantizer that searches a codebook" in capsys.readouterr().err
