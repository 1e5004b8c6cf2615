"""The tokens and codebook that `vqkernels profile` looks at: drawn, or out of the user's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqkernels.benchmarks.problem import make_inputs
from vqkernels.benchmarks.shapes import parse_shape
from vqkernels.nn.entropy import EntropyOptions
from vqkernels.profiling.subject import StepOptions, Subject

from .profile_options import ProfileConfig

CODEBOOK_WORDS = ("codebook", "embed", "centroid")  # what checkpoints call a codebook
STATISTICS = ("embed_sum", "embed_avg", "ema_w", "cluster")  # what lies beside it and has its shape
NESTED = ("state_dict", "model", "module")  # where training scripts put the state


def _load_npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: expected an .npy file of numbers ({error})") from None
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path}: expected floating point numbers, got {array.dtype}")
    return torch.from_numpy(array)


def _load_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a .safetensors file ({error})") from None
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    for name in NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if isinstance(state, Tensor):
        return {"codebook": state}
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a tensor or a state_dict, got {type(state).__name__}")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _looks_like_codebook(name: str, tensor: Tensor, dim: int) -> bool:
    words = name.lower()
    named = any(word in words for word in CODEBOOK_WORDS) and not any(word in words for word in STATISTICS)
    return named and tensor.is_floating_point() and tensor.dim() >= 2 and tensor.shape[-1] == dim


def _pick_codebook(state: dict[str, Tensor], name: str | None, dim: int, path: Path) -> Tensor:
    """The named array, or the one that can be a codebook of D dimensions."""
    if name is not None:
        if name not in state:
            raise ValueError(f"--codebook_name: {path} has no {name!r}, only {', '.join(state)}")
        return state[name]
    found = [each for each, tensor in state.items() if _looks_like_codebook(each, tensor, dim)]
    if len(found) != 1:
        known = ", ".join(found or state)
        raise ValueError(
            f"{path}: expected one array named like a codebook with rows of {dim}, found {len(found)}; "
            f"name it with --codebook_name, one of {known}"
        )
    return state[found[0]]


def load_codebook(path: str, name: str | None, dim: int) -> Tensor:  # [K, D]
    """Codes from .npy, .safetensors or .pt.

    Raises:
        ValueError: no array in the file can be a codebook of ``dim`` dimensions, or more than one.
    """
    file = Path(path)
    codebook = _load_npy(file) if file.suffix == ".npy" else _pick_codebook(_load_state(file), name, dim, file)
    if codebook.dim() == 3 and codebook.shape[0] == 1:
        codebook = codebook[0]
    if codebook.dim() != 2 or codebook.shape[1] != dim:
        raise ValueError(f"{path}: expected codes [K, {dim}] like the tokens, got {list(codebook.shape)}")
    return codebook


def load_tokens(path: str) -> Tensor:  # [N, D]
    """Tokens from .npy [..., D]."""
    tokens = _load_npy(Path(path))
    if tokens.dim() < 2:
        raise ValueError(f"{path}: expected tokens [..., D], got {list(tokens.shape)}")
    return tokens.flatten(0, -2)


def make_subject(config: ProfileConfig, device: torch.device) -> Subject:
    """The tokens and codes of --shape, or of --tokens and --codebook.

    Raises:
        ValueError: files that do not hold what they should.
    """
    if config.shape is not None:
        shape = parse_shape(config.shape)
        x, codebook = make_inputs(shape, config.data, config.seed)
        source = f"drawn ({config.data}, seed {config.seed}){f', the shape of {shape.name}' if shape.name else ''}"
    else:
        assert config.tokens is not None
        assert config.codebook is not None
        x = load_tokens(config.tokens)
        codebook = load_codebook(config.codebook, config.codebook_name, x.shape[1])
        source = f"tokens of {config.tokens}, codes of {config.codebook}"
    dtype = getattr(torch, config.dtype)
    return Subject(x.to(device, dtype).contiguous(), codebook.to(device, dtype).contiguous(), source, _options(config))


def _options(config: ProfileConfig) -> StepOptions:
    temperature = config.entropy_temperature
    return StepOptions(
        metric=config.metric,
        precision=config.precision,
        gradient=config.gradient,
        update=config.update or ("gradient" if config.gradient == "index_propagation" else "ema"),
        entropy=None if temperature is None else EntropyOptions(temperature=temperature),
        sampling_temperature=config.sampling_temperature or 0.0,
    )
