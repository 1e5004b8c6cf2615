"""The networks whose published weights the losses read, once more: their keys, shapes and arithmetic.

Written from the papers and from the names in the published files, without the package: nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Layout = dict[str, tuple[int, ...]]
Weights = Mapping[str, Tensor]


def _norm(name: str, channels: int, *, running: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    kinds = ("weight", "bias", "running_mean", "running_var") if running else ("weight", "bias")
    yield from ((f"{name}.{kind}", (channels,)) for kind in kinds)
    if running:
        yield f"{name}.num_batches_tracked", ()


def _layer(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


# ---- ResNet (He et al. 2016; torchvision's names)


def resnet_layout(blocks: Sequence[int], widths: Sequence[int], classes: int) -> Layout:
    layout: Layout = {"conv1.weight": (64, 3, 7, 7), **dict(_norm("bn1", 64, running=True))}
    channels = 64
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
        for place in range(count):
            name, out = f"layer{stage}.{place}", 4 * width
            shapes = (width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)
            for number, shape in enumerate(shapes, 1):
                layout[f"{name}.conv{number}.weight"] = shape
                layout.update(_norm(f"{name}.bn{number}", shape[0], running=True))
            if place == 0:
                layout[f"{name}.downsample.0.weight"] = (out, channels, 1, 1)
                layout.update(_norm(f"{name}.downsample.1", out, running=True))
            channels = out
    return {**layout, **dict(_layer("fc", classes, channels))}


def resnet_logits(weights: Weights, blocks: Sequence[int], x: Tensor) -> Tensor:
    def convolved(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        y = F.conv2d(x, kernel, None, stride, padding=kernel.shape[-1] // 2)
        mean, variance, scale, shift = (
            weights[f"{norm}.{kind}"][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = convolved(x, "conv1", "bn1", 2).clamp(min=0)
    x = F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2))
    for stage, count in enumerate(blocks, 1):
        for place in range(count):
            name, stride = f"layer{stage}.{place}", 2 if stage > 1 and place == 0 else 1
            y = convolved(x, f"{name}.conv1", f"{name}.bn1").clamp(min=0)
            y = convolved(y, f"{name}.conv2", f"{name}.bn2", stride).clamp(min=0)
            y = convolved(y, f"{name}.conv3", f"{name}.bn3")
            x = convolved(x, f"{name}.downsample.0", f"{name}.downsample.1", stride) if place == 0 else x
            x = (x + y).clamp(min=0)
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


# ---- ConvNeXt (Liu et al. 2022; torchvision's names)


def convnext_layout(blocks: Sequence[int], widths: Sequence[int], classes: int) -> Layout:
    layout: Layout = {}
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        if stage == 0:
            layout.update({**dict(_layer("features.0.0", width, 3, 4, 4)), **dict(_norm("features.0.1", width))})
        else:
            before, name = widths[stage - 1], f"features.{2 * stage}"
            layout.update({**dict(_norm(f"{name}.0", before)), **dict(_layer(f"{name}.1", width, before, 2, 2))})
        for place in range(count):
            name = f"features.{2 * stage + 1}.{place}"
            layout[f"{name}.layer_scale"] = (width, 1, 1)
            layout.update(_layer(f"{name}.block.0", width, 1, 7, 7))
            layout.update(_norm(f"{name}.block.2", width))
            layout.update(_layer(f"{name}.block.3", 4 * width, width))
            layout.update(_layer(f"{name}.block.5", width, 4 * width))
    return {**layout, **dict(_norm("classifier.0", widths[-1])), **dict(_layer("classifier.2", classes, widths[-1]))}


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:  # [..., C] -> [..., C]
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:  # [..., C] -> [..., C']
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.special.erf(x / 2**0.5))


def patches(weights: Weights, name: str, x: Tensor) -> Tensor:  # [B, H, W, C] -> [B, H / k, W / k, C']
    """A convolution whose stride is its kernel, as a product with every patch."""
    kernel = weights[f"{name}.weight"]
    side = kernel.shape[-1]
    cut = x.unfold(1, side, side).unfold(2, side, side)  # [B, h, w, C, k, k]
    return torch.einsum("bhwckl,dckl->bhwd", cut, kernel) + weights[f"{name}.bias"]


def convnext_logits(weights: Weights, blocks: Sequence[int], images: Tensor) -> Tensor:
    x = layer_norm(weights, "features.0.1", patches(weights, "features.0.0", images.permute(0, 2, 3, 1)))
    for stage, count in enumerate(blocks):
        if stage:
            name = f"features.{2 * stage}"
            x = patches(weights, f"{name}.1", layer_norm(weights, f"{name}.0", x))
        for place in range(count):
            name = f"features.{2 * stage + 1}.{place}"
            kernel = weights[f"{name}.block.0.weight"][:, 0]  # [C, 7, 7]
            cut = F.pad(x, (0, 0, 3, 3, 3, 3)).unfold(1, 7, 1).unfold(2, 7, 1)  # [B, H, W, C, 7, 7]
            y = torch.einsum("bhwckl,ckl->bhwc", cut, kernel) + weights[f"{name}.block.0.bias"]
            y = gelu(linear(weights, f"{name}.block.3", layer_norm(weights, f"{name}.block.2", y)))
            x = x + weights[f"{name}.layer_scale"].flatten() * linear(weights, f"{name}.block.5", y)
    return linear(weights, "classifier.2", layer_norm(weights, "classifier.0", x.mean((1, 2))))


def timm_convnext_name(name: str) -> str:
    """torchvision's name of a ConvNeXt tensor as timm writes it."""
    part, first, *rest = name.split(".")
    if part == "classifier":
        return ".".join(["head", {"0": "norm", "2": "fc"}[first], *rest])
    layer = int(first)
    if layer == 0:
        return ".".join(["stem", *rest])
    if layer % 2 == 0:
        return ".".join(["stages", str(layer // 2), "downsample", *rest])
    block = ["stages", str(layer // 2), "blocks", rest[0]]
    if rest[1] == "layer_scale":
        return ".".join([*block, "gamma"])
    return ".".join([*block, {"0": "conv_dw", "2": "norm", "3": "mlp.fc1", "5": "mlp.fc2"}[rest[2]], rest[3]])


# ---- ViT (Dosovitskiy et al. 2021; DINO's names)


def dino_layout(patch: int, width: int, depth: int, side: int) -> Layout:
    tokens = (side // patch) ** 2 + 1
    layout: Layout = {"cls_token": (1, 1, width), "pos_embed": (1, tokens, width)}
    layout.update(_layer("patch_embed.proj", width, 3, patch, patch))
    for number in range(depth):
        name = f"blocks.{number}"
        layout.update({**dict(_norm(f"{name}.norm1", width)), **dict(_norm(f"{name}.norm2", width))})
        layout.update(_layer(f"{name}.attn.qkv", 3 * width, width))
        layout.update(_layer(f"{name}.attn.proj", width, width))
        layout.update(_layer(f"{name}.mlp.fc1", 4 * width, width))
        layout.update(_layer(f"{name}.mlp.fc2", width, 4 * width))
    return {**layout, **dict(_norm("norm", width))}


def dino_block(weights: Weights, name: str, heads: int, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, C]
    width = x.shape[-1]
    q, k, v = linear(weights, f"{name}.attn.qkv", layer_norm(weights, f"{name}.norm1", x)).split(width, dim=-1)
    mixed = []
    for own in torch.arange(width).chunk(heads):
        scores = q[..., own] @ k[..., own].transpose(1, 2) / len(own) ** 0.5
        shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
        mixed.append(shares @ v[..., own])
    x = x + linear(weights, f"{name}.attn.proj", torch.cat(mixed, dim=-1))
    hidden = gelu(linear(weights, f"{name}.mlp.fc1", layer_norm(weights, f"{name}.norm2", x)))
    return x + linear(weights, f"{name}.mlp.fc2", hidden)


def dino_features(weights: Weights, heads: int, blocks: Sequence[int], images: Tensor) -> list[Tensor]:
    grid = patches(weights, "patch_embed.proj", images.permute(0, 2, 3, 1))  # [B, h, w, C]
    height, width, channels = grid.shape[1:]
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    positions = weights["pos_embed"][0, 1:].reshape(side, side, channels)
    positions = torch.einsum("ih,hwc,jw->ijc", bilinear(side, height), positions, bilinear(side, width))
    first = (weights["cls_token"][0] + weights["pos_embed"][0, :1]).expand(len(images), 1, channels)
    x = torch.cat([first, (grid + positions).reshape(len(images), -1, channels)], dim=1)
    found = [x]
    for number in range(max(blocks) + 1):
        x = dino_block(weights, f"blocks.{number}", heads, x)
        found += [x] if number in blocks else []
    return [(each[:, 1:] + each[:, :1]).transpose(1, 2) for each in found]


# ---- resizing


def bilinear(side: int, target: int) -> Tensor:  # float64 [target, side]
    """Between the two nearest of `side` values, whose edges go on."""
    centres = ((torch.arange(target, dtype=torch.float64) + 0.5) * side / target - 0.5).clamp(0, side - 1)
    return (1 - (torch.arange(side, dtype=torch.float64) - centres[:, None]).abs()).clamp(min=0)


def resizing(side: int, target: int) -> Tensor:  # float64 [target, side]
    """Antialiased bilinear: a triangle as wide as the pixels that it averages, scaled to the sum 1."""
    scale = side / target
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(side, dtype=torch.float64) + 0.5) - centres[:, None]
    weights = (1 - distance.abs() / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def random_weights(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """Numbers that make every part of a network count: float64, variances positive."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in layout.items():
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            weights[name] = 0.5 + drawn.square()
        elif len(shape) > 1 and name.endswith("weight"):
            weights[name] = drawn / (drawn[0].numel() ** 0.5)
        else:
            weights[name] = drawn * 0.3 + (1.0 if name.endswith(("weight", "layer_scale")) else 0.0)
    return weights
