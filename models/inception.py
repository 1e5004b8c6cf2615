"""The InceptionV3 that the Fréchet inception distance is defined by (Szegedy et al. 2015, Heusel et al. 2017).

It is the network of TensorFlow's 2015-12-05 graph with the parameter names that its PyTorch copies share
(pt_inception-2015-12-05-6726825d.pth of pytorch-fid, weights-inception-2015-12-05-6726825d.pth of torch-fidelity), and
differs from the later InceptionV3 of model collections: average poolings leave the border out of their count, the
pooling in the last block takes the maximum, and there are 1008 logits and no auxiliary head.

The weights are the user's file. Without one the features are random, from a seed: a distance of them still compares two
sets of pictures, but it is no FID, and never called so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .published_weights import empty, fill, randomize, read_tensors

FEATURES = 2048
LOGITS = 1008
INPUT_SIZE = 299
SMALLEST_SIDE = 75  # of what the network itself takes: one pixel is left before the last blocks
EPSILON = 1e-3  # of the batch normalisations

Resize: TypeAlias = Literal["tensorflow", "pytorch"]


class Layer(NamedTuple):
    """A convolution of a path: its name, output channels, kernel (rows, columns) and stride."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# layers one after the other; layers in a tuple stand side by side, on the same input
Path_: TypeAlias = Sequence["Layer | tuple[Layer, ...]"]
Pooling: TypeAlias = Literal["average", "maximum", "halve"]


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, channels: int, layer: Layer, *, same: bool = True) -> None:
        super().__init__()
        rows, columns = layer.kernel
        padding = (rows // 2, columns // 2) if same and layer.stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels, layer.width, layer.kernel, layer.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.width, eps=EPSILON)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C', H', W']
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Several paths on one input, their outputs behind each other.

    Args:
        channels: of the input.
        paths: the convolutional paths.
        pooling: of the last path; "halve" takes maxima with stride 2 and has no convolution, the others have
            ``branch_pool``.
        pool_width: output channels of ``branch_pool``.
    """

    def __init__(self, channels: int, paths: Sequence[Path_], pooling: Pooling, pool_width: int = 192) -> None:
        super().__init__()
        self.pooling = pooling
        self.paths = [[step if isinstance(step, tuple) and not isinstance(step, Layer) else (step,) for step in path]
                      for path in paths]  # fmt: skip
        for path in self.paths:
            width = channels
            for step in path:
                for layer in step:
                    self.add_module(layer.name, ConvNorm(width, layer))
                width = sum(layer.width for layer in step)
        if pooling != "halve":
            self.branch_pool = ConvNorm(channels, Layer("branch_pool", pool_width))

    def _pooled(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C', H', W']
        if self.pooling == "halve":
            return F.max_pool2d(x, 3, stride=2)
        if self.pooling == "maximum":
            return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C', H', W']
        found = []
        for path in self.paths:
            along = x
            for step in path:
                along = torch.cat([self.get_submodule(layer.name)(along) for layer in step], dim=1)
            found.append(along)
        return torch.cat([*found, self._pooled(x)], dim=1)


def _chain(stem: str, *layers: tuple[int, tuple[int, int]], stride: int = 1) -> list[Layer]:
    """stem_1, stem_2, ...; the last one with the stride."""
    last = len(layers) - 1
    return [
        Layer(f"{stem}_{place + 1}", width, kernel, stride if place == last else 1)
        for place, (width, kernel) in enumerate(layers)
    ]


def _fork(name: str, width: int) -> tuple[Layer, Layer]:
    return Layer(f"{name}a", width, (1, 3)), Layer(f"{name}b", width, (3, 1))


def _block_35(channels: int, pool_width: int) -> Block:
    """On 35 x 35 (Szegedy et al., fig. 5)."""
    five = _chain("branch5x5", (48, (1, 1)), (64, (5, 5)))
    three = _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)))
    return Block(channels, [[Layer("branch1x1", 64)], five, three], "average", pool_width)


def _block_35_to_17() -> Block:
    three = _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), stride=2)
    return Block(288, [[Layer("branch3x3", 384, (3, 3), 2)], three], "halve")


def _block_17(inner: int) -> Block:
    """On 17 x 17, 7 x 7 in two one-dimensional halves (fig. 6)."""
    row, column = (1, 7), (7, 1)
    seven = _chain("branch7x7", (inner, (1, 1)), (inner, row), (192, column))
    double = _chain("branch7x7dbl", (inner, (1, 1)), (inner, column), (inner, row), (inner, column), (192, row))
    return Block(768, [[Layer("branch1x1", 192)], seven, double], "average")


def _block_17_to_8() -> Block:
    three = _chain("branch3x3", (192, (1, 1)), (320, (3, 3)), stride=2)
    seven = _chain("branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), stride=2)
    return Block(768, [three, seven], "halve")


def _block_8(channels: int, pooling: Pooling) -> Block:
    """On 8 x 8, wide (fig. 7)."""
    three: Path_ = [Layer("branch3x3_1", 384), _fork("branch3x3_2", 384)]
    double: Path_ = [*_chain("branch3x3dbl", (448, (1, 1)), (384, (3, 3))), _fork("branch3x3dbl_3", 384)]
    return Block(channels, [[Layer("branch1x1", 320)], three, double], pooling)


def resize_like_tensorflow(
    x: Tensor,  # [B, C, H, W]
    size: int,
) -> Tensor:  # [B, C, size, size]
    """Bilinear as TensorFlow 1 does it: pixel i is taken from i * H / size, not from its centre, without smoothing."""
    low, high, share = _taps(x.shape[3], size, x)
    x = torch.lerp(x[..., low], x[..., high], share)
    low, high, share = _taps(x.shape[2], size, x)
    return torch.lerp(x[:, :, low], x[:, :, high], share[:, None])


def _taps(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [size] each
    """Both neighbours of every output pixel, and the share of the second."""
    places = torch.arange(size, dtype=torch.float32, device=like.device) * (length / size)
    low = places.floor().long().clamp(max=length - 1)
    return low, (low + 1).clamp(max=length - 1), (places - low).to(like.dtype)


class InceptionFeatures(nn.Module):
    """The 2048 features of the last pooling, for pictures of any size; weights fixed, always in eval mode.

    Args:
        weights: file with the network's parameters (.pth or .safetensors); None: random features, from a seed.
        resize: how pictures become 299 x 299. "tensorflow": as the original and torch-fidelity do, x -> (x - 128) / 128
            after a bilinear resize from the pixels' corners; "pytorch": as pytorch-fid does, bilinear from the pixels'
            centres, and x -> 2 x / 255 - 1. Neither smooths before it shrinks a picture.

    Attributes:
        is_published: whether a distance of these features may be called FID.

    Raises:
        FileNotFoundError, ValueError: a file that is not there, is damaged, would run code, or holds another network;
            "inception", the option, stands before it.
    """

    num_features = FEATURES

    def __init__(self, weights: str | Path | None = None, *, resize: Resize = "tensorflow") -> None:
        super().__init__()
        if resize not in ("tensorflow", "pytorch"):
            raise ValueError(f"resize must be 'tensorflow' or 'pytorch', got {resize!r}")
        self.resize, self.is_published = resize, weights is not None
        empty(self._build)
        if weights is None:
            randomize(self)
        else:
            _load(self, weights)
        self.requires_grad_(False).eval()

    def _build(self) -> InceptionFeatures:
        self.Conv2d_1a_3x3 = ConvNorm(3, Layer("", 32, (3, 3), 2))
        self.Conv2d_2a_3x3 = ConvNorm(32, Layer("", 32, (3, 3)), same=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, Layer("", 64, (3, 3)))
        self.Conv2d_3b_1x1 = ConvNorm(64, Layer("", 80))
        self.Conv2d_4a_3x3 = ConvNorm(80, Layer("", 192, (3, 3)), same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_35(192, 32), _block_35(256, 64), _block_35(288, 64)
        self.Mixed_6a = _block_35_to_17()
        self.Mixed_6b, self.Mixed_6c = _block_17(128), _block_17(160)
        self.Mixed_6d, self.Mixed_6e = _block_17(160), _block_17(192)
        self.Mixed_7a = _block_17_to_8()
        self.Mixed_7b, self.Mixed_7c = _block_8(1280, "average"), _block_8(2048, "maximum")
        self.fc = nn.Linear(FEATURES, LOGITS)  # in every file; the features come before it
        return self

    def train(self, mode: bool = True) -> InceptionFeatures:
        """Stays in eval mode, whatever it is part of."""
        return super().train(False)

    def features(
        self,
        x: Tensor,  # [B, 3, H, W] as the network takes it, about in [-1, 1], H and W from 75
    ) -> Tensor:  # [B, 2048]
        """The network behind the resize."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))

    def prepared(
        self,
        pictures: Tensor,  # [B, 3, H, W] in [0, 255]
    ) -> Tensor:  # [B, 3, 299, 299] about in [-1, 1]
        """Pictures as the network takes them."""
        pictures = pictures.to(self.fc.weight.dtype)
        if self.resize == "tensorflow":
            return (resize_like_tensorflow(pictures, INPUT_SIZE) - 128) / 128
        size = (INPUT_SIZE, INPUT_SIZE)
        return F.interpolate(pictures / 255, size=size, mode="bilinear", align_corners=False) * 2 - 1

    def forward(
        self,
        pictures: Tensor,  # [B, 3, H, W] in [0, 255], of any dtype
    ) -> Tensor:  # [B, 2048]
        """Features of pictures."""
        return self.features(self.prepared(pictures))


def _load(network: InceptionFeatures, path: str | Path) -> None:
    """The parameters of a file.

    Raises:
        FileNotFoundError, ValueError: see InceptionFeatures.
    """
    found = read_tensors(path, "inception")
    try:
        fill(network, found, f"inception: {path}")
    except ValueError as error:
        raise ValueError(f"{error}{_hint(found)}") from error


def _hint(found: Mapping[str, Tensor]) -> str:
    """What a file may hold that is not FID's InceptionV3; empty where it cannot be told."""
    other = "AuxLogits.fc.weight" in found or ("fc.weight" in found and found["fc.weight"].shape[0] == 1000)
    return "; it looks like the InceptionV3 of a model collection, whose features are not FID's" if other else ""
