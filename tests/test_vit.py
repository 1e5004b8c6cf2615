"""ViTTokenizer: its formula, sizes, weights that learn and that decay, folders, presets and training."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from vqkernels.models import (
    QuantizerConfig,
    TrainConfig,
    ViTConfig,
    ViTTokenizer,
    VQGANConfig,
    VQVAEConfig,
    load_config,
    load_preset,
    load_pretrained,
    make_model,
    preset_names,
    save_config,
    train,
)
from vqkernels.models.optimization import make_optimizer
from vqkernels.models.vit import Block, with_positions


def small_config(**changes) -> ViTConfig:
    options = {
        "patch_size": 4,
        "channels": 16,
        "layers": 2,
        "heads": 2,
        "mlp_ratio": 2.0,
        "quantizer": QuantizerConfig(32, codebook_dim=4, metric="cosine", update="gradient", kmeans_init=False),
    }
    return ViTConfig(**{**options, **changes})


def images_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def model() -> ViTTokenizer:
    torch.manual_seed(0)
    return ViTTokenizer(small_config()).eval()


@pytest.mark.parametrize("patch_size", [1, 4, 6])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 1)])
def test_any_size_divisible_by_the_patch(patch_size, grid):
    model = ViTTokenizer(small_config(patch_size=patch_size))
    images = images_of(2, 3, grid[0] * patch_size, grid[1] * patch_size)
    codes = model.encode(images)
    assert model.factor == patch_size
    assert model(images).reconstruction.shape == images.shape
    assert (codes.shape, codes.dtype) == ((2, *grid), torch.int64)
    assert model.decode(codes).shape == images.shape
    with pytest.raises(ValueError, match=rf"model's factor 4, got {4 * grid[0] + 1}x4"):
        ViTTokenizer(small_config())(torch.zeros(1, 3, 4 * grid[0] + 1, 4))


def test_decode_of_encode_is_the_forward_pass(model):
    images = images_of(2, 3, 16, 24)
    with torch.no_grad():
        out = model(images)
    codes = model.encode(images)
    assert torch.equal(codes, out.quantizer.codes)
    torch.testing.assert_close(model.decode(codes), out.reconstruction.clamp(-1, 1))


def _attention(layer: Block, y: torch.Tensor) -> torch.Tensor:
    """Head by head, by the formula."""
    width = y.shape[-1] // layer.heads
    q, k, v = (y @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=-1)
    heads = []
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        table = q[..., part] @ k[..., part].mT / math.sqrt(width)
        heads.append(table.softmax(-1) @ v[..., part])
    return torch.cat(heads, -1) @ layer.proj_out.weight.T + layer.proj_out.bias


def test_a_block_is_its_formula():
    torch.manual_seed(0)
    layer = Block(small_config()).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(2, 7, 16, dtype=torch.float64)

    def norm(x: torch.Tensor, of: torch.nn.LayerNorm) -> torch.Tensor:
        spread = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return (x - x.mean(-1, keepdim=True)) / spread * of.weight + of.bias

    y = x + _attention(layer, norm(x, layer.norm1))
    first, _, second = layer.mlp
    hidden = norm(y, layer.norm2) @ first.weight.T + first.bias
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(layer(x), y + gelu @ second.weight.T + second.bias, rtol=1e-10, atol=1e-10)


def test_positions_are_waves_of_row_and_column():
    found = with_positions(torch.zeros(1, 5, 7, 16)).view(5, 7, 16).double()
    for row in range(5):
        for column in range(7):
            frequencies = [10_000 ** (-step / 4) for step in range(4)]
            expected = [f(place * w) for place in (row, column) for f in (math.sin, math.cos) for w in frequencies]
            torch.testing.assert_close(found[row, column], torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert len(found.view(35, 16).unique(dim=0)) == 35
    small = with_positions(torch.zeros(1, 2, 3, 16)).view(2, 3, 16).double()
    torch.testing.assert_close(small, found[:2, :3])  # a place is told alike in images of any size


def test_the_decoder_is_its_parts(model):
    tokens = torch.randn(2, 16, 2, 3)
    x = with_positions(tokens.movedim(1, -1))
    for block in model.decoder.transformer.blocks:
        x = block(x)
    hidden = model.decoder.head(model.decoder.transformer.norm(x))
    kernel, bias = model.last_layer.weight[:, :, 0, 0], model.last_layer.bias
    patches = (hidden @ kernel.T + bias).view(2, 2, 3, 3, 4, 4)  # [B, h, w, channel, p, p]
    expected = patches.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 8, 12)
    torch.testing.assert_close(model.decoder(tokens), expected)


@pytest.mark.parametrize("options", [{"update": "gradient"}, {"update": "ema", "gradient": "rotation"}])
def test_every_weight_learns(options):
    torch.manual_seed(0)
    quantizer = QuantizerConfig(
        8, codebook_dim=4, metric="cosine", kmeans_init=False, dead_code_threshold=0.0, **options
    )
    model = ViTTokenizer(small_config(quantizer=quantizer))
    images = images_of(2, 3, 32, 32)
    out = model(images)
    ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_bit_and_keeps_less():
    found, kept = [], []
    for again in (False, True):
        bytes_of: dict[int, int] = {}

        def pack(tensor: torch.Tensor, bytes_of: dict[int, int] = bytes_of) -> torch.Tensor:
            bytes_of[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(0)
        model = ViTTokenizer(small_config(gradient_checkpointing=again, layers=4))
        images = images_of(2, 3, 32, 32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(images)
            kept.append(sum(bytes_of.values()))
        ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
        found.append([out.reconstruction.detach(), *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert kept[1] < kept[0] / 2


def test_weight_decay_takes_kernels_alone():
    model = ViTTokenizer(small_config())
    decayed, others = (group["params"] for group in make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {names[id(weight)] for weight in decayed} == {
        name
        for name in names.values()
        if name.startswith(("encoder.", "decoder.")) and name.endswith("weight") and "norm" not in name
    }
    assert {names[id(weight)] for weight in others} >= {"quantizer.codebook", "quantizer.project_in.weight"}
    assert len(decayed) + len(others) == len(names)


@pytest.mark.parametrize("config", [VQVAEConfig(channels=16, blocks=1), VQGANConfig(channels=32, blocks=1)])
def test_weight_decay_of_the_other_models_is_as_it_was(config):
    config.quantizer = QuantizerConfig(32, codebook_dim=4, update="gradient")
    model = make_model(config)
    groups = make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    kernels = [weight for weight in model.parameters() if weight.dim() == 4]
    others = [weight for weight in model.parameters() if weight.dim() != 4]
    assert all(a is b for a, b in zip(groups[0]["params"], kernels, strict=True))
    assert all(a is b for a, b in zip(groups[1]["params"], others, strict=True))


def test_compiled_and_other_number_formats(model):
    images = images_of(1, 3, 16, 16)
    fast = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(images), model.encode(images))
    wide = copy.deepcopy(model).double()
    assert wide(images.double()).reconstruction.dtype == torch.float64
    assert torch.equal(wide.encode(images.double()), model.encode(images))
    half = copy.deepcopy(model).bfloat16()
    assert half(images.bfloat16()).reconstruction.dtype == torch.bfloat16
    assert half.decode(half.encode(images.bfloat16())).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).quantizer.quantized.dtype == torch.float32


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    for loaded in (ViTTokenizer.from_pretrained(tmp_path), load_pretrained(tmp_path)):
        assert isinstance(loaded, ViTTokenizer)
        assert loaded.config == model.config
        assert loaded.fingerprint() == model.fingerprint()
        assert not loaded.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 18}, r"channels must be divisible by heads \(2\) and by 4, got 18"),
        ({"heads": 3}, r"channels must be divisible by heads \(3\) and by 4, got 16"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio must give at least one channel, got 0.0"),
    ],
)
def test_a_wrong_config_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(("name", "layers", "channels"), [("vit-vqgan-small", 8, 512), ("vit-vqgan-base", 12, 768)])
def test_presets(name, layers, channels, tmp_path):
    assert name in preset_names("vit")
    preset = load_preset(name)
    save_config(preset, tmp_path / "copy.yaml")
    assert load_config(tmp_path / "copy.yaml", type(preset)) == preset
    assert preset.here == "not reproduced here"
    with torch.device("meta"):
        model = make_model(preset.model)
    square, pixels = channels * channels, 3 * 8 * 8
    sides = 2 * (layers * (12 * square + 13 * channels) + 2 * channels)
    patches = pixels * channels + channels + 4 * channels * pixels + pixels
    heads = 12 * square + 9 * channels
    codes = 8192 * 32 + 2 * channels * 32 + 32 + channels
    assert sum(weight.numel() for weight in model.parameters()) == sides + patches + heads + codes
    assert model.factor == 8


@pytest.mark.parametrize("adversarial", [False, True])
def test_it_trains(adversarial, tmp_path):
    pixels = (np.random.default_rng(0).random((2, 8, 8, 3)) * 255).astype(np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).resize((48, 48), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    discriminator = {"kind": "patch", "channels": 8, "layers": 1} if adversarial else {}
    config = TrainConfig(
        data=str(tmp_path),
        output=str(tmp_path / "run"),
        model=small_config(),
        discriminator=discriminator,
        image_size=16,
        batch_size=4,
        steps=12,
        warmup_steps=2,
        weight_decay=0.01,
        weight_ema_decay=0.5,
        mixed_precision="bf16" if adversarial else "no",
        threads=1,
        log_every=4,
        device="cpu",
    )
    result = train(config)
    losses = [line["l1"] for line in result.history if "l1" in line]
    assert losses[-1] < losses[0]
    assert F.l1_loss(result.model.reconstruct(images_of(1, 3, 16, 16)), torch.zeros(1, 3, 16, 16)).isfinite()
    assert ("adaptive_weight" in result.history[0]) == adversarial
