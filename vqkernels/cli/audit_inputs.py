"""Latents and codebook of `vqkernels audit`: from a model, from arrays, or from another project's checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from vqkernels.models import ImageTokenizer
from vqkernels.models.data import load_image
from vqkernels.models.weight_files import PICKLED, read_weights

from .loading import HUB, collect_images, fit_to_factor, load_tokenizer, report_skipped
from .options import AuditConfig
from .terminal import tracked

SUFFIXES = (".npy", ".safetensors", *PICKLED)
CODEBOOK_WORDS = ("codebook", "embed", "quantiz", "vq", "codes")
NO_CODEBOOK = ("avg", "sum", "pending", "ema_w", "cluster", "pos", "proj", "conv", "norm", "token_emb")
MOST_LISTED = 12  # tensors named in an error


@dataclass(frozen=True)
class Inputs:
    """What is audited, and where it came from."""

    x: Tensor  # [N, D]
    codebook: Tensor  # [K, D]
    metric: str
    latents_from: str
    codebook_from: str


def _flatten(value: Any, name: str = "") -> Iterable[tuple[str, Tensor]]:
    """Every tensor of nested dicts and lists, by its path."""
    if isinstance(value, Tensor):
        yield name, value
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in pairs:
        yield from _flatten(inner, f"{name}.{key}" if name else str(key))


def read_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a file by name; the one of an .npy file, or of a bare saved tensor, is named "".

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that cannot be read without running code from it.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    if file.suffix != ".npy":
        return dict(_flatten(read_weights(file)))
    try:
        return {"": torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))}
    except Exception as error:  # of numpy, by kind of damage: ValueError, EOFError, OSError, TypeError
        raise ValueError(f"{path}: cannot be read as plain tensors ({str(error).splitlines()[0]})") from error


def _listed(tensors: dict[str, Tensor]) -> str:
    names = [f"{name or '(unnamed)'} {list(tensor.shape)}" for name, tensor in tensors.items()]
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more


def _named(path: str, tensors: dict[str, Tensor], key: str, option: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{option}: expected the name of a tensor in {path}, got {key!r}; it has {_listed(tensors)}")
    return tensors[key]


def _as_rows(tensor: Tensor) -> Tensor | None:  # [K, D], or [1, K, D] as vector-quantize-pytorch keeps it -> [K, D]
    while tensor.dim() > 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor if tensor.dim() == 2 and tensor.is_floating_point() and tensor.numel() else None


def _could_be_codebook(name: str) -> bool:
    lower = name.lower()
    return any(word in lower for word in CODEBOOK_WORDS) and not any(word in lower for word in NO_CODEBOOK)


def find_codebook(path: str, key: str | None, dim: int) -> tuple[Tensor, str]:  # [K, dim], name
    """The codebook of a file: the one named, or the only tensor that can be it.

    Args:
        path: the file.
        key: its name there; found by itself when None.
        dim: D of the latents.

    Raises:
        ValueError: none, or several that could be it; lists them.
    """
    tensors = read_tensors(path)
    if key is not None:
        rows = _as_rows(_named(path, tensors, key, "--key"))
        if rows is None:
            raise ValueError(f"--key: expected a float tensor [K, D], got {key} {list(tensors[key].shape)}")
        return _with_dim(rows, dim, f"{path}: {key}"), key
    tables = {name: rows for name, tensor in tensors.items() if (rows := _as_rows(tensor)) is not None}
    fitting = {name: rows for name, rows in tables.items() if dim in rows.shape} or tables
    likely = {name: rows for name, rows in fitting.items() if _could_be_codebook(name)} if len(fitting) > 1 else fitting
    if len(likely) != 1:
        found = _listed(likely or fitting or tensors) or "no tensor"
        raise ValueError(f"{path}: expected one codebook [K, {dim}], found {found}; name it with --key")
    name, rows = next(iter(likely.items()))
    return _with_dim(rows, dim, f"{path}: {name}" if name else path), name


def _with_dim(rows: Tensor, dim: int, where: str) -> Tensor:  # [K, D] or [D, K] -> [K, D]
    if rows.shape[1] == dim:
        return rows
    if rows.shape[0] == dim:  # one code a column, as EMA codebooks of some projects
        return rows.T
    hint = "are the latents channels-first (--channels first)?"
    raise ValueError(f"{where}: expected [K, {dim}] to match the latents, got {list(rows.shape)}; {hint}")


def read_latents(path: str, key: str | None, channels: str) -> Tensor:  # [N, D]
    """The latents of a file as rows; an .npy file stays on the disk until it is read.

    Raises:
        ValueError: no or several tensors without a key, or a shape that is no batch of latents.
    """
    tensors = read_tensors(path)
    if key is None and len(tensors) != 1:
        raise ValueError(f"{path}: expected one tensor, found {_listed(tensors) or 'none'}; name it with --latents_key")
    values = next(iter(tensors.values())) if key is None else _named(path, tensors, key, "--latents_key")
    least = 3 if channels == "first" else 2
    if values.dim() < least or not values.is_floating_point() or not values.numel():
        layout = "[B, D, ...]" if channels == "first" else "[..., D]"
        raise ValueError(f"{path}: expected latents {layout} of a float type, got {values.dtype} {list(values.shape)}")
    values = values.movedim(1, -1) if channels == "first" else values
    return values.reshape(-1, values.shape[-1])


@torch.no_grad()
def _model_latents(model: ImageTokenizer, images: list[str], console: Console) -> Tensor:  # [N, D]
    """The tokens that the model's quantizer searches for, before they are normalised."""
    device, held, skipped = next(model.parameters()).device, [], []
    for file in tracked(console, collect_images(images), "encoding"):
        try:
            image = fit_to_factor(load_image(file), model.factor, "pad")
        except ValueError as error:
            skipped.append((file, str(error)))
            continue
        tokens = model.tokens(image[None].to(device)).movedim(1, -1).flatten(0, -2)
        held.append(model.quantizer.project_in(tokens).cpu())
    if not held:
        raise ValueError(f"--images: none of the {len(skipped)} images can be read; {skipped[0][1]}")
    report_skipped(console, skipped)
    return torch.cat(held)


def _is_model(source: str) -> bool:
    return source.startswith(HUB) or Path(source).is_dir()


def _from_model(config: AuditConfig, device: torch.device, console: Console) -> Inputs:
    model = load_tokenizer(config.source, device)
    codebook, metric = model.quantizer.codebook.detach(), model.config.quantizer.metric
    if metric == "dot":
        raise ValueError(f"{config.source}: expected a model with a euclidean or cosine quantizer, got one with dot")
    if bool(config.images) == bool(config.latents) or config.codebook:
        raise ValueError(f"{config.source}: expected --images (or --latents) and no --codebook beside a model")
    if config.latents:
        x, origin = read_latents(config.latents, config.latents_key, config.channels), config.latents
        codebook = _with_dim(codebook, x.shape[1], config.source)
    else:
        x, origin = _model_latents(model, config.images, console), ", ".join(config.images)
    return Inputs(x, codebook, metric if config.metric == "auto" else config.metric, origin, config.source)


def load_inputs(config: AuditConfig, device: torch.device, console: Console) -> Inputs:
    """What the command line names.

    Raises:
        ValueError: a missing or a contradictory option, or files that do not fit each other.
    """
    if _is_model(config.source):
        return _from_model(config, device, console)
    if config.images:
        raise ValueError(f"--images: expected a folder with a model to encode them, got {config.source}")
    if bool(config.codebook) == bool(config.latents):
        needs = "--codebook FILE if these are latents, --latents FILE if this has the codebook"
        raise ValueError(f"{config.source}: expected one of {needs}")
    latents, book = (config.source, config.codebook) if config.codebook else (config.latents, config.source)
    x = read_latents(str(latents), config.latents_key, config.channels)
    codebook, name = find_codebook(str(book), config.key, x.shape[1])
    metric = "euclidean" if config.metric == "auto" else config.metric
    return Inputs(x, codebook, metric, str(latents), f"{book}: {name}" if name else str(book))


def thinned(x: Tensor, most: int | None) -> Tensor:  # [N, D] -> [n, D]
    """At most so many rows, spread evenly.

    Raises:
        ValueError: fewer than one.
    """
    if most is not None and most < 1:
        raise ValueError(f"--tokens: expected at least 1, got {most}")
    if most is None or len(x) <= most:
        return x
    return x[torch.linspace(0, len(x) - 1, most, dtype=torch.float64).long()]
