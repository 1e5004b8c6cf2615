"""VQGAN: the published network by another implementation and by formula, sizes, errors, folders and presets."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from published_layouts import PUBLISHED
from torch.utils._python_dispatch import TorchDispatchMode
from vqkernels.models import (
    VQGAN,
    VQVAE,
    QuantizerConfig,
    VQGANConfig,
    VQVAEConfig,
    evaluate,
    load_config,
    load_preset,
    load_pretrained,
    preset_names,
    save_config,
)
from vqkernels.models.autoencoder import Attention
from vqkernels.models.convert import diffusers_config
from vqkernels.models.layouts import network_weights, to_diffusers

IBQ = {"update": "gradient", "gradient": "index_propagation", "metric": "dot"}


def small_config(**changes) -> VQGANConfig:
    options = {
        "channels": 16,
        "channel_multipliers": [1, 2, 2],
        "blocks": 1,
        "resolution": 32,
        "attention_resolutions": [8],
        "norm_groups": 8,
        "latent_channels": 8,
        "quantizer": QuantizerConfig(32, codebook_dim=4, update="gradient", kmeans_init=False),
    }
    return VQGANConfig(**{**options, **changes})


def images_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def spread_codebook(model: VQGAN, images: torch.Tensor) -> None:
    """A code close to every token, so that rounding decides none."""
    with torch.no_grad():
        tokens = model.tokens(images).movedim(1, -1).flatten(0, -2)
        assert len(tokens) < len(model.quantizer.codebook)
        model.quantizer.codebook[: len(tokens)] = tokens + 1e-3 * torch.randn_like(tokens)


@pytest.fixture
def model() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(small_config()).eval()


def _against_diffusers(model: VQGAN, images: torch.Tensor) -> None:
    from diffusers import VQModel

    theirs = VQModel.from_config(diffusers_config(model)).eval()
    theirs.load_state_dict(to_diffusers(network_weights(model)), strict=True)
    spread_codebook(model, images)
    theirs.quantize.embedding.weight.data.copy_(model.quantizer.codebook)
    with torch.no_grad():
        ours = model(images)
        codes = theirs.quantize(theirs.encode(images).latents)[2][2]
        reconstruction = theirs(images).sample
    assert torch.equal(ours.quantizer.codes.flatten(), codes)
    assert codes.unique().numel() == codes.numel()
    torch.testing.assert_close(ours.reconstruction, reconstruction, atol=1e-4, rtol=0)
    assert reconstruction.std() > 1e-2


def test_the_full_size_f16_is_that_of_diffusers():
    torch.manual_seed(0)
    _against_diffusers(VQGAN(load_preset("f16-1024").model).eval(), images_of(1, 3, 64, 32))


@pytest.mark.parametrize("changes", [{"mid_attention": False}, {"attention_resolutions": [16, 32], "blocks": 2}, {}])
def test_other_shapes_are_those_of_diffusers(changes):
    torch.manual_seed(0)
    quantizer = QuantizerConfig(256, codebook_dim=4, update="gradient", kmeans_init=False)
    _against_diffusers(VQGAN(small_config(quantizer=quantizer, **changes)).eval(), images_of(2, 3, 32, 48))


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 1)])
@pytest.mark.parametrize("multipliers", [[1], [1, 2], [1, 1, 2, 2]])
def test_any_size_divisible_by_the_factor(grid, multipliers):
    model = VQGAN(small_config(channel_multipliers=multipliers, attention_resolutions=None))
    factor = 2 ** (len(multipliers) - 1)
    images = images_of(2, 3, grid[0] * factor, grid[1] * factor)
    codes = model.encode(images)
    assert model.factor == factor
    assert model(images).reconstruction.shape == images.shape
    assert codes.shape == (2, *grid)
    assert model.decode(codes).shape == images.shape


@pytest.mark.parametrize("options", [{"update": "gradient"}, IBQ])
def test_decode_of_encode_is_the_forward_pass_and_trains_nothing(options):
    torch.manual_seed(0)
    model = VQGAN(small_config(quantizer=QuantizerConfig(32, codebook_dim=4, kmeans_init=False, **options))).eval()
    images = images_of(2, 3, 16, 24)
    with torch.no_grad():
        out = model(images)
    model.train()
    before = copy.deepcopy(model.state_dict())
    codes = model.encode(images)
    assert model.quantizer.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(codes, out.quantizer.codes)
    torch.testing.assert_close(model.decode(codes), out.reconstruction.clamp(-1, 1))


def test_channels_of_images_are_the_configs_and_sizes_are_checked():
    model = VQGAN(small_config(in_channels=4, out_channels=1)).eval()
    assert model(images_of(1, 4, 16, 16)).reconstruction.shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match=r"images must have shape \[B, 4, H, W\], got \[1, 3, 16, 16\]"):
        model.encode(images_of(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"model's factor 4, got 18x16"):
        model.encode(images_of(1, 4, 18, 16))


@pytest.mark.parametrize("options", [{"update": "gradient"}, {"update": "ema"}, IBQ])
def test_every_weight_learns(options):
    torch.manual_seed(0)
    quantizer = QuantizerConfig(8, codebook_dim=4, kmeans_init=False, dead_code_threshold=0.0, **options)
    model = VQGAN(small_config(quantizer=quantizer))
    images = images_of(2, 3, 32, 32)
    before = model.quantizer.codebook.detach().clone()
    out = model(images)
    ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        # adding to every key changes no softmax: that gradient is zero but for rounding
        assert name.endswith("k.bias") or weight.grad.abs().max() > 0, name
    if options["update"] == "ema":
        model.eval()
        assert not torch.equal(model.quantizer.codebook, before)


def test_gradient_checkpointing_changes_no_bit():
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = VQGAN(small_config(gradient_checkpointing=again, dropout=0.2))
        images = images_of(2, 3, 32, 32)
        out = model(images)
        ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
        found.append([out.reconstruction.detach(), *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_gradient_checkpointing_keeps_less():
    def kept(again: bool) -> int:
        bytes_of: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            bytes_of[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = VQGAN(small_config(gradient_checkpointing=again))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(images_of(2, 3, 64, 64)).reconstruction  # noqa: F841 (keeps what was saved)
        return sum(bytes_of.values())

    assert kept(True) < kept(False) / 2


def test_attention_is_its_formula_and_makes_no_table_of_pairs():
    torch.manual_seed(0)
    layer = Attention(16, small_config()).double()
    x = torch.randn(2, 16, 12, 14, dtype=torch.float64, requires_grad=True)
    y = F.group_norm(x, 8, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2)  # [B, C, N]
    q, k, v = (conv.weight[:, :, 0, 0] @ y + conv.bias[:, None] for conv in (layer.q, layer.k, layer.v))
    mixed = v @ (q.mT @ k / 16**0.5).softmax(-1).mT
    expected = x + (layer.proj_out.weight[:, :, 0, 0] @ mixed + layer.proj_out.bias[:, None]).view_as(x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple) else (out,):
                largest = max(largest, each.numel() if isinstance(each, torch.Tensor) else 0)
            return out

    with Sizes():
        found = layer(x)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, wanted, atol=1e-11, rtol=1e-11)
    assert largest < (12 * 14) ** 2


def test_compiled_encode_gives_the_same_codes(model):
    images = images_of(1, 3, 16, 16)
    fast = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(images), model.encode(images))


def test_other_number_formats(model):
    images = images_of(1, 3, 16, 16)
    wide = copy.deepcopy(model).double()
    assert wide(images.double()).reconstruction.dtype == torch.float64
    assert torch.equal(wide.encode(images.double()), model.encode(images))
    half = copy.deepcopy(model).bfloat16()
    assert half(images.bfloat16()).reconstruction.dtype == torch.bfloat16
    assert half.decode(half.encode(images.bfloat16())).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).quantizer.quantized.dtype == torch.float32


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path / "run" / "model")
    for loaded in (VQGAN.from_pretrained(tmp_path / "run" / "model"), load_pretrained(tmp_path / "run")):
        assert isinstance(loaded, VQGAN)
        assert loaded.config == model.config
        assert loaded.fingerprint() == model.fingerprint()
        assert not loaded.training
    with pytest.raises(ValueError, match="is not the config of a VQVAE"):
        VQVAE.from_pretrained(tmp_path / "run")


def test_load_pretrained_knows_the_kind(tmp_path):
    VQVAE(VQVAEConfig(channels=16, channel_multipliers=[1], blocks=1)).save_pretrained(tmp_path)
    assert isinstance(load_pretrained(tmp_path), VQVAE)
    (tmp_path / "config.json").write_text('{"kind": "vqfan"}')
    with pytest.raises(ValueError, match=r"config.json: kind: expected one of vqvae, vqgan, .*got 'vqfan'"):
        load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")


def test_evaluation_takes_it(model):
    assert evaluate(model, images_of(2, 3, 32, 32)).codes.shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_resolutions": [8, 20]}, r"attention_resolutions .*32, 16, 8 for resolution 32.*got 20"),
        ({"attention_resolutions": [4]}, r"attention_resolutions .*got 4"),
        ({"channels": 20}, r"norm_groups must divide .* got 8 for 20 channels"),
        ({"norm_groups": 32}, r"norm_groups must divide .* got 32 for 16 channels"),
        ({"resolution": 30}, r"resolution must be divisible by the model's factor 4, got 30"),
        ({"channel_multipliers": []}, r"channel_multipliers must be positive integers"),
        ({"channel_multipliers": [1, 0]}, r"channel_multipliers must be positive integers"),
        ({"latent_channels": 0}, r"latent_channels must be at least 1, got 0"),
        ({"blocks": 0}, r"blocks must be at least 1, got 0"),
        (
            {"quantizer": {"metric": "dot"}},
            r"gradient must be index_propagation with metric: dot, got",
        ),
        ({"quantizer": {"gradient": "index_propagation"}}, r"update must be gradient with .*, got ema"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_a_wrong_config_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_an_unknown_option_is_named():
    with pytest.raises(ValueError, match="unknown option 'ch_mult'"):
        VQGAN({"ch_mult": [1, 2]})
    with pytest.raises(FileNotFoundError, match=r"preset 'f15' does not exist; expected one of .*f16-1024"):
        load_preset("f15")


@pytest.mark.parametrize("name", preset_names("vqgan"))
def test_presets(name, tmp_path):
    preset = load_preset(name)
    save_config(preset, tmp_path / "copy.yaml")
    assert load_config(tmp_path / "copy.yaml", type(preset)) == preset
    assert name in PUBLISHED or name in ("small", "open-magvit2")
    if name in PUBLISHED:
        of = PUBLISHED[name]
        assert preset.here == "not reproduced here"
        assert preset.model.channel_multipliers == list(of.ch_mult)
        assert [level for level, attends in enumerate(preset.model.attention) if attends] == list(of.attn_levels)
        quantizer = preset.model.quantizer
        assert (quantizer.codebook_size, preset.model.codebook_dim) == (of.n_embed, of.embed_dim)
        assert quantizer.update == "gradient"
        metrics = {"llamagen": "cosine", "ibq": "dot"}
        assert quantizer.metric == metrics.get(name.split("-")[0], "euclidean")
        entropy = quantizer.entropy
        assert (entropy.weight, entropy.temperature) == ((0.05, 0.01) if name.startswith("ibq") else (0.0, 0.01))


def test_the_preset_without_a_codebook():
    preset = load_preset("open-magvit2")
    assert preset.here == "not reproduced here"
    quantizer = preset.model.quantizer
    assert (quantizer.kind, quantizer.codebook_size, preset.model.factor) == ("lfq", 2**18, 16)
    with torch.device("meta"):
        model = VQGAN(preset.model)
    assert isinstance(model.quantizer.project_in, torch.nn.Identity)  # 18 channels are 18 bits


def test_the_small_preset_trains_on_a_cpu():
    torch.manual_seed(0)
    config = load_preset("small").model
    model = VQGAN(dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, kmeans_init=False)))
    images = images_of(2, 3, 32, 32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        out = model(images)
        loss = (out.reconstruction - images).square().mean() + out.quantizer.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
