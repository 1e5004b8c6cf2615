"""The discriminator on DINO's features: backbone and heads by their formulas, weight files, and training against it."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published_networks import dino_features, dino_layout, random_weights
from torch import Tensor, nn
from torch.nn import functional as F
from two_ranks import train_with_two_ranks
from vqkernels.models import QuantizerConfig, TrainConfig, VQVAEConfig, dino, dino_discriminator, train
from vqkernels.models.checkpoint import load_newest
from vqkernels.models.config import DiscriminatorConfig, from_dict
from vqkernels.models.dino import Block, DinoBackbone, make_backbone
from vqkernels.models.dino_discriminator import DinoDiscriminator, Head, LocalBatchNorm
from vqkernels.models.discriminator import make_discriminator
from vqkernels.models.objective import Critic

SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 16, 8, 12, 2  # of the small backbone: a 2 x 2 grid of tokens


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def small_backbone() -> DinoBackbone:
    backbone = DinoBackbone(PATCH, WIDTH, DEPTH, HEADS, SIDE)
    backbone.randomize()
    return backbone.requires_grad_(False).eval()


@pytest.fixture
def tiny(monkeypatch):
    """The published backbones with few channels, for small images."""
    monkeypatch.setattr(
        dino, "DinoBackbone", functools.partial(DinoBackbone, width=WIDTH, depth=DEPTH, heads=HEADS, side=SIDE)
    )


# ---- the backbone


@pytest.mark.parametrize(("patch", "size"), [(16, 21_665_664), (8, 21_670_272)])
def test_backbone_has_the_published_keys_shapes_and_size(patch: int, size: int):
    with torch.device("meta"):
        backbone = DinoBackbone(patch)
    assert sum(each.numel() for each in backbone.parameters()) == size
    assert shapes(backbone.state_dict()) == dino_layout(patch, 384, 12, 224)


def test_a_block_is_torchs_own_encoder_layer():
    """torch's pre-norm encoder layer is the same function by other names."""
    own = Block(12, 3).double()
    other = nn.TransformerEncoderLayer(
        *(12, 3, 48), 0.0, F.gelu, layer_norm_eps=1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    )
    pairs = {
        "norm1": own.norm1,
        "norm2": own.norm2,
        "self_attn.out_proj": own.attn.proj,
        "linear1": own.mlp["fc1"],
        "linear2": own.mlp["fc2"],
    }
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        for name, layer in pairs.items():
            other.get_submodule(name).load_state_dict(layer.state_dict())
        other.self_attn.in_proj_weight.copy_(own.attn.qkv.weight)
        other.self_attn.in_proj_bias.copy_(own.attn.qkv.bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(own(x), other(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 16)])  # the second has a position embedding of its own
def test_features_are_the_papers(height: int, width: int):
    weights = random_weights(dino_layout(PATCH, WIDTH, 3, SIDE))
    backbone = DinoBackbone(PATCH, WIDTH, 3, HEADS, SIDE).double()
    backbone.load_state_dict(weights)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    for blocks in ([0, 2], [1]):
        found = backbone.features(images, blocks)
        expected = dino_features(weights, HEADS, blocks, images)
        assert len(found) == len(expected) == len(blocks) + 1
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# ---- heads


@pytest.mark.parametrize(("batch", "parts"), [(1, [1]), (3, [3]), (8, [8]), (9, [5, 4]), (16, [8, 8]), (24, [8, 8, 8])])
def test_local_batch_norm_takes_few_images_at_a_time(batch: int, parts: list[int]):
    norm = LocalBatchNorm(3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(batch, 3, 5, dtype=torch.float64)
    expected = []
    for part in x.split(parts):
        values = part.transpose(0, 1).flatten(1)  # [C, B * N]
        mean, deviation = values.mean(1), (values.var(1, unbiased=False) + 1e-5).sqrt()
        normal = (part - mean[:, None]) / deviation[:, None]
        expected.append(normal * norm.weight[:, None] + norm.bias[:, None])
    torch.testing.assert_close(norm(x), torch.cat(expected), rtol=1e-10, atol=1e-10)


def test_head_follows_its_formula_once_the_singular_values_are_found():
    torch.manual_seed(0)
    head = Head(6).double()
    x = torch.randn(3, 6, 11, dtype=torch.float64)
    for _ in range(300):  # of the power iteration
        head(x)

    def convolved(layer: nn.Module, x: Tensor) -> Tensor:
        weight = layer.parametrizations.weight.original
        weight = weight / torch.linalg.svdvals(weight.flatten(1)).max()
        middle = weight.shape[2] // 2
        shifted = [x.roll(middle - tap, 2) for tap in range(weight.shape[2])]  # tokens lie on a circle
        return sum(weight[:, :, tap] @ part for tap, part in enumerate(shifted)) + layer.bias[:, None]

    def normal(x: Tensor) -> Tensor:
        y = (x - x.mean((0, 2), keepdim=True)) / (x.var((0, 2), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return torch.where(y > 0, y, 0.2 * y)

    y = normal(convolved(head.first, x))
    y = (y + normal(convolved(head.second, y))) / math.sqrt(2)
    torch.testing.assert_close(head(x), convolved(head.logit, y)[:, 0], rtol=1e-6, atol=1e-8)


# ---- the discriminator


def test_only_the_heads_learn_and_are_saved():
    network = DinoDiscriminator(small_backbone(), [0, 3], SIDE)
    assert all(name.startswith("heads.") for name in (*network.state_dict(), *dict(network.named_parameters())))
    assert len(network.heads) == 3
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    images = torch.rand(2, 3, SIDE, SIDE).requires_grad_()
    logits = network.train()(images)
    assert logits.shape == (2, 3 * 4)
    logits.sum().backward()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(each.grad is not None for each in network.parameters())
    assert all(each.grad is None for each in network.backbone.parameters())
    assert not network.backbone.training
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, before[name])
    network.double()
    assert network.backbone.cls_token.dtype == torch.float64
    assert network(images.double()).dtype == torch.float64


def test_images_are_normalised_cut_and_resized():
    network = DinoDiscriminator(small_backbone(), [1], SIDE, crop=0.0).double()
    seen = []
    features = network.backbone.features
    network.backbone.features = lambda x, blocks: (seen.append(x), features(x, blocks))[1]  # type: ignore[method-assign]
    mean, deviation = (
        torch.tensor(row)[:, None, None].double() for row in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    large = torch.rand(1, 3, 2 * SIDE, 2 * SIDE, dtype=torch.float64) * 2 - 1
    same, small = large[..., :SIDE, :SIDE], large[..., : SIDE // 2, : SIDE // 2]
    for images in (large, same, small):
        network(images)
    raw = [x * deviation + mean for x in seen]
    means = large.unflatten(3, (SIDE, 2)).unflatten(2, (SIDE, 2)).mean((3, 5))
    torch.testing.assert_close(raw[0], means / 2 + 0.5, rtol=0, atol=1e-6)
    torch.testing.assert_close(raw[1], same / 2 + 0.5, rtol=0, atol=1e-6)
    assert raw[2].shape[2:] == (SIDE, SIDE)
    assert (F.avg_pool2d(raw[2], 2) - (small / 2 + 0.5)).abs().max() < 0.3  # the same picture
    network.crop = 1.0
    places = set()
    for _ in range(8):
        network(large)
        cut = seen[-1] * deviation + mean
        windows = (large / 2 + 0.5).unfold(2, SIDE, 1).unfold(3, SIDE, 1)[0].permute(1, 2, 0, 3, 4)
        hits = ((windows - cut[0]).abs().amax((2, 3, 4)) < 1e-6).nonzero()
        assert len(hits) == 1
        places.add(tuple(hits[0].tolist()))
    assert len(places) > 4
    with pytest.raises(ValueError, match="images must have shape"):
        network(large[:, :2])


def test_what_does_not_suit_the_backbone_is_refused():
    for side in (24, 16, 0):
        with pytest.raises(ValueError, match="side must be a multiple of the patch of 16 pixels"):
            DinoDiscriminator(small_backbone(), [0], side)
    for blocks in ([12], [-1], [1, 1]):
        with pytest.raises(ValueError, match="blocks must be distinct numbers below 12"):
            DinoDiscriminator(small_backbone(), blocks, SIDE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_side": 100}, r"discriminator\.input_side must be a multiple of vit_s16's patch of 16 pixels"),
        ({"input_side": 8, "backbone": "vit_s8"}, r"discriminator\.input_side .* from 16, got 8"),
        ({"blocks": [2, 12]}, r"discriminator\.blocks must be distinct numbers from 0 to 11"),
        ({"blocks": [2, 2]}, r"discriminator\.blocks"),
        ({"crop": 1.5}, r"discriminator\.crop"),
        ({"r1_weight": 1.0}, r"discriminator\.r1_weight must be 0 with kind dino"),
        (
            {"kind": "patch", "weights_file": "dino.pth"},
            r"discriminator\.kind must be dino where weights_file is given, got patch",
        ),
        ({"bcr_real_weight": 1.0}, r"discriminator\.bcr_real_weight must be 0 with kind dino and crop above 0"),
        ({"bcr_fake_weight": 2.0, "crop": 1.0}, r"discriminator\.bcr_fake_weight must be 0 .* crop .*, got 2.0"),
        ({"bcr_fake_weight": -1.0}, r"discriminator\.bcr_fake_weight must be 0 or greater"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        from_dict(DiscriminatorConfig, {"kind": "dino", **options}, "discriminator")


# ---- weight files


def save(weights: dict[str, Tensor], path: Path) -> str:
    torch.save({name: value.float() for name, value in weights.items()}, path)
    return str(path)


def test_a_published_file_loads_under_its_name(tiny, tmp_path):
    weights = random_weights(dino_layout(PATCH, WIDTH, DEPTH, SIDE))
    path = save(weights, tmp_path / "dino_deitsmall16_pretrain.pth")
    config = DiscriminatorConfig(kind="dino", weights_file=path, input_side=SIDE)
    network = make_discriminator(config, 64)
    assert isinstance(network, DinoDiscriminator)
    assert network.label == "DINO ViT-S/16"
    assert len(network.heads) == 5
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, weights[name].float())
    random = make_discriminator(DiscriminatorConfig(kind="dino", input_side=SIDE), 64)
    assert random.label == "random features"
    again = make_discriminator(DiscriminatorConfig(kind="dino", input_side=SIDE), 64)
    for name, value in random.backbone.state_dict().items():
        assert value.isfinite().all()
        assert torch.equal(value, again.backbone.state_dict()[name])


class _Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_files_of_something_else_are_refused_by_name(tiny, tmp_path, capsys):
    weights = random_weights(dino_layout(PATCH, WIDTH, DEPTH, SIDE))
    option = "discriminator.weights_file"
    cases = {
        "patch": (random_weights(dino_layout(8, WIDTH, DEPTH, SIDE)), r"pos_embed must have shape \[1, 5, 8\]"),
        "short": (random_weights(dino_layout(PATCH, WIDTH, 11, SIDE)), r"has no 'blocks\.11\.norm1\.weight'"),
        "head": ({**weights, "head.weight": torch.ones(2, WIDTH)}, r"'head\.weight' is not part of the network"),
    }
    for name, (content, message) in cases.items():
        with pytest.raises(ValueError, match=rf"^discriminator\.weights_file: .*{name}\.pth: .*{message}"):
            make_backbone("vit_s16", save(content, tmp_path / f"{name}.pth"), option)
    torch.save({"student": weights, "teacher": weights}, tmp_path / "full.pth")
    with pytest.raises(ValueError, match="expected tensors by name, got 'student': dict"):
        make_backbone("vit_s16", tmp_path / "full.pth", option)
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(ValueError, match=r"^discriminator\.weights_file: .*bad\.pth: refused"):
        make_backbone("vit_s16", tmp_path / "bad.pth", option)
    assert "executed" not in capsys.readouterr().out
    whole = Path(save(weights, tmp_path / "whole.pth")).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^discriminator\.weights_file: .*cut\.pth: truncated"):
        make_backbone("vit_s16", tmp_path / "cut.pth", option)
    with pytest.raises(FileNotFoundError, match=r"^discriminator\.weights_file: .*nowhere\.pth: no such file"):
        make_backbone("vit_s16", tmp_path / "nowhere.pth", option)


# ---- training


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


pytestmark = pytest.mark.filterwarnings("ignore:discriminator. random features")


def small_run(data: Path, output: Path, *, critic: dict | None = None, **changes) -> TrainConfig:
    quantizer = QuantizerConfig(codebook_size=16, kmeans_init=False, dead_code_threshold=0.0)
    model = VQVAEConfig(patch_size=2, channels=8, channel_multipliers=[1], blocks=1, latent_channels=4)
    model.quantizer = quantizer
    options = {
        "image_size": 36,
        "batch_size": 2,
        "steps": 3,
        "log_every": 1,
        "sample_every": 0,
        "checkpoint_every": 1,
        "device": "cpu",
        "threads": 1,
        "discriminator": DiscriminatorConfig(kind="dino", input_side=SIDE, **(critic or {})),
    }
    return TrainConfig(data=str(data), output=str(output), model=model, **{**options, **changes})


class StopError(Exception):
    """Stands for whatever ends a run early."""


EVERYTHING = {
    "lecam_weight": 0.01,
    "bcr_real_weight": 1.0,
    "bcr_fake_weight": 2.0,
    "crop": 0.0,
    "augmentation": ["color", "translation", "cutout"],
    "start_step": 1,
}


def test_a_stopped_run_ends_bit_for_bit_like_an_undisturbed_one(tiny, pictures, tmp_path):
    config = small_run(pictures, tmp_path / "whole", critic=EVERYTHING)
    with pytest.warns(UserWarning, match="discriminator: random features, as no weight file is given"):
        train(config)
    stopped = dataclasses.replace(config, output=str(tmp_path / "stopped"))

    def progress(report):
        if report.step >= 2:
            raise StopError

    with pytest.raises(StopError):
        train(stopped, progress=progress)
    train(dataclasses.replace(stopped, resume=True))
    mine, theirs = (load_newest(tmp_path / name / "checkpoints") for name in ("whole", "stopped"))
    assert {name.split(".")[0] for name in mine["discriminator"]["network"]} == {"heads"}
    for part in ("model", "discriminator"):
        for a, b in zip(*(torch.utils._pytree.tree_leaves(state[part]) for state in (mine, theirs)), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, part


def test_it_trains_in_bfloat16_by_a_file(tiny, pictures, tmp_path):
    path = save(random_weights(dino_layout(PATCH, WIDTH, DEPTH, SIDE)), tmp_path / "dino.pth")
    critic = {"weights_file": path, "bcr_real_weight": 1.0, "bcr_fake_weight": 1.0, "crop": 0.0}
    result = train(small_run(pictures, tmp_path / "run", critic=critic, steps=2, mixed_precision="bf16"))
    assert result.history[0] == {"step": 0, "networks": {"discriminator": "DINO ViT-S/16"}}
    lines = [line for line in result.history if "discriminator_loss" in line]
    assert all(math.isfinite(line["loss"]) and line["adaptive_weight"] > 0 for line in lines)


def test_a_missing_file_stops_before_the_first_step(tiny, pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"discriminator\.weights_file: nowhere\.pth: no such file"):
        train(small_run(pictures, tmp_path / "run", critic={"weights_file": "nowhere.pth"}))
    assert not list((tmp_path / "run").glob("metrics.jsonl"))


def test_heads_learn_although_statistics_are_taken_out(tiny):
    """Of means and deviations they are told nothing: one bright image of eight against one dark image of eight."""
    torch.manual_seed(0)
    critic = Critic(small_run(Path("."), Path("."), learning_rate=3e-2), torch.device("cpu"))
    one = torch.full((8, 3, SIDE, SIDE), -1.0)
    one[3] = 1.0
    gaps = []
    for _ in range(40):
        noise = 0.1 * torch.randn_like(one)
        found = critic.learn(one + noise, noise - one, nullcontext())
        critic.step(3e-2)
        gaps.append(float(found[1] - found[2]))
    assert abs(gaps[0]) < 0.1
    assert sum(gaps[-10:]) / 10 > 0.5


TINY = """
import functools
from vqkernels.models import dino, dino_discriminator
dino.DinoBackbone = functools.partial(dino.DinoBackbone, width=8, depth=12, heads=2, side=32)
dino_discriminator.VIRTUAL_BATCH = 2
"""


def test_two_processes_equal_one_with_the_joined_batch(tiny, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(dino_discriminator, "VIRTUAL_BATCH", 2)  # one rank's images
    train(small_run(pictures, tmp_path / "alone", batch_size=4, critic={"crop": 0.0}))
    train_with_two_ranks(small_run(pictures, tmp_path / "both", batch_size=2, critic={"crop": 0.0}), tmp_path, TINY)
    one, two = (load_newest(tmp_path / name / "checkpoints")["discriminator"]["network"] for name in ("alone", "both"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}")
