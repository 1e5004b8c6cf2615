"""Discriminators, their losses and regularisers, the adaptive weight, augmentation and LPIPS, by their formulas."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vqkernels.models.adversarial import LastLayer, LeCam, balance, discriminator_loss, generator_loss, gradient_penalty
from vqkernels.models.augmentation import augment
from vqkernels.models.config import DiscriminatorConfig, from_dict
from vqkernels.models.discriminator import ActNorm, PatchDiscriminator, StyleDiscriminator, make_discriminator
from vqkernels.models.perceptual import VGG16, PerceptualDistance

ULP = torch.finfo(torch.float32).eps


def _logits(seed: int) -> Tensor:
    return torch.randn(5, 1, 7, 6, generator=torch.Generator().manual_seed(seed))


# ---- losses


def _expected(loss: str, r: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Discriminator's and generator's, as the papers write them."""
    r, f = r.double(), f.double()
    if loss == "hinge":
        return 0.5 * ((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean()), -f.mean()
    both = -(1 / (1 + (-r).exp())).log().mean() - (1 - 1 / (1 + (-f).exp())).log().mean()
    return (both, -(1 / (1 + (-f).exp())).log().mean()) if loss == "non_saturating" else (0.5 * both, -f.mean())


@pytest.mark.parametrize("loss", ["hinge", "vanilla", "non_saturating"])
def test_losses_and_their_gradients_follow_the_formulas(loss: str):
    real, fake = _logits(0).requires_grad_(), _logits(1).requires_grad_()
    expected_real, expected_fake = _logits(0).double().requires_grad_(), _logits(1).double().requires_grad_()
    own, other = discriminator_loss(loss, real, fake), generator_loss(loss, fake)
    expected = _expected(loss, expected_real, expected_fake)
    for value, right in zip((own, other), expected, strict=True):
        assert abs(value.item() - right.item()) <= 8 * ULP * max(1.0, abs(right.item()))
    (own + 2 * other).backward()
    (expected[0] + 2 * expected[1]).backward()
    for logits, right in ((real, expected_real), (fake, expected_fake)):
        assert (logits.grad.double() - right.grad).abs().max() <= 8 * ULP / logits.numel() * 4


def test_losses_survive_confident_logits():
    large = torch.full((4,), 200.0)
    for loss in ("hinge", "vanilla", "non_saturating"):
        assert math.isfinite(discriminator_loss(loss, -large, large))
        assert math.isfinite(generator_loss(loss, -large))


def test_a_loss_of_another_name_is_refused():
    with pytest.raises(ValueError, match="loss must be 'hinge'"):
        discriminator_loss("wasserstein", _logits(0), _logits(1))
    with pytest.raises(ValueError, match="loss must be 'hinge'"):
        generator_loss("wasserstein", _logits(0))


def test_lecam_follows_moving_averages():
    lecam, average_real, average_fake = LeCam(decay=0.9), None, None
    for step in range(4):
        real, fake = _logits(10 + step).double(), _logits(20 + step).double()
        average_real = real.mean() if average_real is None else 0.9 * average_real + 0.1 * real.mean()
        average_fake = fake.mean() if average_fake is None else 0.9 * average_fake + 0.1 * fake.mean()
        expected = (real - average_fake).clamp(min=0).pow(2).mean() + (average_real - fake).clamp(min=0).pow(2).mean()
        assert lecam(real.float(), fake.float()).item() == pytest.approx(expected.item(), rel=32 * ULP)
        wide = (real.requires_grad_(), fake.requires_grad_())
        own = LeCam(decay=0.9).double()
        own.load_state_dict(lecam.state_dict())
        with torch.no_grad():  # its averages have moved already: the penalty alone, at the same place
            own.decay = 1.0
        slopes = torch.autograd.grad(own(*wide), wide)
        over = 2 * (real - own.average_fake).clamp(min=0) / real.numel()
        under = -2 * (own.average_real - fake).clamp(min=0) / fake.numel()
        for slope, right in zip(slopes, (over, under), strict=True):
            torch.testing.assert_close(slope, right, rtol=1e-12, atol=1e-15)
    copy = LeCam(decay=0.9)
    copy.load_state_dict(lecam.state_dict())
    assert torch.equal(copy(_logits(5), _logits(6)), lecam(_logits(5), _logits(6)))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_lecam_forgets_a_step_that_is_not_finite(number: float):
    lecam, undisturbed = LeCam(), LeCam()
    for seed in (0, 2):
        for logits in ((_logits(seed), _logits(seed) * number), (_logits(seed) * number, _logits(seed))):
            lecam(*logits)
        assert lecam.started == undisturbed.started
        pair = _logits(seed), _logits(seed + 1)
        assert torch.equal(lecam(*pair), undisturbed(*pair))
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(lecam.state_dict()[name], value)


def test_gradient_penalty_of_a_known_function():
    weight = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    images = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    # D(x) = (w . x)^2 has the gradient 2 (w . x) w
    penalty = gradient_penalty(lambda x: (x * weight).sum((1, 2, 3)).square(), images)
    dot = (images * weight).sum((1, 2, 3))
    expected = 0.5 * (4 * dot.square() * weight.square().sum()).mean()
    assert torch.allclose(penalty, expected, rtol=1e-12)
    (slope,) = torch.autograd.grad(penalty, weight)
    (right,) = torch.autograd.grad(expected, weight)
    assert torch.allclose(slope, right, rtol=1e-10)


# ---- the adaptive weight


@pytest.mark.parametrize("adaptive", [True, False])
def test_balanced_gradient_is_the_published_one(adaptive: bool):
    """Against the form that passes both networks again for the last layer's gradients, in float64."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
    decoder = nn.Sequential(convolutions[0], nn.SiLU(), convolutions[1], nn.PixelShuffle(2)).double()
    network = PatchDiscriminator(4, 1, "act").double().eval()
    images, z = torch.randn(2, 3, 16, 16).double(), torch.randn(2, 4, 8, 8).double()

    def losses(reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        return (reconstruction - images).abs().mean(), generator_loss("hinge", network(reconstruction))

    reconstruction = decoder(z)
    rec, adv = losses(reconstruction)
    own, other = (torch.autograd.grad(loss, convolutions[1].weight, retain_graph=True)[0] for loss in (rec, adv))
    weight = 0.8 * (own.norm() / (other.norm() + 1e-4)).clamp(0, 1e4).detach() if adaptive else torch.tensor(0.8)
    expected = torch.autograd.grad(rec + weight * adv, list(decoder.parameters()))

    last = LastLayer(convolutions[1])
    balanced = balance(last, *losses(decoder(z)), weight=0.8, adaptive=adaptive)
    last.output.backward(balanced.gradient)
    assert balanced.adaptive_weight.item() == pytest.approx(weight.item(), rel=1e-5)  # it is computed in float32
    for parameter, right in zip(decoder.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, right, rtol=1e-5, atol=1e-9)
    assert all(parameter.grad is None for parameter in network.parameters())


# ---- discriminators


def _taming_keys(layers: int, norm: str) -> set[str]:
    """What the published layout holds: convolution, then (normalisation, LeakyReLU) from the second on."""
    names = {"main.0.weight", "main.0.bias"}
    place = 2
    for _ in range(layers):
        names.add(f"main.{place}.weight")
        if norm == "batch":
            own = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        else:
            names.add(f"main.{place}.bias")
            own = ("loc", "scale", "initialized")
        names |= {f"main.{place + 1}.{each}" for each in own}
        place += 3
    return names | {f"main.{place}.weight", f"main.{place}.bias"}


@pytest.mark.parametrize("norm", ["batch", "act"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_patch_discriminator_has_the_published_layout(layers: int, norm: str):
    network = PatchDiscriminator(8, layers, norm)
    assert set(network.state_dict()) == _taming_keys(layers, norm)
    side = network.smallest_side
    assert network(torch.randn(2, 3, side, side + 5)).shape[1:3] == (1, 1)
    with pytest.raises(ValueError, match=f"at least {side} pixels"):
        network(torch.randn(2, 3, side - 1, side))
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [8, *(8 * min(2**n, 8) for n in range(1, layers + 1)), 1]


def test_patch_logits_are_local():
    network = PatchDiscriminator(4, 2, "act").eval()
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    logits = network(images)
    logits[0, 0, 0, 0].backward()
    seen = images.grad[0].abs().sum(0).nonzero().amax(0)
    assert (seen < 34).all()  # the receptive field of two strided layers


def test_act_norm_starts_normalised_and_then_learns():
    norm = ActNorm(3)
    x = torch.randn(8, 3, 6, 6) * torch.tensor([1.0, 5.0, 0.1])[:, None, None] + 3
    y = norm(x)
    assert y.mean((0, 2, 3)).abs().max() < 1e-5
    assert (y.std((0, 2, 3)) - 1).abs().max() < 1e-4
    again = norm(2 * x)  # the first batch has set it
    assert torch.allclose(again, norm.scale * (2 * x + norm.loc))
    fresh = ActNorm(3).eval()
    assert torch.equal(fresh(x), x)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_act_norm_does_not_start_from_a_batch_that_is_not_finite(number: float):
    norm, undisturbed = ActNorm(3), ActNorm(3)
    broken, images = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
    broken[1, 2, 3, 4] = number
    norm(broken)
    assert norm.initialized == 0
    assert torch.equal(norm.scale, torch.ones(1, 3, 1, 1))
    norm.look_again()
    assert torch.equal(norm(images), undisturbed(images))
    assert norm.initialized == 1
    norm.look_again()
    assert torch.equal(norm(2 * images), undisturbed(2 * images))  # what has started stays


def test_style_discriminator_sees_the_spread_of_a_group():
    torch.manual_seed(0)
    network = StyleDiscriminator(16, 8)
    images = torch.randn(4, 3, 16, 16)
    logits = network(images)
    assert logits.shape == (4, 1)
    alike = network(images[:1].expand(4, -1, -1, -1))
    assert (alike - alike[0]).abs().max() < 1e-5  # four times the same image
    assert (logits[0] - alike[0]).abs() > 1e-3  # the others of its group count
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    for side in (4, 12):
        with pytest.raises(ValueError, match="power of two"):
            StyleDiscriminator(side)


def test_a_discriminator_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"discriminator\.layers"):
        make_discriminator(DiscriminatorConfig(layers=5), 64)
    with pytest.raises(ValueError, match="image_size must be a power of two"):
        make_discriminator(DiscriminatorConfig(kind="style"), 96)
    assert isinstance(make_discriminator(DiscriminatorConfig(channels=8), 64), PatchDiscriminator)
    config = from_dict(DiscriminatorConfig, {"augmentation": ["color", "cutout"], "kind": "style"}, "discriminator")
    assert config.augmentation == ["color", "cutout"]
    with pytest.raises(ValueError, match="augmentation"):
        from_dict(DiscriminatorConfig, {"augmentation": ["mixup"]}, "discriminator")


# ---- augmentation


@pytest.mark.parametrize("kind", ["color", "translation", "cutout"])
def test_augmentation_is_random_per_image_and_differentiable(kind: str):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 16, dtype=torch.float64).requires_grad_()
    out = augment(images, [kind], generator)
    assert out.shape == images.shape
    assert torch.equal(out, augment(images, [kind], torch.Generator().manual_seed(0)))
    same = augment(images[:1].expand(6, -1, -1, -1), [kind], torch.Generator().manual_seed(0))
    assert any(not torch.equal(same[0], same[i]) for i in range(1, 6))
    one = torch.randn_like(images)
    fixed = lambda x: augment(x, [kind], torch.Generator().manual_seed(3))  # noqa: E731
    step = 1e-6
    slope = (fixed(images + step * one) - fixed(images - step * one)).sum() / (2 * step)
    (gradient,) = torch.autograd.grad(fixed(images).sum(), images)
    assert (gradient * one).sum().item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-6)


def test_translation_moves_by_whole_pixels_and_fills_with_zeros():
    images = torch.arange(1, 1 + 64.0).view(1, 1, 8, 8).expand(20, 3, 8, 8)
    moved = augment(images, ["translation"], torch.Generator().manual_seed(0))
    seen = set()
    for image in moved[:, 0]:
        shifts = [
            (dy, dx)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if torch.equal(F.pad(images[0, 0], (1, 1, 1, 1))[1 - dy : 9 - dy, 1 - dx : 9 - dx], image)
        ]
        assert len(shifts) == 1
        seen.update(shifts)
    assert len(seen) > 4


def test_cutout_removes_a_square_and_unknown_kinds_are_refused():
    out = augment(torch.ones(50, 3, 16, 16), ["cutout"], torch.Generator().manual_seed(0))
    for hole in out[:, 0] == 0:
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == rows * columns
        assert 1 <= rows <= 8
        assert 1 <= columns <= 8
    assert augment(out, []) is out
    with pytest.raises(ValueError, match="mixup"):
        augment(out, ["mixup"])


# ---- LPIPS


def _vgg_file(folder, seed: int = 0):
    generator, weights, place, channels = torch.Generator().manual_seed(seed), {}, 0, 3
    for widths in VGG16:
        for width in widths:
            shape = (width, channels, 3, 3)
            weights[f"features.{place}.weight"] = torch.randn(shape, generator=generator) * (2 / (9 * channels)) ** 0.5
            weights[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
            place, channels = place + 2, width
        place += 1
    torch.save(weights, folder / "vgg16.pth")
    linear = {
        f"lin{i}.model.1.weight": torch.rand(1, widths[-1], 1, 1, generator=generator) for i, widths in enumerate(VGG16)
    }
    torch.save(linear, folder / "lpips.pth")
    return weights, linear


def _lpips(a: Tensor, b: Tensor, vgg: dict[str, Tensor], linear: dict[str, Tensor]) -> Tensor:
    """The paper's distance, layer by layer, in float64."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    both = [(x.double() - shift.double()[:, None, None]) / scale.double()[:, None, None] for x in (a, b)]
    total, place = torch.zeros(len(a), dtype=torch.float64), 0
    for block, count in enumerate((2, 2, 3, 3, 3)):
        both = [F.max_pool2d(x, 2) if block else x for x in both]
        for _ in range(count):
            weight, bias = (vgg[f"features.{place}.{kind}"].double() for kind in ("weight", "bias"))
            both = [F.conv2d(x, weight, bias, padding=1).relu() for x in both]
            place += 2
        place += 1
        one, other = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in both)
        total = total + F.conv2d((one - other) ** 2, linear[f"lin{block}.model.1.weight"].double()).mean((1, 2, 3))
    return total


def test_lpips_is_the_published_distance(tmp_path):
    vgg, linear = _vgg_file(tmp_path)
    distance = PerceptualDistance(tmp_path / "vgg16.pth", tmp_path / "lpips.pth")
    assert distance.label == "LPIPS (VGG16)"
    a, b = torch.rand(2, 3, 16, 16) * 2 - 1, (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    found = distance(a, b)
    assert torch.allclose(found.double(), _lpips(a, b, vgg, linear), rtol=1e-4)
    found.sum().backward()
    assert b.grad.isfinite().all()
    assert b.grad.abs().max() > 0
    assert distance(a, a).abs().max() == 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_lpips_and_its_gradient_in_float64(tmp_path):
    vgg, linear = _vgg_file(tmp_path)
    distance = PerceptualDistance(tmp_path / "vgg16.pth", tmp_path / "lpips.pth").double()
    a, b = (torch.rand(1, 3, 16, 16, dtype=torch.float64) * 2 - 1 for _ in range(2))
    found = distance(a, b.requires_grad_())
    (slope,) = torch.autograd.grad(found.sum(), b)
    expected = _lpips(a, b, vgg, linear)
    (right,) = torch.autograd.grad(expected.sum(), b)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # shift and scale are kept in float32
    assert (slope - right).norm() < 1e-5 * right.norm()


def test_random_features_are_never_called_lpips():
    distance = PerceptualDistance()
    assert distance.label == "random features"
    again = PerceptualDistance()
    a, b = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    assert torch.equal(distance(a, b), again(a, b))
    assert distance(a, b).item() > 0
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance(flat, b).sum().backward()
    assert flat.grad.isfinite().all()


class _Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_weight_files_that_do_not_fit_are_named(tmp_path, capsys):
    weights, linear = _vgg_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^vgg: .*nowhere\.pth: no such file"):
        PerceptualDistance(tmp_path / "nowhere.pth")
    torch.save({k: v for k, v in weights.items() if k != "features.28.bias"}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"^vgg: .*short\.pth: has no 'features\.28\.bias'"):
        PerceptualDistance(tmp_path / "short.pth")
    torch.save({**weights, "features.0.weight": weights["features.0.weight"].mT[:, :2]}, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match=r"features\.0\.weight must have shape \[64, 3, 3, 3\], got \[64, 2, 3, 3\]"):
        PerceptualDistance(tmp_path / "narrow.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match=r"^lpips: .*tensor\.pth: expected tensors by name, got Tensor"):
        PerceptualDistance(tmp_path / "vgg16.pth", tmp_path / "tensor.pth")
    torch.save({k: v for k, v in linear.items() if not k.startswith("lin3")}, tmp_path / "four.pth")
    with pytest.raises(ValueError, match=r"^lpips: .*four\.pth: has no 'lin3\.model\.1\.weight'"):
        PerceptualDistance(tmp_path / "vgg16.pth", tmp_path / "four.pth")
    torch.save({**weights, "features.30.weight": torch.ones(512, 512, 3, 3)}, tmp_path / "vgg19.pth")
    with pytest.raises(ValueError, match=r"^vgg: .*vgg19\.pth: 'features\.30\.weight' is not part of the network"):
        PerceptualDistance(tmp_path / "vgg19.pth")
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(ValueError, match=r"^vgg: .*bad\.pth: refused"):
        PerceptualDistance(tmp_path / "bad.pth")
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "cut.pth").write_bytes((tmp_path / "lpips.pth").read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"^lpips: .*cut\.pth: truncated"):
        PerceptualDistance(tmp_path / "vgg16.pth", tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="vgg must be given"):
        PerceptualDistance(linear=tmp_path / "lpips.pth")
    with pytest.raises(ValueError, match="16 pixels"):
        PerceptualDistance()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
