"""The state_dicts of published VQGANs, name by name and shape by shape, written from their architecture alone.

Every function lists the same network in the order in which its layers run, so that the lists belong together place by
place whatever the names are: that is what the translations are tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
Entry = tuple[str, Shape]


@dataclass(frozen=True)
class Architecture:
    """What the authors' config files say."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_levels: tuple[int, ...] = (4,)
    z_channels: int = 256
    embed_dim: int = 256
    n_embed: int = 1024
    mid_attn: bool = True


PUBLISHED = {
    "f16-1024": Architecture(),
    "f16-16384": Architecture(n_embed=16384),
    "ldm-f16": Architecture(n_embed=16384, z_channels=8, embed_dim=8),
    "f8": Architecture(ch_mult=(1, 2, 2, 4), attn_levels=(3,), z_channels=4, embed_dim=4, n_embed=16384),
    "f8-n256": Architecture(ch_mult=(1, 2, 2, 4), attn_levels=(3,), z_channels=4, embed_dim=4, n_embed=256),
    "f4": Architecture(ch_mult=(1, 2, 4), attn_levels=(), z_channels=3, embed_dim=3, n_embed=8192),
    "f4-noattn": Architecture(
        ch_mult=(1, 2, 4), attn_levels=(), z_channels=3, embed_dim=3, n_embed=8192, mid_attn=False
    ),
    "llamagen-16": Architecture(embed_dim=8, n_embed=16384),
    "ibq-262144": Architecture(num_res_blocks=4, n_embed=262144),
    "ibq-16384": Architecture(num_res_blocks=4, n_embed=16384),
    "llamagen-8": Architecture(ch_mult=(1, 2, 2, 4), attn_levels=(3,), embed_dim=8, n_embed=16384),
}


@dataclass(frozen=True)
class Names:
    """How one project calls the parts; `{}` are level and block, both counted from 0 in the order they run."""

    down: Callable[[int, int], str]
    up: Callable[[int, int], str]  # the level counts from the coarse end
    down_attn: Callable[[int, int], str]
    up_attn: Callable[[int, int], str]
    downsample: Callable[[int], str]
    upsample: Callable[[int], str]
    mid: tuple[str, str, str]
    norm_out: str
    shortcut: str
    attn: tuple[str, str, str, str, str]  # norm, query, key, value, output
    linear: bool  # whether attention is of Linear layers


def _taming(levels: int) -> Names:
    def last(level: int) -> int:
        return levels - 1 - level

    return Names(
        down=lambda i, j: f"down.{i}.block.{j}",
        up=lambda i, j: f"up.{last(i)}.block.{j}",
        down_attn=lambda i, j: f"down.{i}.attn.{j}",
        up_attn=lambda i, j: f"up.{last(i)}.attn.{j}",
        downsample=lambda i: f"down.{i}.downsample.conv",
        upsample=lambda i: f"up.{last(i)}.upsample.conv",
        mid=("mid.block_1", "mid.attn_1", "mid.block_2"),
        norm_out="norm_out",
        shortcut="nin_shortcut",
        attn=("norm", "q", "k", "v", "proj_out"),
        linear=False,
    )


def _llamagen(_levels: int) -> Names:
    return Names(
        down=lambda i, j: f"conv_blocks.{i}.res.{j}",
        up=lambda i, j: f"conv_blocks.{i}.res.{j}",
        down_attn=lambda i, j: f"conv_blocks.{i}.attn.{j}",
        up_attn=lambda i, j: f"conv_blocks.{i}.attn.{j}",
        downsample=lambda i: f"conv_blocks.{i}.downsample.conv",
        upsample=lambda i: f"conv_blocks.{i}.upsample.conv",
        mid=("mid.0", "mid.1", "mid.2"),
        norm_out="norm_out",
        shortcut="nin_shortcut",
        attn=("norm", "q", "k", "v", "proj_out"),
        linear=False,
    )


def _diffusers(_levels: int, *, old: bool = False) -> Names:
    """old: as saved before diffusers renamed its attention layers, in 2023."""
    now = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
    return Names(
        down=lambda i, j: f"down_blocks.{i}.resnets.{j}",
        up=lambda i, j: f"up_blocks.{i}.resnets.{j}",
        down_attn=lambda i, j: f"down_blocks.{i}.attentions.{j}",
        up_attn=lambda i, j: f"up_blocks.{i}.attentions.{j}",
        downsample=lambda i: f"down_blocks.{i}.downsamplers.0.conv",
        upsample=lambda i: f"up_blocks.{i}.upsamplers.0.conv",
        mid=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        norm_out="conv_norm_out",
        shortcut="conv_shortcut",
        attn=("group_norm", "query", "key", "value", "proj_attn") if old else now,
        linear=True,
    )


LAYOUTS: dict[str, Callable[[int], Names]] = {
    "taming": _taming,
    "llamagen": _llamagen,
    "diffusers": _diffusers,
    "diffusers-old": lambda levels: _diffusers(levels, old=True),
}


def _layer(name: str, *weight: int) -> Iterator[Entry]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def _resnet(name: str, c_in: int, c_out: int, names: Names) -> Iterator[Entry]:
    yield from _layer(f"{name}.norm1", c_in)
    yield from _layer(f"{name}.conv1", c_out, c_in, 3, 3)
    yield from _layer(f"{name}.norm2", c_out)
    yield from _layer(f"{name}.conv2", c_out, c_out, 3, 3)
    if c_in != c_out:
        yield from _layer(f"{name}.{names.shortcut}", c_out, c_in, 1, 1)


def _attention(name: str, c: int, names: Names) -> Iterator[Entry]:
    norm, *projections = names.attn
    yield from _layer(f"{name}.{norm}", c)
    for projection in projections:
        yield from _layer(f"{name}.{projection}", *((c, c) if names.linear else (c, c, 1, 1)))


def _middle(c: int, of: Architecture, names: Names) -> Iterator[Entry]:
    yield from _resnet(names.mid[0], c, c, names)
    if of.mid_attn:
        yield from _attention(names.mid[1], c, names)
    yield from _resnet(names.mid[2], c, c, names)


def _encoder(of: Architecture, names: Names) -> Iterator[Entry]:
    yield from _layer("conv_in", of.ch, 3, 3, 3)
    c = of.ch
    for i, mult in enumerate(of.ch_mult):
        for j in range(of.num_res_blocks):
            yield from _resnet(names.down(i, j), c, of.ch * mult, names)
            c = of.ch * mult
            if i in of.attn_levels:
                yield from _attention(names.down_attn(i, j), c, names)
        if i < len(of.ch_mult) - 1:
            yield from _layer(names.downsample(i), c, c, 3, 3)
    yield from _middle(c, of, names)
    yield from _layer(names.norm_out, c)
    yield from _layer("conv_out", of.z_channels, c, 3, 3)


def _decoder(of: Architecture, names: Names) -> Iterator[Entry]:
    c, levels = of.ch * of.ch_mult[-1], len(of.ch_mult)
    yield from _layer("conv_in", c, of.z_channels, 3, 3)
    yield from _middle(c, of, names)
    for i, mult in enumerate(reversed(of.ch_mult)):
        for j in range(of.num_res_blocks + 1):
            yield from _resnet(names.up(i, j), c, of.ch * mult, names)
            c = of.ch * mult
            if levels - 1 - i in of.attn_levels:
                yield from _attention(names.up_attn(i, j), c, names)
        if i < levels - 1:
            yield from _layer(names.upsample(i), c, c, 3, 3)
    yield from _layer(names.norm_out, c)
    yield from _layer("conv_out", 3, c, 3, 3)


def published(of: Architecture, layout: str) -> list[Entry]:
    """Name and shape of every tensor of the network, in the order in which they are used."""
    names = LAYOUTS[layout](len(of.ch_mult))
    return [
        *((f"encoder.{name}", shape) for name, shape in _encoder(of, names)),
        *_layer("quant_conv", of.embed_dim, of.z_channels, 1, 1),
        ("quantize.embedding.weight", (of.n_embed, of.embed_dim)),
        *_layer("post_quant_conv", of.z_channels, of.embed_dim, 1, 1),
        *((f"decoder.{name}", shape) for name, shape in _decoder(of, names)),
    ]


def lossy_extras() -> list[Entry]:
    """A few of the tensors that taming saves of its loss: LPIPS and the discriminator."""
    return [
        ("loss.perceptual_loss.net.slice1.0.weight", (64, 3, 3, 3)),
        ("loss.perceptual_loss.lin0.model.1.weight", (1, 64, 1, 1)),
        ("loss.discriminator.main.0.weight", (64, 3, 4, 4)),
        ("loss.discriminator.main.0.bias", (64,)),
        ("loss.discriminator.main.3.num_batches_tracked", ()),
    ]
