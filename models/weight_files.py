"""Weight files of other projects, read as tensors and nothing else.

A .ckpt or .pt file is a program for Python's unpickler. torch runs it with no function but those that make tensors
(weights_only=True). Published checkpoints also mention classes of their training framework, as the keys and values of
its notes; those of FRAMEWORKS are read as inert placeholders, so that neither are they imported nor do they run.
Anything else is refused by name.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
FRAMEWORKS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "argparse.Namespace", "numpy.")
BUILTINS = (bool, dict, float, int, list, object, set, str, tuple)
HARMLESS = ("torch.", "collections.OrderedDict", "collections.Counter", "_codecs.encode")  # judged by torch
LARGEST_HEADER = 100_000_000  # bytes, by the definition of safetensors
LEGACY_PICKLES = 5  # magic number, protocol, system, the object, and the storages' keys: torch's format before 1.6
NOT_THE_FILE = {
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself (git lfs pull)",
    b"<!DOCTYPE": "a web page; the download did not give the file",
    b"<html": "a web page; the download did not give the file",
}


class _Placeholder:
    """Stands for an object of a training framework; takes whatever it is given and keeps nothing."""

    def __new__(cls, *_arguments: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class _DictPlaceholder:
    """Stands for a subclass of dict: a plain one."""

    def __new__(cls, *_arguments: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


PLAIN: dict[str, Any] = {
    "collections.defaultdict": _DictPlaceholder,
    "typing.Any": object,
    **{f"builtins.{kind.__name__}": kind for kind in BUILTINS},
}


def _globals_of(stream: BinaryIO, pickles: int) -> Iterator[str]:
    """The names that pickles would import, read without running them."""
    for _ in range(pickles):
        words: list[str] = []
        for operation, argument, _position in pickletools.genops(stream):
            if operation.name == "GLOBAL":
                yield str(argument).replace(" ", ".", 1)
            elif operation.name == "STACK_GLOBAL":  # takes the two last texts: module and name
                yield ".".join(words[-2:])
            elif isinstance(argument, str):
                words.append(argument)


def _imports(path: Path) -> set[str]:
    """What a file would import; as far as it can be read where it is damaged."""
    found: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".pkl"):
                        found.update(_globals_of(io.BytesIO(archive.read(name)), 1))
        else:
            with open(path, "rb") as file:
                for name in _globals_of(file, LEGACY_PICKLES):
                    found.add(name)
    except (ValueError, EOFError, IndexError, zipfile.BadZipFile, KeyError, UnicodeDecodeError):
        pass
    # protocol 2, which torch writes, has the names of Python 2
    return {re.sub(r"^__builtin__\.", "builtins.", name) for name in found}


def _stand_ins(imports: set[str]) -> list[Any]:
    """Pairs (what to read a name as, name) for the frameworks' names among `imports`."""
    known = [(PLAIN[name], name) for name in sorted(imports & PLAIN.keys())]
    for name in sorted(imports):
        if name.startswith(FRAMEWORKS):
            known.append((_DictPlaceholder if name.endswith("Dict") else _Placeholder, name))
    return known


def _foreign(imports: set[str]) -> list[str]:
    return sorted(name for name in imports if name not in PLAIN and not name.startswith((*FRAMEWORKS, *HARMLESS)))


def _refusal(path: Path, foreign: list[str]) -> ValueError:
    names = ", ".join(foreign[:4]) + (f" and {len(foreign) - 4} more" if len(foreign) > 4 else "")
    return ValueError(
        f"{path}: refused, nothing of it was run: it would call {names}, which is code and no weights; "
        "save its state_dict alone, or as .safetensors"
    )


def _read_pickled(path: Path, start: bytes) -> Any:
    imports = _imports(path)
    if _foreign(imports):
        raise _refusal(path, _foreign(imports))
    archive = zipfile.is_zipfile(path)
    if not archive and start.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path}: truncated after {path.stat().st_size} bytes: the end of the zip archive is missing")
    try:
        with torch.serialization.safe_globals(_stand_ins(imports)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that torch does not write itself
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, KeyError and others
        if isinstance(error, EOFError) or "truncated" in str(error) or "unexpected EOF" in str(error):
            raise ValueError(f"{path}: truncated after {path.stat().st_size} bytes ({error})") from error
        refused = re.search(r"unsupported (?:global: )?GLOBAL (\S+)", str(error), re.IGNORECASE)
        if refused:
            raise _refusal(path, [refused[1]]) from error
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().splitlines()[0]
        raise ValueError(f"{path}: cannot be read as weights: {reason}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_length(path)
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error


def _check_length(path: Path) -> None:
    """Compares the size of a .safetensors file with what its header promises."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        needed = 8 + header
        if needed <= size:
            try:
                entries = json.loads(file.read(header))
                ends = [each["data_offsets"][1] for name, each in entries.items() if name != "__metadata__"]
                needed += max(ends, default=0)
            except (ValueError, AttributeError, TypeError, LookupError):
                raise ValueError(f"{path}: cannot be read as safetensors: its header is damaged") from None
    if header > LARGEST_HEADER:
        raise ValueError(f"{path}: cannot be read as safetensors: its header is damaged")
    if size < needed:
        raise ValueError(f"{path}: truncated: expected {needed} bytes, got {size}")


def read_weights(path: str | Path) -> Any:
    """What a weight file holds, tensors on the CPU and mapped from the disk where the format allows it.

    Args:
        path: .safetensors, or .ckpt, .pt, .pth, .bin as torch.save writes them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file; one that is truncated or damaged; one that would run code. Names it, and
            nothing of it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in (".safetensors", *PICKLED):
        raise ValueError(f"{path}: expected a file that ends in .safetensors, {', '.join(PICKLED)}")
    with open(path, "rb") as file:
        start = file.read(32)
    if not start:
        raise ValueError(f"{path}: truncated: the file is empty")
    for mark, kind in NOT_THE_FILE.items():
        if start.startswith(mark):
            raise ValueError(f"{path}: is {kind}")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path, start)
