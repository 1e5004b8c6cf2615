"""The names that weights of VQGAN and KLVAE go by: ours (taming's, but for the codebook), LlamaGen's and diffusers'.

taming, latent diffusion and SEED-Voken's IBQ share one set of names, `encoder.down.0.block.1.conv1.weight`, which
`models.autoencoder` uses as well. LlamaGen and diffusers number the decoder's levels from coarse to fine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vqkernels.nn import Codebook

from .continuous_config import KLVAEConfig
from .kl_vae import KLVAE
from .model_config import QuantizerConfig, VQGANConfig
from .vqgan import VQGAN

CODEBOOK = "quantizer.codebook"
FOREIGN_CODEBOOK = "quantize.embedding.weight"
MARKS = {"taming": "encoder.down.", "llamagen": "encoder.conv_blocks.", "diffusers": "encoder.down_blocks."}
MOST_NAMED = 6  # weights named in an error

# Pairs (pattern of theirs, taming's); the levels of the decoder are then counted from the other end
LLAMAGEN = (
    (r"encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block."),
    (r"encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1."),
    (r"decoder\.conv_blocks\.(\d+)\.res\.", r"decoder.up.\1.block."),
    (r"decoder\.conv_blocks\.(\d+)\.", r"decoder.up.\1."),
    (r"(encoder|decoder)\.mid\.0\.", r"\1.mid.block_1."),
    (r"(encoder|decoder)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"(encoder|decoder)\.mid\.2\.", r"\1.mid.block_2."),
)
DIFFUSERS = (
    (r"encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1."),
    (r"decoder\.up_blocks\.(\d+)\.", r"decoder.up.\1."),
    (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", r".mid.attn_1."),
    (r"\.resnets\.", r".block."),
    (r"\.attentions\.", r".attn."),
    (r"\.downsamplers\.0\.", r".downsample."),
    (r"\.upsamplers\.0\.", r".upsample."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.conv_norm_out\.", r".norm_out."),
    (r"\.(attn\.\d+|attn_1)\.group_norm\.", r".\1.norm."),
    (r"\.(attn\.\d+|attn_1)\.(?:to_q|query)\.", r".\1.q."),
    (r"\.(attn\.\d+|attn_1)\.(?:to_k|key)\.", r".\1.k."),
    (r"\.(attn\.\d+|attn_1)\.(?:to_v|value)\.", r".\1.v."),
    (r"\.(attn\.\d+|attn_1)\.(?:to_out\.0|proj_attn)\.", r".\1.proj_out."),
)
TO_DIFFUSERS = (
    (r"encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"decoder\.up\.(\d+)\.", r"decoder.up_blocks.\1."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", r".mid_block.attentions.0."),
    (r"\.block\.", r".resnets."),
    (r"\.attn\.", r".attentions."),
    (r"\.downsample\.", r".downsamplers.0."),
    (r"\.upsample\.", r".upsamplers.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.norm_out\.", r".conv_norm_out."),
    (r"\.(attentions\.\d+)\.norm\.", r".\1.group_norm."),
    (r"\.(attentions\.\d+)\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attentions\.\d+)\.proj_out\.", r".\1.to_out.0."),
)
ATTENTION = re.compile(r"\.(?:attn\.\d+|attn_1)\.(?:q|k|v|proj_out)\.weight$")


def _translated(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _reversed_levels(name: str, prefix: str, levels: int) -> str:
    """The level after `prefix`, counted from the other end."""
    found = re.match(rf"{re.escape(prefix)}(\d+)\.", name)
    return f"{prefix}{levels - 1 - int(found[1])}.{name[found.end() :]}" if found else name


def _levels(names: Mapping[str, object], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return 1 + max((int(found[1]) for name in names if (found := pattern.match(name))), default=0)


def layout_of(names: Mapping[str, object], layout: str = "auto") -> str:
    """Which layout the names of a file's tensors have.

    Args:
        names: the names.
        layout: what the user says, or "auto".

    Raises:
        ValueError: none of the known ones, several, or not the one the user says.
    """
    found = [layout for layout, mark in MARKS.items() if any(name.startswith(mark) for name in names)]
    if len(found) != 1:
        shown = listed(sorted(names))
        what = f"names of {' and '.join(found)}" if found else f"none; it has {shown}"
        raise ValueError(f"expected the weights of a VQGAN or KL-VAE in one layout of {', '.join(MARKS)}, found {what}")
    if layout == "ibq" and found[0] == "taming":
        return layout
    if layout not in ("auto", found[0]):
        raise ValueError(f"layout: its names are those of {found[0]}, got {layout!r}")
    if layout == "auto" and found[0] == "taming" and "encoder.down.0.block.2.conv1.weight" in names:
        # as all of IBQ's and none of the others; its codes are found by another rule
        raise ValueError("layout: more than 2 blocks a level under names that taming and ibq share; say which")
    return found[0]


def listed(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (", ".join(names[:MOST_NAMED]) or "no tensor") + more


def to_ours(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Weights under this package's names.

    Args:
        weights: by their names in `layout`, nothing else among them.
        layout: "taming" (also of latent diffusion), "ibq" (the same names), "llamagen" or "diffusers".
    """
    rules = {"taming": (), "ibq": (), "llamagen": LLAMAGEN, "diffusers": DIFFUSERS}[layout]
    renamed = {_translated(name, rules): tensor for name, tensor in weights.items()}
    if rules:
        levels = _levels(renamed, "decoder.up.")
        renamed = {_reversed_levels(name, "decoder.up.", levels): tensor for name, tensor in renamed.items()}
    if FOREIGN_CODEBOOK in renamed:
        renamed[CODEBOOK] = renamed.pop(FOREIGN_CODEBOOK)
    return {name: _as_convolution(name, tensor) for name, tensor in renamed.items()}


def _as_convolution(name: str, tensor: Tensor) -> Tensor:  # [C, C] -> [C, C, 1, 1] where diffusers has a Linear
    return tensor[:, :, None, None] if tensor.dim() == 2 and ATTENTION.search(name) else tensor


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This package's weights, as `network_weights` gives them, under diffusers' names and shapes."""
    levels = _levels(weights, "decoder.up.")
    out = {}
    for name, tensor in weights.items():
        flat = tensor[:, :, 0, 0] if ATTENTION.search(name) else tensor
        renamed = _translated(_reversed_levels(name, "decoder.up.", levels), TO_DIFFUSERS)
        out[FOREIGN_CODEBOOK if name == CODEBOOK else renamed] = flat
    return out


def network_weights(model: VQGAN | KLVAE) -> dict[str, Tensor]:
    """All that decides what a model computes: the parameters and the codebook, without statistics."""
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    if isinstance(model, VQGAN):
        assert isinstance(model.quantizer, Codebook)
        weights[CODEBOOK] = model.quantizer.codebook
    return weights


def is_continuous(
    weights: Mapping[str, Tensor],
) -> bool:
    """Whether weights by this package's names are those of a KLVAE: no codebook, and twice the latents encoded."""
    if CODEBOOK in weights:
        return False
    return _shape(weights, "encoder.conv_out.weight", 0) == 2 * _shape(weights, "decoder.conv_in.weight", 1)


def _shape(weights: Mapping[str, Tensor], name: str, axis: int) -> int:
    if name not in weights or weights[name].dim() <= axis:
        raise ValueError(f"expected the weights of a VQGAN or KL-VAE, but {name} is missing")
    return int(weights[name].shape[axis])


def infer_config(
    weights: Mapping[str, Tensor],
    *,
    resolution: int = 256,
    norm_groups: int = 32,
    quantizer: QuantizerConfig | None = None,
) -> VQGANConfig | KLVAEConfig:
    """The config whose network has these weights, from their names and shapes.

    Args:
        weights: by this package's names, see `to_ours`.
        resolution: what the attention resolutions are counted for; it does not change the network.
        norm_groups: cannot be seen in weights.
        quantizer: how the codebook is compared and trained; its size and dimension are taken from the weights.

    Raises:
        ValueError: a weight that would say it is missing, or the widths are no multiples of the first.
    """
    channels = _shape(weights, "encoder.conv_in.weight", 0)
    levels = _levels(weights, "encoder.down.")
    widths = [_shape(weights, f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    if any(width % channels for width in widths):
        raise ValueError(f"expected levels of multiples of {channels} channels, got {widths}")
    blocks = len({name for name in weights if re.match(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)})
    continuous = is_continuous(weights)
    encoded = _shape(weights, "encoder.conv_out.weight", 0)
    attended = [level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in weights]
    shape: dict[str, Any] = {
        "in_channels": _shape(weights, "encoder.conv_in.weight", 1),
        "out_channels": _shape(weights, "decoder.conv_out.weight", 0),
        "channels": channels,
        "channel_multipliers": [width // channels for width in widths],
        "blocks": blocks,
        "resolution": resolution,
        "attention_resolutions": [resolution >> level for level in attended],
        "mid_attention": "encoder.mid.attn_1.q.weight" in weights,
        "norm_groups": norm_groups,
        "latent_channels": encoded // 2 if continuous else encoded,
    }
    if continuous:
        return KLVAEConfig(**shape)
    size, dim = _shape(weights, CODEBOOK, 0), _shape(weights, CODEBOOK, 1)
    options = vars(quantizer or QuantizerConfig(update="gradient", kmeans_init=False)).copy()
    options.update(codebook_size=size, codebook_dim=None if dim == encoded else dim)
    return VQGANConfig(**shape, quantizer=QuantizerConfig(**options))


def make_network(config: VQGANConfig | KLVAEConfig) -> VQGAN | KLVAE:
    """A new model of the config."""
    return VQGAN(config) if isinstance(config, VQGANConfig) else KLVAE(config)


def check_weights(weights: Mapping[str, Tensor], config: VQGANConfig | KLVAEConfig) -> None:
    """Compares names and shapes with those of the config's network, without making it.

    Raises:
        ValueError: names what is missing, what is not expected and what has another shape.
    """
    with torch.device("meta"):
        expected = network_weights(make_network(config))
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    wrong = [
        f"{name} {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in sorted(expected.items())
        if name in weights and weights[name].shape != tensor.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    problems = [f"{what} {listed(names)}" for what, names in found.items() if names]
    if problems:
        kind = type(config).__name__.removesuffix("Config")
        raise ValueError(f"the weights are not those of one {kind}: {'; '.join(problems)}")
