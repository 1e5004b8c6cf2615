"""ImageNet classifiers as a loss: published layouts and arithmetic, the distance, weight files, training by it."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from published_networks import (
    convnext_layout,
    convnext_logits,
    random_weights,
    resizing,
    resnet_layout,
    resnet_logits,
    timm_convnext_name,
)
from torch import Tensor, nn
from vqkernels.models import VQVAE, QuantizerConfig, TrainConfig, VQVAEConfig, logit_distance, train
from vqkernels.models.convnext import TIMM_NAMES, ConvNeXt
from vqkernels.models.logit_distance import LogitDistance, make_logit_distance
from vqkernels.models.objective import Objective
from vqkernels.models.published_weights import translated
from vqkernels.models.resnet import ResNet
from vqkernels.models.run_log import read_metrics

PUBLISHED = {"resnet50": 25_557_032, "convnext_s": 50_223_688}
TINY = {"resnet50": ((1, 2), (4, 6), 5), "convnext_s": ((1, 2), (6, 8), 5)}
NETWORKS = {"resnet50": ResNet, "convnext_s": ConvNeXt}
LAYOUTS = {"resnet50": resnet_layout, "convnext_s": convnext_layout}
LOGITS = {"resnet50": resnet_logits, "convnext_s": convnext_logits}
MEAN, DEVIATION = ([[[x]] for x in row] for row in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.fixture(autouse=True)
def _seed():
    """Differences of random pictures' logits have bounds that a few of many draws would miss."""
    torch.manual_seed(0)


@pytest.fixture
def tiny(monkeypatch):
    """The published classifiers with few channels."""
    for name, kind in (("resnet50", "ResNet"), ("convnext_s", "ConvNeXt")):
        monkeypatch.setattr(logit_distance, kind, functools.partial(NETWORKS[name], *TINY[name]))


# ---- the networks


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_keys_shapes_and_size(name: str):
    with torch.device("meta"):
        network = NETWORKS[name]()
    assert sum(each.numel() for each in network.parameters()) == PUBLISHED[name]
    stages = {"resnet50": ((3, 4, 6, 3), (64, 128, 256, 512)), "convnext_s": ((3, 3, 27, 3), (96, 192, 384, 768))}[name]
    assert shapes(network.state_dict()) == LAYOUTS[name](*stages, 1000)


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_compute_the_papers_formulas(name: str):
    weights = random_weights(LAYOUTS[name](*TINY[name]))
    network = NETWORKS[name](*TINY[name]).double().eval()
    network.load_state_dict(weights)
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    torch.testing.assert_close(network(images), LOGITS[name](weights, TINY[name][0], images), rtol=1e-10, atol=1e-10)


# ---- the distance


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("height", "width"), [(40, 48), (16, 24)])  # smaller and larger than the network's side
def test_distance_is_the_mean_squared_difference_of_logits(name: str, height: int, width: int):
    weights = random_weights(LAYOUTS[name](*TINY[name]))
    network = NETWORKS[name](*TINY[name])
    network.load_state_dict(weights)
    distance = LogitDistance(network, "", side=24).double()
    a, b = (torch.rand(2, 3, height, width, dtype=torch.float64) * 2 - 1 for _ in range(2))

    def logits(images: Tensor) -> Tensor:
        resized = torch.einsum("ih,bchw,jw->bcij", resizing(height, 24), images / 2 + 0.5, resizing(width, 24))
        return LOGITS[name](weights, TINY[name][0], (resized - torch.tensor(MEAN)) / torch.tensor(DEVIATION))

    expected = (logits(a) - logits(b)).square().sum(1) / 5
    assert expected.min() > 1e-3
    torch.testing.assert_close(distance(a, b).double(), expected, rtol=1e-5, atol=0)  # constants and result in float32
    assert torch.equal(distance(a, a), torch.zeros(2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_distance_stays_frozen_and_passes_gradients_to_the_images(tiny, name: str):
    distance = make_logit_distance(name)
    state = {key: value.clone() for key, value in distance.state_dict().items()}
    distance.train()
    assert not any(module.training for module in distance.modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    images, others = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16).requires_grad_()
    distance(images, others).sum().backward()
    assert others.grad.isfinite().all()
    assert (others.grad.abs().amax((1, 2, 3)) > 0).all()
    for key, value in distance.state_dict().items():
        assert torch.equal(value, state[key]), key
    for wrong in (torch.rand(2, 3, 16, 8), torch.rand(2, 4, 16, 16), torch.rand(3, 16, 16)):
        with pytest.raises(ValueError, match="images and others must have one shape"):
            distance(images, wrong)


# ---- weight files


def save(weights: dict[str, Tensor], path: Path) -> Path:
    torch.save({name: value.float() if value.is_floating_point() else value for name, value in weights.items()}, path)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_torchvision_file_loads_under_its_published_name(tiny, tmp_path, name: str):
    weights = random_weights(LAYOUTS[name](*TINY[name]))
    distance = make_logit_distance(name, save(weights, tmp_path / "weights.pth"))
    assert distance.label == {"resnet50": "ResNet50 logits", "convnext_s": "ConvNeXt-S logits"}[name]
    for key, value in distance.network.state_dict().items():
        assert torch.equal(value, weights[key].to(value.dtype)), key
    old = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    torch.save({"model": old, "epoch": 3}, tmp_path / "old.pth")  # before torch 0.4.1, inside a training checkpoint
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(make_logit_distance(name, tmp_path / "old.pth").logits(images), distance.logits(images))


def test_a_timm_file_of_convnext_loads(tiny, tmp_path):
    weights = random_weights(convnext_layout(*TINY["convnext_s"]))
    timm = {timm_convnext_name(key): value.squeeze() if "scale" in key else value for key, value in weights.items()}
    assert {"stem.0.weight", "stages.0.blocks.0.gamma", "stages.1.downsample.1.bias", "head.fc.weight"} <= timm.keys()
    distance = make_logit_distance("convnext_s", save(timm, tmp_path / "timm.pth"))
    for key, value in distance.network.state_dict().items():
        assert torch.equal(value, weights[key].float()), key
    published = convnext_layout((3, 3, 27, 3), (96, 192, 384, 768), 1000)
    names = {timm_convnext_name(key): torch.empty(shape, device="meta") for key, shape in published.items()}
    assert shapes(translated(names, TIMM_NAMES)) == published


def test_without_a_file_the_features_are_random_and_have_no_other_name(tiny):
    images, others = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    for name in PUBLISHED:
        distance, again = make_logit_distance(name), make_logit_distance(name)
        assert distance.label == "random features"
        assert torch.equal(distance(images, others), again(images, others))
        assert 1e-4 < distance(images, others).min() < distance(images, others).max() < 100
    with pytest.raises(ValueError, match="network must be one of convnext_s, resnet50, got 'vgg'"):
        make_logit_distance("vgg")


class _Malicious:
    def __reduce__(self):
        return print, ("executed",)


def _without(weights: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name != key}


WRONG = {
    "missing": (lambda w: _without(w, "layer2.0.bn3.bias"), r"has no 'layer2\.0\.bn3\.bias', shape \[24\]"),
    "more": (lambda w: {**w, "layer3.0.conv1.weight": torch.ones(2)}, r"'layer3\.0\.conv1\.weight' is not part"),
    "size": (lambda w: {**w, "fc.bias": torch.ones(4)}, r"fc\.bias must have shape \[5\], got \[4\]"),
    "turned": (lambda w: {**w, "fc.weight": w["fc.weight"].T.contiguous()}, r"fc\.weight must have shape \[5, 24\]"),
    "other": (lambda _: {"epoch": 3}, "expected tensors by name, got 'epoch': int"),
    "alone": (lambda _: torch.ones(3), "expected tensors by name, got Tensor"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_of_another_network_is_named(tiny, tmp_path, kind: str):
    change, message = WRONG[kind]
    torch.save(change(random_weights(resnet_layout(*TINY["resnet50"]))), tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=rf"^logit_weights_file: .*wrong\.pth: .*{message}"):
        make_logit_distance("resnet50", tmp_path / "wrong.pth")


@pytest.mark.parametrize("name", PUBLISHED)
def test_malicious_and_truncated_files_are_refused(tiny, tmp_path, capsys, name: str):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(ValueError, match=r"^logit_weights_file: .*bad\.pth: refused"):
        make_logit_distance(name, tmp_path / "bad.pth")
    assert "executed" not in capsys.readouterr().out
    whole = save(random_weights(LAYOUTS[name](*TINY[name])), tmp_path / "whole.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^logit_weights_file: .*short\.pth: truncated"):
        make_logit_distance(name, tmp_path / "short.pth")
    with pytest.raises(FileNotFoundError, match=r"^logit_weights_file: .*nowhere\.pth: no such file"):
        make_logit_distance(name, tmp_path / "nowhere.pth")


# ---- training by it


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def small_run(data: Path, output: Path, **changes) -> TrainConfig:
    quantizer = QuantizerConfig(codebook_size=16, kmeans_init=False, dead_code_threshold=0.0)
    model = VQVAEConfig(patch_size=2, channels=8, channel_multipliers=[1], blocks=1, latent_channels=4)
    model.quantizer = quantizer
    options = {"image_size": 16, "batch_size": 2, "steps": 2, "log_every": 1, "sample_every": 0, "device": "cpu"}
    return TrainConfig(data=str(data), output=str(output), model=model, threads=1, **{**options, **changes})


def test_the_objective_adds_its_weighted_distances():
    """L1, L2, two distances and the quantizer's own loss, by their formulas in float64."""
    config = small_run(Path("."), Path("."), l1_weight=0.7, l2_weight=1.3, perceptual_weight=0.0)
    model = VQVAE(config.model).double()
    accelerator = SimpleNamespace(device=torch.device("cpu"), backward=lambda loss: loss.backward())
    objective = Objective(config, model, accelerator)
    config.logit_weight, config.perceptual_weight = 0.25, 0.5

    class Brightness(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    objective.logit_distance = LogitDistance(Brightness(), "brightness", side=16).double()
    objective.perceptual = lambda one, two: (one - two).pow(4).mean((1, 2, 3))  # type: ignore[assignment]
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    out = model(images)
    rec, other = out.reconstruction.detach().requires_grad_(), images
    difference = rec - other
    l1, l2 = difference.abs().sum() / difference.numel(), (difference**2).sum() / difference.numel()
    bright = (difference.mean((2, 3)) / 2 / torch.tensor(DEVIATION).double().flatten()) ** 2
    fourth = (difference**4).sum() / difference.numel()
    expected = 0.7 * l1 + 1.3 * l2 + 0.5 * fourth + 0.25 * bright.mean()
    (slope,) = torch.autograd.grad(expected, rec)
    seen = []
    out.reconstruction.register_hook(seen.append)
    loss = expected + out.loss
    found = dict(zip(objective.names, objective.backward(images, out).tolist(), strict=True))
    parts = {"loss": loss, "l1": l1, "mse": l2, "perceptual": fourth, "logit_distance": bright.mean()}
    for name, value in parts.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-6), name
    torch.testing.assert_close(seen[0], slope, rtol=1e-5, atol=1e-10)


def test_a_run_by_random_features_says_so_in_its_log_and_once_on_the_screen(tiny, pictures, tmp_path):
    losses = {"logit_weight": 0.1, "logit_network": "resnet50", "perceptual_weight": 0.1}
    config = small_run(pictures, tmp_path / "run", warmup_steps=0, **losses)
    with pytest.warns(UserWarning, match="random features, as no weight file is given") as seen:
        result = train(config)
    assert sorted(str(each.message).split(":")[0] for each in seen) == ["logit_distance", "perceptual"]
    assert all(line["logit_distance"] > 0 for line in result.history if "loss" in line)
    labels = [line for line in read_metrics(tmp_path / "run") if "networks" in line]
    assert labels == [{"step": 0, "networks": {"perceptual": "random features", "logit_distance": "random features"}}]
    with pytest.warns(UserWarning, match="random features"):
        train(TrainConfig(**{**vars(config), "resume": True, "steps": 3}))
    assert [line for line in read_metrics(tmp_path / "run") if "networks" in line] == labels


def test_a_run_by_a_file_is_called_by_its_name(tiny, pictures, tmp_path, recwarn):
    weights = save(random_weights(resnet_layout(*TINY["resnet50"])), tmp_path / "weights.pth")
    options = {"logit_weight": 0.1, "logit_network": "resnet50", "logit_weights_file": str(weights)}
    result = train(small_run(pictures, tmp_path / "run", **options, mixed_precision="bf16"))
    assert result.history[0] == {"step": 0, "networks": {"logit_distance": "ResNet50 logits"}}
    assert all(np.isfinite(line["logit_distance"]) for line in result.history if "loss" in line)
    assert not [each for each in recwarn if "random features" in str(each.message)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_weight": -1.0}, "logit_weight must be 0 or greater"),
        ({"logit_weight": float("nan")}, "logit_weight must be 0 or greater"),
        ({"logit_weight": 1.0, "logit_weights_file": "nowhere.pth"}, "logit_weights_file: nowhere"),
    ],
)
def test_wrong_options_stop_before_the_first_step(pictures, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(small_run(pictures, tmp_path / "run", **changes))
    assert not list((tmp_path / "run").glob("metrics.jsonl"))
