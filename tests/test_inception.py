"""FID's InceptionV3 against a plain transcription, its weight files, and the Fréchet distance against closed forms."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from vqkernels.models.frechet import FeatureGaussian, frechet_distance
from vqkernels.models.inception import InceptionFeatures, resize_like_tensorflow

# name, output channels, input channels, kernel rows, kernel columns; written down from the published state_dicts
STEM = """
Conv2d_1a_3x3 32 3 3 3
Conv2d_2a_3x3 32 32 3 3
Conv2d_2b_3x3 64 32 3 3
Conv2d_3b_1x1 80 64 1 1
Conv2d_4a_3x3 192 80 3 3
"""
BLOCK_A = """
branch1x1 64 {c} 1 1
branch5x5_1 48 {c} 1 1
branch5x5_2 64 48 5 5
branch3x3dbl_1 64 {c} 1 1
branch3x3dbl_2 96 64 3 3
branch3x3dbl_3 96 96 3 3
branch_pool {p} {c} 1 1
"""
BLOCK_B = """
branch3x3 384 288 3 3
branch3x3dbl_1 64 288 1 1
branch3x3dbl_2 96 64 3 3
branch3x3dbl_3 96 96 3 3
"""
BLOCK_C = """
branch1x1 192 768 1 1
branch7x7_1 {c} 768 1 1
branch7x7_2 {c} {c} 1 7
branch7x7_3 192 {c} 7 1
branch7x7dbl_1 {c} 768 1 1
branch7x7dbl_2 {c} {c} 7 1
branch7x7dbl_3 {c} {c} 1 7
branch7x7dbl_4 {c} {c} 7 1
branch7x7dbl_5 192 {c} 1 7
branch_pool 192 768 1 1
"""
BLOCK_D = """
branch3x3_1 192 768 1 1
branch3x3_2 320 192 3 3
branch7x7x3_1 192 768 1 1
branch7x7x3_2 192 192 1 7
branch7x7x3_3 192 192 7 1
branch7x7x3_4 192 192 3 3
"""
BLOCK_E = """
branch1x1 320 {c} 1 1
branch3x3_1 384 {c} 1 1
branch3x3_2a 384 384 1 3
branch3x3_2b 384 384 3 1
branch3x3dbl_1 448 {c} 1 1
branch3x3dbl_2 384 448 3 3
branch3x3dbl_3a 384 384 1 3
branch3x3dbl_3b 384 384 3 1
branch_pool 192 {c} 1 1
"""
BLOCKS = {
    "Mixed_5b": BLOCK_A.format(c=192, p=32),
    "Mixed_5c": BLOCK_A.format(c=256, p=64),
    "Mixed_5d": BLOCK_A.format(c=288, p=64),
    "Mixed_6a": BLOCK_B,
    "Mixed_6b": BLOCK_C.format(c=128),
    "Mixed_6c": BLOCK_C.format(c=160),
    "Mixed_6d": BLOCK_C.format(c=160),
    "Mixed_6e": BLOCK_C.format(c=192),
    "Mixed_7a": BLOCK_D,
    "Mixed_7b": BLOCK_E.format(c=1280),
    "Mixed_7c": BLOCK_E.format(c=2048),
}


def _published() -> dict[str, tuple[int, ...]]:
    lines = STEM.split("\n") + [
        f"{block}.{line}" for block, text in BLOCKS.items() for line in text.split("\n") if line
    ]
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for line in filter(None, lines):
        name, *shape = line.split()
        shapes[f"{name}.conv.weight"] = tuple(map(int, shape))
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (int(shape[0]),)
    return shapes


@pytest.fixture(scope="module")
def network() -> InceptionFeatures:
    """Random weights, with normalisations that do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = InceptionFeatures()
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.2, 0.2, generator=generator)
    return network


def test_names_and_shapes_are_those_of_the_published_file(network):
    state = network.state_dict()
    found = {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert found == _published()
    assert len(found) == 94 * 5 + 2


def _transcribed(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network line by line, from its parameters alone."""

    def conv(name: str, x: Tensor, *, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding)
        mean, variance = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
        x = F.batch_norm(x, mean, variance, state[f"{name}.bn.weight"], state[f"{name}.bn.bias"], eps=0.001)
        return F.relu(x)

    def average(x: Tensor) -> Tensor:
        ones = torch.ones_like(x[:, :1])
        return F.avg_pool2d(x, 3, 1, 1) * 9 / (F.avg_pool2d(ones, 3, 1, 1) * 9)

    def block_a(b: str, x: Tensor) -> Tensor:
        five = conv(f"{b}.branch5x5_2", conv(f"{b}.branch5x5_1", x), padding=(2, 2))
        three = conv(f"{b}.branch3x3dbl_2", conv(f"{b}.branch3x3dbl_1", x), padding=(1, 1))
        three = conv(f"{b}.branch3x3dbl_3", three, padding=(1, 1))
        return torch.cat([conv(f"{b}.branch1x1", x), five, three, conv(f"{b}.branch_pool", average(x))], 1)

    def block_b(b: str, x: Tensor) -> Tensor:
        three = conv(f"{b}.branch3x3dbl_2", conv(f"{b}.branch3x3dbl_1", x), padding=(1, 1))
        three = conv(f"{b}.branch3x3dbl_3", three, stride=2)
        return torch.cat([conv(f"{b}.branch3x3", x, stride=2), three, F.max_pool2d(x, 3, 2)], 1)

    def block_c(b: str, x: Tensor) -> Tensor:
        row, column = {"padding": (0, 3)}, {"padding": (3, 0)}
        seven = conv(f"{b}.branch7x7_2", conv(f"{b}.branch7x7_1", x), **row)
        seven = conv(f"{b}.branch7x7_3", seven, **column)
        double = conv(f"{b}.branch7x7dbl_1", x)
        for number, padding in ((2, column), (3, row), (4, column), (5, row)):
            double = conv(f"{b}.branch7x7dbl_{number}", double, **padding)
        return torch.cat([conv(f"{b}.branch1x1", x), seven, double, conv(f"{b}.branch_pool", average(x))], 1)

    def block_d(b: str, x: Tensor) -> Tensor:
        three = conv(f"{b}.branch3x3_2", conv(f"{b}.branch3x3_1", x), stride=2)
        seven = conv(f"{b}.branch7x7x3_2", conv(f"{b}.branch7x7x3_1", x), padding=(0, 3))
        seven = conv(f"{b}.branch7x7x3_4", conv(f"{b}.branch7x7x3_3", seven, padding=(3, 0)), stride=2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def block_e(b: str, x: Tensor, pooled: Tensor) -> Tensor:
        three = conv(f"{b}.branch3x3_1", x)
        three_a, three_b = (conv(f"{b}.branch3x3_2{s}", three, padding=p) for s, p in (("a", (0, 1)), ("b", (1, 0))))
        double = conv(f"{b}.branch3x3dbl_2", conv(f"{b}.branch3x3dbl_1", x), padding=(1, 1))
        double_a, double_b = (
            conv(f"{b}.branch3x3dbl_3{s}", double, padding=p) for s, p in (("a", (0, 1)), ("b", (1, 0)))
        )
        parts = [conv(f"{b}.branch1x1", x), three_a, three_b, double_a, double_b, conv(f"{b}.branch_pool", pooled)]
        return torch.cat(parts, 1)

    x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, stride=2))
    x = F.max_pool2d(conv("Conv2d_2b_3x3", x, padding=(1, 1)), 3, 2)
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = block_a(name, x)
    x = block_b("Mixed_6a", x)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = block_c(name, x)
    x = block_d("Mixed_7a", x)
    assert x.shape[2:] == (2, 2)  # or the poolings below would all do the same
    x = block_e("Mixed_7b", x, average(x))
    x = block_e("Mixed_7c", x, F.max_pool2d(x, 3, 1, 1))
    return x.mean((2, 3))


def test_features_are_those_of_a_plain_transcription(network):
    """In float64, where a hundred layers in another order of sums differ by next to nothing."""
    double = copy.deepcopy(network).double()
    x = torch.randn(2, 3, 107, 107, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = double.features(x), _transcribed(double.state_dict(), x)
    assert found.shape == (2, 2048)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_it_stays_in_eval_mode(network):
    network.train()
    assert not any(module.training for module in network.modules())


def _bilinear(row: list[float], size: int, offset: float) -> list[float]:
    """One row, the output pixel i taken from (i + offset) * scale - offset."""
    scale, found = len(row) / size, []
    for i in range(size):
        place = max((i + offset) * scale - offset, 0.0)
        low = min(int(place), len(row) - 1)
        high = min(low + 1, len(row) - 1)
        found.append(row[low] + (row[high] - row[low]) * (place - low))
    return found


@pytest.mark.parametrize("length", [2, 5, 8, 23])
def test_resize_like_tensorflow_takes_from_the_corners(length):
    row = torch.rand(length, generator=torch.Generator().manual_seed(length)).tolist()
    across = resize_like_tensorflow(torch.tensor(row).expand(1, 1, 3, length), 8)
    torch.testing.assert_close(across[0, 0, 4], torch.tensor(_bilinear(row, 8, 0.0)))
    down = resize_like_tensorflow(torch.tensor(row)[:, None].expand(1, 1, length, 3), 8)
    torch.testing.assert_close(down[0, 0, :, 5], torch.tensor(_bilinear(row, 8, 0.0)))


@pytest.mark.parametrize(("resize", "offset", "scaled"), [("tensorflow", 0.0, 128), ("pytorch", 0.5, 127.5)])
def test_pictures_are_prepared_as_their_project_does(network, monkeypatch, resize, offset, scaled):
    monkeypatch.setattr(network, "resize", resize)
    row = [0.0, 255.0, 100.0, 37.0]
    prepared = network.prepared(torch.tensor(row, dtype=torch.uint8).expand(1, 3, 4, 4))
    expected = [(value - scaled) / scaled for value in _bilinear(row, 299, offset)]
    assert prepared.shape == (1, 3, 299, 299)
    torch.testing.assert_close(prepared[0, 1, 150], torch.tensor(expected), rtol=0, atol=1e-5)


# Weight files


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weight_file_is_read_with_or_without_counters(network, tmp_path, suffix):
    state = network.state_dict()
    path = tmp_path / f"inception{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file({name: value for name, value in state.items() if "num_batches" not in name}, path)
    loaded = InceptionFeatures(path)
    assert loaded.is_published
    assert not network.is_published
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name


class _Command:
    def __reduce__(self):
        return print, ("this ran",)


def test_other_files_are_refused_by_name(tmp_path, capsys):
    def complaint(content: object, name: str = "weights.pth") -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            InceptionFeatures(path)
        assert str(caught.value).startswith(f"inception: {path}: ")
        return str(caught.value)

    assert "no such file" in complaint(None, "missing.pth")
    assert "has no 'Conv2d_1a_3x3.conv.weight'" in complaint({"features.0.weight": torch.zeros(1)})
    assert "model collection" in complaint({"fc.weight": torch.zeros(1000, 2)})
    assert "Conv2d_1a_3x3.conv.weight must have shape [32, 3, 3, 3], got [32, 3, 5, 5]" in complaint(
        _of_the_layout("stem")
    )
    assert "'more.weight' is not part of the network" in complaint(_of_the_layout("more"))
    assert "by name" in complaint([torch.zeros(2)])
    assert "refused" in complaint(pickle.dumps(_Command()))
    assert "this ran" not in capsys.readouterr().out
    torch.save({"fc.weight": torch.zeros(100, 100)}, tmp_path / "whole.pth")
    assert "truncated" in complaint((tmp_path / "whole.pth").read_bytes()[:3000], "cut.pth")


def _of_the_layout(change: str) -> dict[str, Tensor]:
    """Every parameter as one number seen in its shape, so that the file stays small; one thing is wrong."""
    state = {name: torch.zeros(1).expand(shape) for name, shape in _published().items()}
    if change == "stem":
        state["Conv2d_1a_3x3.conv.weight"] = torch.zeros(32, 3, 5, 5)
    else:
        state["more.weight"] = torch.zeros(1)
    return state


# The distance


def _rows(count: int, deviations: list[float], mean: list[float], seed: int) -> Tensor:  # [count, D]
    """Rows whose sample covariance is exactly diagonal."""
    noise = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    orthonormal, _ = torch.linalg.qr(noise - noise.mean(0))
    scaled = orthonormal * torch.tensor(deviations, dtype=torch.float64) * (count - 1) ** 0.5
    return scaled + torch.tensor(mean, dtype=torch.float64)


def _gaussian(rows: Tensor, batch: int, dim: int | None = None) -> FeatureGaussian:
    gaussian = FeatureGaussian(dim or rows.shape[1])
    for part in rows.split(batch):
        gaussian.update(part)
    return gaussian


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_distance_of_known_gaussians(batch):
    one = _gaussian(_rows(40, [1.0, 2.0, 0.5], [0.0, 1.0, 2.0], 0), batch)
    other = _gaussian(_rows(30, [1.5, 0.0, 0.5], [1.0, 1.0, 0.0], 1), batch)
    expected = (1 + 0 + 4) + (0.25 + 4 + 0)  # means, and squared differences of the deviations
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)


class _Identity(nn.Module):
    num_features = 12

    def forward(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize(("count", "kept"), [(200, False), (9, True)], ids=["regular", "singular"])
def test_distance_is_that_of_torchmetrics(count, kept):
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    one = torch.randn(count, 12, dtype=torch.float64, generator=generator) @ mix
    other = torch.randn(count + 2, 12, dtype=torch.float64, generator=generator) * 0.7 + 0.3
    metric = FrechetInceptionDistance(feature=_Identity(), normalize=True)
    metric.update(one, real=True)
    metric.update(other, real=False)
    ours = _gaussian(one, 4), _gaussian(other, 5)
    assert (ours[0]._sums is None) == kept
    assert frechet_distance(*ours) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_summed_and_kept_rows_agree_where_the_covariance_is_singular():
    thin = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) @ torch.randn(
        3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    wide = torch.randn(60, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    kept = frechet_distance(_gaussian(thin, 8, dim=50), _gaussian(wide, 8, dim=60))
    summed = frechet_distance(_gaussian(thin, 8), _gaussian(wide, 8))
    assert summed == pytest.approx(kept, rel=1e-9)


def test_distance_needs_two_pictures_and_tells_of_nan():
    rows = torch.randn(30, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        frechet_distance(_gaussian(rows[:1], 1), _gaussian(rows, 8))
    broken = rows.clone()
    broken[3, 2] = float("nan")
    assert str(frechet_distance(_gaussian(broken, 8), _gaussian(rows, 8))) == "nan"
