"""Codes of many images as a file: codes.npy, to be memory-mapped, and meta.json, which says whose codes they are."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from torch import Tensor

from .checkpoint import write_text_atomically
from .metrics import code_counts

if TYPE_CHECKING:
    from .levels import CodedModel

CODES = "codes.npy"
META = "meta.json"
FORMAT = "vqkernels codes 1"
TYPES = ((1 << 16, "<u2"), (1 << 31, "<i4"), (1 << 63, "<i8"))  # the largest codebook whose codes fit, little-endian


@dataclass(frozen=True)
class CodesMeta:
    """What meta.json says."""

    fingerprint: str
    """Of the model that made the codes, see ImageTokenizer.fingerprint."""
    codebook_size: int
    factor: int
    shape: list[int]
    """Images, rows, columns."""
    dtype: str
    """uint16, int32 for codebooks of more than 65,536 codes, or int64 for more than 2^31."""
    files: list[str] = field(default_factory=list)
    """Name of every image, in the order of the codes."""
    format: str = FORMAT


def code_dtype(codebook_size: int) -> np.dtype:
    """The smallest of uint16, int32 and int64 that holds all codes."""
    return np.dtype(next(name for most, name in TYPES if codebook_size <= most))


def _header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """numpy pads the header so that the first axis can grow without moving the data."""
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)


class CodesWriter:
    """Writes codes batch by batch, however many there will be; use it in a `with` block.

        with CodesWriter("codes", model) as writer:
            writer.append(model.encode(images), names)

    Nothing shows under the final names before the block ends well: codes.npy is renamed first and meta.json last,
    and open_codes refuses a folder without meta.json. After an exception the temporary file is deleted.

    Args:
        folder: made if missing; codes that it holds are replaced at the end.
        model: gives fingerprint, codebook size and factor.
        level: which of the model's maps the codes are, by name; may be left out where it has one alone.

    Raises:
        ValueError: the model has no such map, or several and none was named.
    """

    def __init__(self, folder: str | Path, model: CodedModel, level: str | None = None) -> None:
        if level not in model.maps and not (level is None and len(model.maps) == 1):
            raise ValueError(f"level: expected one of {', '.join(model.maps)}, got {level!r}")
        quantizer, self.factor = model.maps[level or next(iter(model.maps))]
        self.codebook_size, self.fingerprint = quantizer.codebook_size, model.fingerprint()
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dtype = code_dtype(self.codebook_size)
        self.grid: tuple[int, int] | None = None
        self.files: list[str] = []
        self._temporary = self.folder / f".{CODES}.tmp-{os.getpid()}"
        self._file = open(self._temporary, "wb+")  # noqa: SIM115

    def append(
        self,
        codes: Tensor,  # int [B, h, w]
        files: Sequence[str | Path],
    ) -> None:
        """Adds the codes of some images.

        Raises:
            ValueError: another grid than before, a code out of range (-1 marks a token that was not finite), or
                not one name per image; names the image where one is at fault.
        """
        if codes.dim() != 3 or len(codes) != len(files):
            raise ValueError(f"codes must be [{len(files)}, h, w] for {len(files)} files, got {list(codes.shape)}")
        grid = (codes.shape[1], codes.shape[2])
        if self.grid is None:
            self.grid = grid
            _header(self._file, (0, *grid), self.dtype)
        if grid != self.grid:
            raise ValueError(f"codes must be on a grid of {self.grid} like those before, got {grid}")
        array = codes.detach().cpu().numpy()
        for image, file in zip(array, files, strict=True):
            if image.size and not 0 <= image.min() <= image.max() < self.codebook_size:
                raise ValueError(
                    f"codes of {str(file)!r} must lie in [0, {self.codebook_size - 1}], "
                    f"got {image.min()} to {image.max()}"
                )
        self._file.write(array.astype(self.dtype).tobytes())
        self.files += [str(file) for file in files]

    def _finish(self) -> None:
        if self.grid is None:
            raise ValueError("no codes were written: there were no images")
        shape = (len(self.files), *self.grid)
        self._file.seek(0)
        _header(self._file, shape, self.dtype)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        meta = CodesMeta(self.fingerprint, self.codebook_size, self.factor, list(shape), self.dtype.name, self.files)
        (self.folder / META).unlink(missing_ok=True)
        os.replace(self._temporary, self.folder / CODES)
        text = json.dumps(asdict(meta), indent=1, ensure_ascii=False)
        write_text_atomically(self.folder / META, text)

    def __enter__(self) -> CodesWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class CodesFile:
    """Opened codes: `codes` is a read-only memory map [N, h, w], `meta` what meta.json says."""

    codes: np.ndarray
    meta: CodesMeta

    def __len__(self) -> int:
        return len(self.codes)


def _read_meta(folder: Path) -> CodesMeta:
    path = folder / META
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {META}, so there are no codes, or writing them was cut off")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT!r}, got {values.get('format')!r}")
        return CodesMeta(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def level_folders(folder: str | Path, model: CodedModel) -> dict[str, Path]:
    """Where the codes of each map lie: in the folder itself, or where there are several in one of the map's name."""
    names = list(model.maps)
    return {name: Path(folder) if len(names) == 1 else Path(folder, name) for name in names}


def open_codes(
    path: str | Path,
    model: CodedModel | None = None,
) -> CodesFile:
    """Opens what a CodesWriter wrote, without reading it all into memory, and checks every code's range once.

    Args:
        path: the folder, or codes.npy in it.
        model: the model that shall decode the codes; None leaves that check out.

    Raises:
        FileNotFoundError: codes.npy or meta.json is missing.
        ValueError: the codes are another model's, the two files do not belong together, or a code is out of range.
    """
    folder = Path(path).parent if Path(path).name == CODES else Path(path)
    meta = _read_meta(folder)
    if model is not None and model.fingerprint() != meta.fingerprint:
        raise ValueError(
            f"codes in {str(folder)!r} were made by model {meta.fingerprint}, "
            f"and this is model {model.fingerprint()}: decode them with the model that encoded them"
        )
    file = folder / CODES
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {CODES}")
    try:
        codes = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is truncated or no array of numpy: {error}") from error
    if list(codes.shape) != list(meta.shape) or codes.dtype != code_dtype(meta.codebook_size):
        raise ValueError(
            f"{file} must be {code_dtype(meta.codebook_size).name} {list(meta.shape)} as {META} says, "
            f"got {codes.dtype.name} {list(codes.shape)}"
        )
    try:
        code_counts(codes, meta.codebook_size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return CodesFile(codes, meta)
