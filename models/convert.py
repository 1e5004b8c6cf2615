"""VQGAN and KL-VAE checkpoints of other projects in, and out again to diffusers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vqkernels.nn import Codebook

from .checkpoint import write_text_atomically
from .continuous_config import KLVAEConfig
from .image_model import CONFIG_FILE
from .kl_vae import KLVAE
from .layouts import (
    FOREIGN_CODEBOOK,
    check_weights,
    infer_config,
    layout_of,
    listed,
    make_network,
    network_weights,
    to_diffusers,
    to_ours,
)
from .model_config import EntropyConfig, QuantizerConfig, VQGANConfig
from .vqgan import VQGAN
from .weight_files import read_weights

DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
WRAPPERS = ("module.", "_orig_mod.", "first_stage_model.")  # of DDP, of torch.compile, of a latent diffusion model
NETWORK = re.compile(r"(encoder|decoder|quantize|quant_conv|post_quant_conv)\.")
NOTHING_TO_THE_RESULT = re.compile(r"loss\.|model_ema\.|colorize$|quantize\.codebook_used$")
AVERAGED = "model_ema."  # its names are those of the parameters without dots

# How the published losses weigh the two sides. taming's, and with it diffusers', weighs the encoder's with 1
PUBLISHED = QuantizerConfig(update="gradient", kmeans_init=False, commitment_weight=1.0, codebook_weight=0.25)
QUANTIZERS = {
    "taming": PUBLISHED,
    "ibq": replace(
        PUBLISHED,
        metric="dot",
        gradient="index_propagation",
        entropy=EntropyConfig(weight=0.05, temperature=0.01, eps=1e-5),
    ),
    "diffusers": PUBLISHED,
    "llamagen": replace(PUBLISHED, metric="cosine", commitment_weight=0.25, codebook_weight=1.0),
}
CHOICES = ("auto", "raw", "ema")


@dataclass(frozen=True)
class Converted:
    """A model made from a file, and what was found there."""

    model: VQGAN | KLVAE
    layout: str
    """Whose file it is: taming (also latent diffusion), ibq, llamagen or diffusers."""
    weights: str
    """raw, or ema where the averaged weights of training were taken."""
    skipped: dict[str, int]
    """Tensors left out because they have no part in the result, counted by the first word of their names."""


def _state_dict(data: Any, which: str) -> tuple[dict[str, Tensor], str]:
    """The tensors by name, and whether they are averaged ones ("ema"), out of whatever a training run saved."""
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    elif isinstance(data, dict) and isinstance(data.get("model"), dict):
        averaged = isinstance(data.get("ema"), dict) and which != "raw"
        data, which = data["ema" if averaged else "model"], "ema" if averaged else "raw"
        return _tensors(data), which
    return _tensors(data), "raw"


def _tensors(data: Any) -> dict[str, Tensor]:
    pairs = data.items() if isinstance(data, dict) else ()
    found = {str(name): value for name, value in pairs if isinstance(value, Tensor)}
    if not found:
        raise ValueError("expected a dict of tensors, or one under state_dict or model, found no tensor")
    return found


def _unwrapped(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state_dict of the autoencoder alone, and the names beside it."""
    beside: list[str] = []
    while not any(name.startswith("encoder.") for name in state):
        prefix = next((each for each in WRAPPERS if any(name.startswith(each) for name in state)), None)
        if prefix is None:
            break
        beside += [name for name in state if not name.startswith(prefix)]
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return state, beside


def _averaged(state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The averaged weights of a state_dict under the names of the parameters; empty where there are none."""
    shadows = {name.removeprefix(AVERAGED): tensor for name, tensor in state.items() if name.startswith(AVERAGED)}
    by_name = {name: shadows.get(name.replace(".", "")) for name in names}
    found = {name: tensor for name, tensor in by_name.items() if tensor is not None}
    absent = sorted(by_name.keys() - found.keys())
    if found and absent:
        raise ValueError(f"the averaged weights are incomplete: missing {listed(absent)}")
    return found


@dataclass(frozen=True)
class _Parts:
    """A file's tensors, sorted."""

    network: dict[str, Tensor]
    weights: str
    skipped: dict[str, int]


def _sorted_out(data: Any, which: str) -> _Parts:
    state, found = _state_dict(data, which)
    state, beside = _unwrapped(state)
    skipped = [*beside, *(name for name in state if NOTHING_TO_THE_RESULT.match(name))]
    network = {name: tensor for name, tensor in state.items() if not NOTHING_TO_THE_RESULT.match(name)}
    if which != "raw" and found == "raw":
        averaged = _averaged(state, [name for name in network if NETWORK.match(name)])
        network, found = {**network, **averaged}, "ema" if averaged else "raw"
    if which == "ema" and found != "ema":
        raise ValueError("weights: expected averaged weights for 'ema', found none")
    return _Parts(network, found, dict(Counter(name.split(".")[0] for name in skipped)))


def _diffusers_groups(file: Path, kind: str) -> int:
    """norm_num_groups of the config beside a file of diffusers' weights of a class; 32 where there is no config."""
    path = file.with_name(CONFIG_FILE)
    if not path.is_file():
        return 32
    config = json.loads(path.read_text(encoding="utf-8"))
    fixed = (("_class_name", (kind,)), ("act_fn", ("silu", "swish")), ("norm_type", ("group",)))
    for name, allowed in fixed:
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {name}: expected {' or '.join(allowed)}, got {config[name]!r}")
    return int(config.get("norm_num_groups", 32))


def _weight_file(path: Path) -> Path:
    """The file that a path means: itself, or the weights in a folder of diffusers."""
    if not path.is_dir():
        return path
    for name in DIFFUSERS_FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: expected a file, or a folder with {DIFFUSERS_FILES[0]}")


def _assembled(network: dict[str, Tensor], layout: str, resolution: int, groups: int) -> VQGAN | KLVAE:
    weights = to_ours(network, layout)
    config = infer_config(weights, resolution=resolution, norm_groups=groups, quantizer=QUANTIZERS[layout])
    check_weights(weights, config)
    model = make_network(config)
    with torch.no_grad():
        for name, target in network_weights(model).items():
            target.copy_(weights[name])
        if isinstance(model, VQGAN):
            assert isinstance(model.quantizer, Codebook)
            model.quantizer.initialized.fill_(True)
    return model.eval()


def load_foreign(
    path: str | Path,
    *,
    layout: str = "auto",
    weights: str = "auto",
    resolution: int = 256,
) -> Converted:
    """Makes a VQGAN or KLVAE of a checkpoint of taming-transformers, latent diffusion, LlamaGen, IBQ or diffusers.

    Whose it is, and the shape of the network, are read off the names and shapes of its tensors. The weights are
    copied as float32; nothing of the file is run.

    Args:
        path: a .ckpt, .pt, .pth, .bin or .safetensors file; for diffusers also the folder with its config.json.
        layout: "taming" (and latent diffusion), "ibq" (SEED-Voken), "llamagen" or "diffusers"; "auto" sees it by
            the names, and asks where IBQ uses taming's.
        weights: "ema" for the averaged weights that training kept beside the last ones ("raw"); "auto" takes the
            averaged ones where there are some, as the authors' own evaluations do.
        resolution: side of the images that the config counts attention_resolutions for; the network is the same.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, would run code, is no VQGAN of a known layout, or is not a whole one;
            names the file and what is wrong or missing.
    """
    for name, value, choices in (("weights", weights, CHOICES), ("layout", layout, ("auto", *QUANTIZERS))):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    file = _weight_file(Path(path))
    data = read_weights(file)
    try:
        parts = _sorted_out(data, weights)
        layout = layout_of(parts.network, layout)
        kind = "VQModel" if FOREIGN_CODEBOOK in parts.network else "AutoencoderKL"
        groups = _diffusers_groups(file, kind) if layout == "diffusers" else 32
        return Converted(_assembled(parts.network, layout, resolution, groups), layout, parts.weights, parts.skipped)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _diffusers_bottleneck(config: VQGANConfig | KLVAEConfig) -> dict[str, Any]:
    if isinstance(config, KLVAEConfig):
        return {"_class_name": "AutoencoderKL"}
    if config.quantizer.kind != "vq":
        raise ValueError(f"quantizer.kind: diffusers' VQModel has vq alone, got {config.quantizer.kind}")
    if config.quantizer.metric != "euclidean":
        raise ValueError(f"quantizer.metric: diffusers' VQModel has euclidean alone, got {config.quantizer.metric}")
    sizes = {"num_vq_embeddings": config.quantizer.codebook_size, "vq_embed_dim": config.codebook_dim}
    return {"_class_name": "VQModel", "norm_type": "group", **sizes}


def diffusers_config(model: VQGAN | KLVAE) -> dict[str, Any]:
    """The config.json of diffusers' VQModel, or AutoencoderKL, for the same network.

    Raises:
        ValueError: that class cannot be told to compute the same; names the option.
    """
    config = model.config
    found = _diffusers_bottleneck(config)
    if config.channel_multipliers[0] != 1:
        theirs = found["_class_name"]
        raise ValueError(f"channel_multipliers: diffusers' {theirs} starts with 1, got {config.channel_multipliers}")
    return {
        **found,
        "act_fn": "silu",
        "block_out_channels": config.widths,
        "down_block_types": [("Attn" if each else "") + "DownEncoderBlock2D" for each in config.attention],
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.out_channels,
        "sample_size": config.resolution,
        "up_block_types": [("Attn" if each else "") + "UpDecoderBlock2D" for each in reversed(config.attention)],
    }


def save_diffusers(model: VQGAN | KLVAE, folder: str | Path) -> None:
    """Writes a folder that diffusers' VQModel or AutoencoderKL loads by from_pretrained: config.json and the weights.

    Raises:
        ValueError: that class cannot compute the same as this model; names the option.
    """
    text = json.dumps(diffusers_config(model), indent=2)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in to_diffusers(network_weights(model)).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / DIFFUSERS_FILES[0], metadata={"format": "pt"})
    write_text_atomically(folder / CONFIG_FILE, text + "\n")
