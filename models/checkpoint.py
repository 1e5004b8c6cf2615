"""Checkpoints that survive a kill at any moment: written aside, flushed to disk, renamed, and listed with a digest."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

INDEX = "index.json"
FILE_NAME = re.compile(r"step-(\d{8})\.pt")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, flushes it to disk and renames it.

    Whoever looks sees the old file or the new one, never a part, also after a power cut.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` of a text, as UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _flush_folder(folder: Path) -> None:
    """Makes a rename durable; Windows cannot open folders, and does not need it."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a new folder and puts it in the place of `target`."""
    fresh, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(fresh)
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["checkpoints"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # lost or damaged: the files are then judged by their own checksums


def _files(folder: Path) -> list[Path]:
    """Checkpoint files, newest step first."""
    return sorted((file for file in folder.glob("step-*.pt") if FILE_NAME.fullmatch(file.name)), reverse=True)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of one step, lists it, and deletes all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp-*"):  # of a run that was killed while it wrote
        leftover.unlink()
    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, lambda temporary: torch.save(state, temporary))
    index = _read_index(folder)
    index[path.name] = {"step": step, "bytes": path.stat().st_size, "sha256": file_digest(path)}
    kept = _files(folder)[: max(keep, 1)]
    index = {file.name: index[file.name] for file in reversed(kept) if file.name in index}
    text = json.dumps({"newest": path.name, "checkpoints": index}, indent=2)
    write_text_atomically(folder / INDEX, text)
    for file in _files(folder):
        if file not in kept:
            file.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one checkpoint and checks it against the index beside it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated or damaged; names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    listed = _read_index(path.parent).get(path.name)
    size = path.stat().st_size
    if listed and listed["bytes"] != size:
        raise ValueError(f"checkpoint {str(path)!r} is truncated: expected {listed['bytes']} bytes, got {size}")
    if listed and listed["sha256"] != file_digest(path):
        raise ValueError(f"checkpoint {str(path)!r} is damaged: its sha256 is not the one in {INDEX}")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, KeyError and others
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {error}") from error


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest valid checkpoint of a folder, or None where there is none at all.

    A damaged one is named in a warning and the one before it is taken.

    Raises:
        ValueError: there are checkpoints, and every one is damaged.
    """
    files = _files(folder)
    for file in files:
        try:
            return load_checkpoint(file)
        except ValueError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    if files:
        raise ValueError(f"none of the {len(files)} checkpoints in {str(folder)!r} can be read")
    return None


def random_state() -> dict[str, Any]:
    """The states of all global random generators, of plain types; on GPUs that of this process's own."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The reverse of random_state."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))


def different_options(mine: Any, saved: Any, name: str) -> list[str]:
    """The options in which two nested configs differ, in words."""
    if isinstance(mine, dict) and isinstance(saved, dict):
        keys = {**mine, **saved}
        return [each for key in keys for each in different_options(mine.get(key), saved.get(key), f"{name}.{key}")]
    return [] if mine == saved else [f"{name} is {mine!r} now and was {saved!r}"]
