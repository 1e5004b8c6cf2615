"""Training against a discriminator: the published arithmetic, its start, resuming. Ranks: test_training_vqgan.py."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from vqkernels.models import (
    VQGAN,
    VQVAE,
    NonFiniteLossError,
    QuantizerConfig,
    TrainConfig,
    VQGANConfig,
    VQVAEConfig,
    make_model,
    objective,
    train,
    training,
)
from vqkernels.models.augmentation import AUGMENTATIONS
from vqkernels.models.checkpoint import load_newest
from vqkernels.models.config import DiscriminatorConfig
from vqkernels.models.objective import Critic, Objective
from vqkernels.models.perceptual import SCALE, SHIFT, VGG16, PerceptualDistance

pytestmark = pytest.mark.filterwarnings("ignore:perceptual. random features")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    down, across = np.mgrid[0:40, 0:40] / 40
    for number in range(5):
        waves = [np.sin(6 * (number + 1) * down + channel + 5 * across) for channel in range(3)]
        Image.fromarray((np.stack(waves, axis=-1) * 110 + 128).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def small_model(**quantizer) -> VQVAEConfig:
    options = {"codebook_size": 32, "kmeans_init": False, "dead_code_threshold": 0.0, "ema_decay": 0.9, **quantizer}
    return VQVAEConfig(
        patch_size=2,
        channels=16,
        channel_multipliers=[1, 2],
        blocks=1,
        latent_channels=8,
        quantizer=QuantizerConfig(**options),
    )


def small_run(data: Path, output: Path, *, critic: dict | None = None, layers: int = 1, **changes) -> TrainConfig:
    discriminator = DiscriminatorConfig(kind="patch", channels=8, layers=layers, norm="act", **(critic or {}))
    options = {
        "model": small_model(),
        "image_size": 16,
        "batch_size": 4,
        "steps": 6,
        "warmup_steps": 2,
        "learning_rate": 2e-3,
        "weight_ema_decay": 0.9,
        "threads": 1,
        "log_every": 1,
        "sample_every": 0,
        "checkpoint_every": 2,
        "device": "cpu",
        "discriminator": discriminator,
    }
    return TrainConfig(data=str(data), output=str(output), **{**options, **changes})


# ---- the published arithmetic


def published_perceptual(vgg: PerceptualDistance, one: Tensor, other: Tensor) -> Tensor:
    """LPIPS by its formula, in one line a layer, of VGG16's weights as they lie in `vgg`."""
    shift, scale = (torch.tensor(values)[:, None, None].to(one) for values in (SHIFT, SCALE))
    x, y, total, convolutions = (one - shift) / scale, (other - shift) / scale, 0.0, vgg.vgg["features"].children()
    for number, widths in enumerate(VGG16):
        x, y = (x, y) if number == 0 else (F.max_pool2d(x, 2), F.max_pool2d(y, 2))
        for conv in itertools.islice(convolutions, len(widths)):
            x, y = (F.relu(F.conv2d(each, conv.weight, conv.bias, padding=1)) for each in (x, y))
        unit = [each / ((each**2).sum(1, keepdim=True).sqrt() + 1e-10) for each in (x, y)]
        weight = vgg.linear[f"lin{number}"]["model"][1].weight[0]  # [C, 1, 1]
        total = total + ((unit[0] - unit[1]) ** 2 * weight).sum(1).mean((1, 2))
    return total.mean()


def published_step(model, network, vgg, optimizers, images: Tensor, config: TrainConfig) -> dict[str, float]:
    """One step as taming-transformers computes it: the last layer's gradients by two more backward passes."""
    out = model(images)
    rec = out.reconstruction
    nll = config.l1_weight * (images - rec).abs().mean() + config.l2_weight * ((images - rec) ** 2).mean()
    if vgg is not None:
        nll = nll + config.perceptual_weight * published_perceptual(vgg, images, rec)
    g = -network(rec).mean()
    last = model.decoder.conv_out.weight if isinstance(model, VQGAN) else model.decoder[-2].weight
    own, other = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (nll, g))
    weight = torch.clamp(own.norm() / (other.norm() + 1e-4), 0.0, 1e4).detach() * config.discriminator.weight
    optimizers[0].zero_grad()
    (nll + weight * g + out.quantizer.loss).backward()
    optimizers[0].step()
    real, fake = network(images), network(rec.detach())
    loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    optimizers[1].zero_grad()
    loss.backward()
    optimizers[1].step()
    return {"adaptive_weight": weight.item(), "adversarial_loss": g.item(), "discriminator_loss": loss.item()}


def small_vqgan() -> VQGANConfig:
    quantizer = QuantizerConfig(codebook_size=32, kmeans_init=False, update="gradient")
    return VQGANConfig(
        channels=8,
        channel_multipliers=[1, 2],
        attention_resolutions=[8],
        blocks=1,
        resolution=16,
        latent_channels=8,
        norm_groups=4,
        quantizer=quantizer,
    )


@pytest.mark.parametrize(("kind", "norm"), [("vqvae", "batch"), ("vqvae", "act"), ("vqgan", "batch")])
def test_ten_steps_follow_the_published_arithmetic(kind: str, norm: str):
    """In float64, where rounding stays far below what another formula would change; VQGAN with LPIPS's too."""
    torch.manual_seed(0)
    model, perceptual = (small_vqgan(), 0.5) if kind == "vqgan" else (small_model(update="gradient"), 0.0)
    config = small_run(Path("."), Path("."), model=model, max_grad_norm=0.0, perceptual_weight=perceptual)
    config.discriminator.norm = norm
    ours = make_model(config.model).double()
    theirs = copy.deepcopy(ours)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), autocast=nullcontext, backward=lambda loss: loss.backward()
    )
    objective = Objective(config, ours, accelerator)
    objective.critic.network.double()
    network, vgg = copy.deepcopy(objective.critic.network), objective.perceptual
    if vgg is not None:
        vgg.double()
    adam = torch.optim.Adam(ours.parameters(), lr=1e-3)
    other_adam = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    critic_adam = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(10):
        images = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
        expected = published_step(theirs, network, vgg, (other_adam, critic_adam), images, config)
        objective.begin(step, 0.0)
        found = dict(zip(objective.names, objective.backward(images, ours(images)).tolist(), strict=True))
        adam.step()
        adam.zero_grad()
        objective.step(1e-3)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12), (step, name)
    for pair in ((ours, theirs), (objective.critic.network, network)):
        for (name, one), (_, other) in zip(*(each.named_parameters() for each in pair), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


# ---- the loop


def assert_same_end(one: Path, other: Path) -> None:
    mine, theirs = load_newest(one / "checkpoints"), load_newest(other / "checkpoints")
    assert mine["step"] == theirs["step"]
    for part in ("model", "average", "optimizer", "discriminator"):
        leaves = (torch.utils._pytree.tree_leaves(state[part]) for state in (mine, theirs))
        for a, b in zip(*leaves, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, part


class StopError(Exception):
    """Stands for whatever ends a run early."""


EVERYTHING = {
    "lecam_weight": 0.01,
    "r1_weight": 0.1,
    "augmentation": ["color", "translation", "cutout"],
    "start_step": 2,
    "learning_rate": 1e-3,
}


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_stopped_run_ends_bit_for_bit_like_an_undisturbed_one(pictures, tmp_path, stop: int):
    config = small_run(pictures, tmp_path / "whole", critic=EVERYTHING, perceptual_weight=0.1, checkpoint_every=1)
    train(config)
    stopped = dataclasses.replace(config, output=str(tmp_path / "stopped"))

    def progress(report):
        if report.step >= stop:
            raise StopError

    with pytest.raises(StopError):
        train(stopped, progress=progress)
    train(dataclasses.replace(stopped, resume=True))
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


def expected_critic_loss(critic: Critic, images: Tensor, fake: Tensor, turned: list[Tensor]) -> Tensor:
    """Hinge, LeCAM, R1 and bCR from the papers' formulas; `turned` are both kinds of images as bCR augments them."""
    config, network = critic.config, critic.network
    r, f = network(images), network(fake)
    r_turned, f_turned = map(network, turned)
    loss = (torch.where(r < 1, 1 - r, 0.0).mean() + torch.where(f > -1, 1 + f, 0.0).mean()) / 2
    over, under = r - f.mean().detach(), r.mean().detach() - f
    lecam = torch.where(over > 0, over**2, 0.0).mean() + torch.where(under > 0, under**2, 0.0).mean()
    slopes = torch.func.vmap(torch.func.grad(lambda image: network(image[None]).sum()))(images)
    r1 = 0.5 * slopes.flatten(1).norm(dim=1).square().mean()
    bcr = config.bcr_real_weight * ((r - r_turned) ** 2).mean() + config.bcr_fake_weight * ((f - f_turned) ** 2).mean()
    return loss + config.lecam_weight * lecam + config.r1_weight * r1 + bcr


def test_the_discriminator_minimises_the_sum_of_its_losses(monkeypatch):
    """Value and gradient in float64; the augmentation is a turn, so that it can be done once more."""
    monkeypatch.setattr(objective, "augment", lambda x, kinds: x.flip(3) if tuple(kinds) == AUGMENTATIONS else x)
    torch.manual_seed(0)
    weights = {"lecam_weight": 0.3, "r1_weight": 0.2, "bcr_real_weight": 0.5, "bcr_fake_weight": 0.7}
    critic = Critic(small_run(Path("."), Path("."), critic=weights, gradient_accumulation=2), torch.device("cpu"))
    critic.network.double()
    critic.lecam.double()
    images, fake = (torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1 for _ in range(2))
    critic.network(images)  # ActNorm takes its start from its first batch
    expected = expected_critic_loss(critic, images, fake, [images.flip(3), fake.flip(3)])
    slopes = torch.autograd.grad(expected / 2, list(critic.network.parameters()))  # of two micro-batches
    found = critic.learn(images, fake.requires_grad_(), nullcontext())
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-10)
    assert fake.grad is None
    for parameter, slope in zip(critic.network.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-8, atol=1e-12)


def test_before_its_start_the_discriminator_is_neither_run_nor_trained(pictures, tmp_path):
    config = small_run(pictures, tmp_path / "run", critic={"start_step": 3}, checkpoint_every=3)
    result = train(config)
    lines = [line for line in result.history if "adaptive_weight" in line]
    assert [line["adaptive_weight"] > 0 for line in lines] == [False] * 3 + [True] * 3
    assert [line["discriminator_loss"] > 0 for line in lines] == [False] * 3 + [True] * 3
    before = torch.load(tmp_path / "run" / "checkpoints" / "step-00000003.pt", weights_only=True)["discriminator"]
    assert before["network"]["main.3.initialized"] == 0
    assert not before["optimizer"]["state"]
    after = load_newest(tmp_path / "run" / "checkpoints")["discriminator"]
    assert after["network"]["main.3.initialized"] == 1
    assert after["optimizer"]["state"]


@pytest.mark.parametrize("step", [0, 1])  # the discriminator starts at 1
def test_no_graph_outlives_the_backward(step: int):
    config = small_run(Path("."), Path("."), critic={"start_step": 1})
    model = VQVAE(config.model)
    accelerator = SimpleNamespace(device=torch.device("cpu"), backward=lambda loss: loss.backward())
    objective, images = Objective(config, model, accelerator), torch.rand(2, 3, 16, 16)
    objective.begin(step, 0.0)
    objective.backward(images, model(images))
    assert objective.last.input is None
    assert objective.last.output is None


def test_a_critic_learns_to_tell_them_apart():
    torch.manual_seed(0)
    critic = Critic(small_run(Path("."), Path("."), learning_rate=1e-2), torch.device("cpu"))
    for _ in range(40):
        rough = torch.randn(8, 3, 16, 16)
        found = critic.learn(rough, F.avg_pool2d(rough, 3, 1, 1), nullcontext())
        critic.step(1e-2)
    assert found[1] - found[2] > 1  # logits of sharp images above those of blurred ones


def test_a_discriminator_cannot_come_or_go_in_a_resumed_run(pictures, tmp_path):
    config = small_run(pictures, tmp_path / "run", steps=2)
    train(config)
    with pytest.raises(ValueError, match=r"discriminator\.kind is none, but the run had a discriminator"):
        train(dataclasses.replace(config, resume=True, steps=4, discriminator=DiscriminatorConfig()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 4}, r"discriminator\.layers"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be bf16 or no with a discriminator"),
        ({"lpips": "weights.pth", "perceptual_weight": 1.0}, "vgg must be given"),
        ({"perceptual_weight": -1.0}, "perceptual_weight"),
    ],
)
def test_wrong_options_stop_before_the_first_step(pictures, tmp_path, changes, message):
    layers = changes.pop("layers", 1)
    with pytest.raises(ValueError, match=message):
        train(small_run(pictures, tmp_path / "run", layers=layers, **changes))


def test_bfloat16_trains(pictures, tmp_path):
    result = train(small_run(pictures, tmp_path / "run", steps=2, mixed_precision="bf16", perceptual_weight=0.1))
    assert all(np.isfinite(line["loss"]) for line in result.history if "loss" in line)


def _broken_at(step: int):
    """A reconstruction loss that is NaN in one step."""
    real, steps = Objective.backward, itertools.cycle(range(5))  # those of a run, each with one backward

    def backward(self, images, out):
        out = out._replace(reconstruction=out.reconstruction * float("nan")) if next(steps) == step else out
        return real(self, images, out)

    return backward


@pytest.mark.parametrize("at", [0, 2])  # at 0 ActNorm and LeCam have not started
def test_a_step_that_is_not_finite_is_left_out_and_counted(pictures, tmp_path, monkeypatch, at: int):
    monkeypatch.setattr(Objective, "backward", _broken_at(at))
    critic = {"lecam_weight": 0.1}
    with pytest.warns(UserWarning, match=f"step {at + 1} was left out.* 1 of at most 1"):
        result = train(small_run(pictures, tmp_path / "run", critic=critic, steps=5, max_skipped_steps=1))
    assert [line["skipped_steps"] for line in result.history if "skipped_steps" in line][-1] == 1
    assert all(value.isfinite().all() for value in result.model.parameters())
    state = load_newest(tmp_path / "run" / "checkpoints")["discriminator"]
    assert all(value.isfinite().all() for part in ("network", "lecam") for value in state[part].values())
    assert state["network"]["main.3.initialized"] == 1
    with pytest.raises(NonFiniteLossError, match=f"step {at + 1}"):
        train(small_run(pictures, tmp_path / "strict", critic=critic, steps=5))


def test_a_step_that_is_left_out_does_not_move_the_codebook(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(Objective, "backward", _broken_at(4))
    options = {"steps": 5, "max_skipped_steps": 1, "discriminator": DiscriminatorConfig(), "checkpoint_every": 4}
    with pytest.warns(UserWarning, match="step 5 was left out"):
        train(small_run(pictures, tmp_path / "run", **options))
    files = (tmp_path / "run" / "checkpoints" / f"step-{step:08d}.pt" for step in (4, 5))
    before, after = (torch.load(file, weights_only=True)["model"] for file in files)
    for name in ("codebook", "cluster_size", "embed_sum"):
        assert torch.equal(before[f"quantizer.{name}"], after[f"quantizer.{name}"]), name


def _overflow_at(step: int, backward):
    """Finite losses whose gradients are infinite in one step, as float16 has them when the scale is too large."""

    steps = itertools.count()

    def overflowing(self, images, out):
        if next(steps) == step:
            out.reconstruction.register_hook(lambda gradient: gradient * float("inf"))
        return backward(self, images, out)

    return overflowing


def test_with_a_gradient_scaler_only_a_loss_that_is_not_finite_counts_as_skipped(pictures, tmp_path, monkeypatch):
    """fp16 itself needs a GPU: here its scaler works on float32 gradients, in the places where accelerate calls it."""
    make = training.make_accelerator

    def scaled(config):
        accelerator = make(config)
        scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        accelerator.unscale_gradients = lambda: scaler.unscale_(accelerator._optimizers[0].optimizer)
        return accelerator

    monkeypatch.setattr(training, "make_accelerator", scaled)
    monkeypatch.setattr(Objective, "backward", _overflow_at(1, _broken_at(3)))
    options = {"steps": 6, "max_skipped_steps": 1, "discriminator": DiscriminatorConfig()}
    with pytest.warns(UserWarning, match="step 4 was left out.* 1 of at most 1"):
        result = train(small_run(pictures, tmp_path / "run", **options))
    assert [line["skipped_steps"] for line in result.history if "skipped_steps" in line][-1] == 1
    assert all(value.isfinite().all() for value in result.model.parameters())
    state = load_newest(tmp_path / "run" / "checkpoints")
    assert state["scaler"]["scale"] == 1024 / 4  # halved by both
    assert {int(each["step"]) for each in state["optimizer"]["state"].values()} == {4}  # of 6


def test_a_collapsed_codebook_is_reported_once(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "COLLAPSE_FROM", 3)
    config = small_run(pictures, tmp_path / "run", collapse_usage=1.0, discriminator=DiscriminatorConfig())
    with pytest.warns(UserWarning, match="step 3: .* of the codebook is in use") as seen:
        train(config)
    assert sum("of the codebook is in use" in str(each.message) for each in seen) == 1
