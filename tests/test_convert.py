"""Checkpoints of other projects: every published layout at full size, files as they are saved, and files that lie."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published_layouts import LAYOUTS, PUBLISHED, Architecture, lossy_extras, published
from safetensors.torch import save_file
from torch import Tensor
from vqkernels.models import VQGAN, VQVAE, VQVAEConfig, load_foreign, load_preset, load_pretrained, save_diffusers
from vqkernels.models.layouts import check_weights, infer_config, network_weights, to_diffusers, to_ours
from vqkernels.models.weight_files import read_weights

from vqkernels.cli.main import main

SMALL = Architecture(
    ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_levels=(2,), z_channels=8, embed_dim=4, n_embed=24
)


def state_of(layout: str, of: Architecture = SMALL, seed: int = 0) -> dict[str, Tensor]:
    """A state_dict with the names of a layout; the same numbers in every layout, as the lists agree place by place."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(shape, generator=generator) * 0.1 for _, shape in published(of, "taming")]
    return {name: x.reshape(shape) for (name, shape), x in zip(published(of, layout), numbers, strict=True)}


def extras() -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in lossy_extras()}


def images_of(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def saved(path: Path, data: object, **options) -> Path:
    torch.save(data, path, **options)
    return path


def assert_same_network(model: VQGAN, state: dict[str, Tensor]) -> None:
    """`state` has taming's names."""
    found = network_weights(model)
    found["quantize.embedding.weight"] = found.pop("quantizer.codebook")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


# Names and shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_state_dicts_at_full_size_have_no_missing_and_no_unexpected_key(name):
    of = PUBLISHED[name]
    layout = "llamagen" if name.startswith("llamagen") else "taming"
    state = {key: torch.empty(shape, device="meta") for key, shape in published(of, layout)}
    weights = to_ours(state, layout)
    preset = load_preset(name).model
    config = infer_config(weights, quantizer=preset.quantizer)
    check_weights(weights, config)
    assert config.attention == preset.attention
    assert dataclasses.replace(config, attention_resolutions=preset.attention_resolutions) == preset
    with torch.device("meta"):
        model = VQGAN(preset)
    result = model.load_state_dict(weights, strict=False, assign=True)
    assert not result.unexpected_keys
    statistics = {f"quantizer.{each}" for each in ("window_counts", "last_used", "step", "seed", "initialized")}
    assert set(result.missing_keys) <= statistics


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["f16-1024", "f4-noattn"])
def test_every_layout_of_one_network_is_the_same_network(layout, name):
    of = PUBLISHED[name]
    places = {key: place for place, (key, _) in enumerate(published(of, "taming"))}
    state = {key: torch.empty(shape, device="meta") for key, shape in published(of, layout)}
    rules = layout.removesuffix("-old")
    shapes = {key: tuple(tensor.shape) for key, tensor in to_ours(state, rules).items()}
    marked = {key: torch.tensor(float(place)) for place, key in enumerate(state)}
    found = {key: int(tensor) for key, tensor in to_ours(marked, rules).items()}
    found["quantize.embedding.weight"] = found.pop("quantizer.codebook")
    shapes["quantize.embedding.weight"] = shapes.pop("quantizer.codebook")
    assert found == places
    assert shapes == dict(published(of, "taming"))


def test_names_for_diffusers_are_diffusers():
    from diffusers import VQModel

    model = VQGAN(infer_config(to_ours(state_of("taming"), "taming")))
    ours = {name: tuple(tensor.shape) for name, tensor in to_diffusers(network_weights(model)).items()}
    assert ours == dict(published(SMALL, "diffusers"))
    blocks = ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D")
    theirs = VQModel(
        down_block_types=blocks,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32, 64),
        latent_channels=8,
        vq_embed_dim=4,
        num_vq_embeddings=24,
    )
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}


# Files as projects save them


def _lightning(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A checkpoint of pytorch-lightning with objects of its classes, which are not installed when it is read."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")

    class ModelCheckpoint:
        pass

    class AttributeDict(dict):
        pass

    for kind in (ModelCheckpoint, AttributeDict):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return {
        "epoch": 3,
        "state_dict": state,
        "callbacks": {ModelCheckpoint: {"best": torch.tensor(1.0), "score": np.float64(0.5)}},
        "hyper_parameters": AttributeDict(lr=1e-4, notes=ModelCheckpoint()),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_lightning_checkpoint_with_its_losses_and_callbacks(tmp_path, monkeypatch, zipped):
    state = state_of("taming")
    with monkeypatch.context() as patch:
        data = _lightning({**state, **extras()}, patch)
        path = saved(tmp_path / "last.ckpt", data, _use_new_zipfile_serialization=zipped)
    found = load_foreign(path)
    assert (found.layout, found.weights, found.skipped) == ("taming", "raw", {"loss": len(extras())})
    assert_same_network(found.model, state)
    assert "pytorch_lightning" not in sys.modules
    assert (found.model.config.quantizer.commitment_weight, found.model.config.quantizer.codebook_weight) == (1.0, 0.25)


def test_averaged_weights_of_a_training_are_taken_where_there_are_some(tmp_path):
    state, averaged = state_of("taming"), state_of("taming", seed=1)
    shadows = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in averaged.items()}
    more = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}
    path = saved(tmp_path / "a.ckpt", {"state_dict": {**state, **shadows, **more}})
    for which, wanted, name in (("auto", averaged, "ema"), ("ema", averaged, "ema"), ("raw", state, "raw")):
        found = load_foreign(path, weights=which)
        assert found.weights == name
        assert_same_network(found.model, wanted)
    shadows.popitem()
    with pytest.raises(ValueError, match=r"a.ckpt: the averaged weights are incomplete: missing decoder.conv_out.bias"):
        load_foreign(saved(path, {"state_dict": {**state, **shadows}}))
    with pytest.raises(ValueError, match="expected averaged weights for 'ema', found none"):
        load_foreign(saved(path, {"state_dict": state}), weights="ema")


def test_llamagen_as_it_is_saved(tmp_path):
    state, averaged = state_of("llamagen"), state_of("llamagen", seed=1)
    used = {"quantize.codebook_used": torch.zeros(65536)}
    data = {"model": {**state, **used}, "steps": 3, "args": argparse.Namespace(vq_model="VQ-16")}
    found = load_foreign(saved(tmp_path / "vq.pt", data))
    assert (found.layout, found.weights, found.skipped) == ("llamagen", "raw", {"quantize": 1})
    assert found.model.config.quantizer.metric == "cosine"
    assert_same_network(found.model, state_of("taming"))
    found = load_foreign(saved(tmp_path / "vq.pt", {**data, "ema": averaged}))
    assert found.weights == "ema"
    assert_same_network(found.model, state_of("taming", seed=1))


@pytest.mark.parametrize("prefix", ["module.", "first_stage_model.", "module._orig_mod."])
def test_an_autoencoder_inside_another_model(tmp_path, prefix):
    inner = {f"{prefix}{name}": tensor for name, tensor in {**state_of("taming"), **extras()}.items()}
    path = tmp_path / "model.safetensors"
    save_file({**inner, "betas": torch.zeros(3)}, path)
    found = load_foreign(path)
    assert found.skipped == {"betas": 1, "loss": len(extras())}
    assert_same_network(found.model, state_of("taming"))


def test_half_precision_weights_become_float32(tmp_path):
    state = {name: tensor.half() for name, tensor in state_of("taming").items()}
    model = load_foreign(saved(tmp_path / "a.pth", state)).model
    assert {tensor.dtype for tensor in network_weights(model).values()} == {torch.float32}


def test_diffusers_there_and_back(tmp_path):
    from diffusers import VQModel

    state = state_of("taming")
    model = load_foreign(saved(tmp_path / "a.ckpt", {"state_dict": state})).model
    save_diffusers(model, tmp_path / "out")
    theirs = VQModel.from_pretrained(tmp_path / "out").eval()
    images = images_of(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(images).latents, model.tokens(images), atol=1e-5, rtol=0)
        latents = model.quantizer.lookup(model.encode(images))
        wanted = theirs.decode(latents, force_not_quantize=True).sample
        torch.testing.assert_close(model.decode(model.encode(images)), wanted.clamp(-1, 1), atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "back")
    back = load_foreign(tmp_path / "back", resolution=64)
    assert (back.layout, back.model.config.resolution) == ("diffusers", 64)
    assert back.model.config.attention_resolutions == [16]
    assert_same_network(back.model, state)


def test_diffusers_config_is_obeyed_and_its_other_kinds_are_refused(tmp_path):
    save_file(state_of("diffusers-old"), tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "VQModel", "norm_num_groups": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_foreign(tmp_path).model.config.norm_groups == 16
    for name, value in (("_class_name", "AutoencoderKL"), ("norm_type", "spatial"), ("act_fn", "gelu")):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=rf"config.json: {name}: expected .* got '{value}'"):
            load_foreign(tmp_path)


def test_what_diffusers_cannot_express_is_not_exported(tmp_path):
    model = VQGAN(infer_config(to_ours(state_of("llamagen"), "llamagen")))
    model.config.quantizer.metric = "cosine"
    with pytest.raises(ValueError, match=r"quantizer.metric: .* got cosine"):
        save_diffusers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Files that are not what they should be


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "named"), [(os.mkdir, r"posix.mkdir|nt.mkdir"), (eval, "builtins.eval"), (torch.hub.load, "torch.hub")]
)
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path, zipped, protocol, function, named):
    victim = tmp_path / "victim"
    data = {"state_dict": state_of("taming"), "more": Evil(function, str(victim))}
    path = saved(tmp_path / "evil.ckpt", data, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    named = named if protocol == 2 or "torch" not in named else "Unsupported"
    with pytest.raises(ValueError, match=rf"evil.ckpt: (refused, nothing .* call|cannot be read).*({named})"):
        load_foreign(path)
    assert not victim.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_named(tmp_path, kind):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.ckpt")
    if kind == "safetensors":
        save_file(state_of("taming"), path)
    else:
        saved(path, state_of("taming"), _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{path.name}: truncated|cannot be read"):
            load_foreign(path)
        if length in (0, len(whole) // 2):
            with pytest.raises(ValueError, match=rf"{path.name}: truncated"):
                read_weights(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.ckpt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "pointer of Git LFS"),
        ("a.safetensors", b"<!DOCTYPE html><html>", "web page"),
        ("a.safetensors", b"\xff" * 64, "header is damaged"),
        ("a.safetensors", b"\x10" + b"\0" * 7 + b"not json at all!" + b"x" * 50, "header is damaged"),
        ("a.ckpt", b"not a checkpoint at all", "cannot be read"),
        ("a.gguf", b"GGUF", "expected a file that ends in .safetensors, .ckpt"),
    ],
)
def test_other_files_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_foreign(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_foreign(tmp_path / "nowhere.ckpt")


def _without(*gone: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_of("taming").items() if not name.startswith(gone)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (_without("decoder.up.1.block.1.conv1"), r"missing decoder.up.1.block.1.conv1.bias, decoder.up.1"),
        (_without("encoder.mid.block_2"), r"missing encoder.mid.block_2.conv1.bias, .* and 2 more"),
        (_without("encoder.conv_in.weight"), r"encoder.conv_in.weight is missing"),
        (_without("quantize"), r"quantizer.codebook is missing"),
        ({**state_of("taming"), "quantize.used": torch.zeros(3)}, r"unexpected quantize.used"),
        (
            {**state_of("taming"), "decoder.conv_in.weight": torch.zeros(64, 9, 3, 3)},
            r"of another shape decoder.conv_in.weight \[64, 9, 3, 3\] instead of \[64, 8, 3, 3\]",
        ),
        ({**state_of("taming"), **state_of("llamagen")}, "found names of taming and llamagen"),
        ({"a.weight": torch.zeros(3)}, r"one layout of taming, llamagen, diffusers, found none; it has a.weight"),
        ({"epoch": 3}, "found no tensor"),
    ],
)
def test_incomplete_and_ambiguous_files_name_the_keys(tmp_path, state, message):
    with pytest.raises(ValueError, match=rf"a.ckpt: .*{message}"):
        load_foreign(saved(tmp_path / "a.ckpt", state))


def test_names_that_several_projects_share_need_a_word_from_the_user(tmp_path):
    of = dataclasses.replace(SMALL, num_res_blocks=4)
    path = saved(tmp_path / "a.ckpt", {"state_dict": state_of("taming", of)})
    with pytest.raises(ValueError, match=r"a.ckpt: layout: more than 2 blocks .* taming and ibq"):
        load_foreign(path)
    assert load_foreign(path, layout="taming").model.config.blocks == 4
    found = load_foreign(path, layout="ibq")
    images = images_of(2, 3, 16, 24)
    with torch.no_grad():
        wanted = found.model.tokens(images).movedim(1, -1) @ state_of("taming", of)["quantize.embedding.weight"].T
    assert torch.equal(found.model.encode(images), wanted.argmax(-1))
    assert (found.layout, found.model.config.quantizer.gradient) == ("ibq", "index_propagation")
    with pytest.raises(ValueError, match="layout: its names are those of taming, got 'llamagen'"):
        load_foreign(path, layout="llamagen")
    with pytest.raises(ValueError, match=r"layout: expected one of auto, taming"):
        load_foreign(path, layout="vqgan")


# The command


def test_convert_then_every_command_takes_the_model(tmp_path, capsys):
    path = saved(tmp_path / "vq.pt", {"model": state_of("llamagen")})
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    assert main(["convert", str(path), "-o", model]) == 0
    shown = capsys.readouterr().out
    assert "llamagen" in shown
    assert "24 of 4 numbers, cosine" in shown
    pixels = np.random.default_rng(0).integers(0, 256, (18, 24, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    images = str(tmp_path / "images")
    assert main(["reconstruct", model, images, "-o", out, "--device", "cpu"]) == 0
    codes = str(tmp_path / "codes")
    assert main(["encode", model, images, "-o", codes, "--image_size", "16", "--device", "cpu"]) == 0
    assert main(["decode", model, codes, "-o", str(tmp_path / "back"), "--device", "cpu"]) == 0
    assert (tmp_path / "back" / "a.png").is_file()
    assert main(["audit", model, "--images", images, "--device", "cpu"]) == 0


def test_convert_to_diffusers_and_its_mistakes(tmp_path, capsys):
    path = saved(tmp_path / "a.ckpt", {"state_dict": state_of("taming")})
    assert main(["convert", str(path), "-o", str(tmp_path / "own")]) == 0
    assert main(["convert", str(tmp_path / "own"), "-o", str(tmp_path / "theirs"), "--to", "diffusers"]) == 0
    assert_same_network(load_foreign(tmp_path / "theirs").model, state_of("taming"))
    before = copy.deepcopy(load_pretrained(tmp_path / "own").state_dict())
    VQVAE(VQVAEConfig(channels=16, channel_multipliers=[1], blocks=1)).save_pretrained(tmp_path / "vqvae")
    capsys.readouterr()
    for words, said in (
        ([str(path), "-o", str(tmp_path / "own")], "--output: expected a new or an empty folder"),
        ([str(tmp_path / "nowhere.ckpt")], "nowhere.ckpt"),
        (
            [str(tmp_path / "vqvae"), "-o", str(tmp_path / "x"), "--to", "diffusers"],
            "expected a VQGAN or KLVAE, got a VQVAE",
        ),
        ([str(path), "-o", str(tmp_path / "x"), "--to", "taming"], "--to: expected one of"),
    ):
        assert main(["convert", *words]) == 2
        assert said in capsys.readouterr().err
    assert all(torch.equal(before[name], x) for name, x in load_pretrained(tmp_path / "own").state_dict().items())
