"""Pictures as evaluations see them: the middle square at one size, read a few ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .data import centre_crop, open_image

READERS = 4  # threads that decode; Pillow lets go of the interpreter lock

Name = TypeVar("Name")
Progress = Callable[[int, int], None]  # files done, files in all


def _try_crop(file: Path, size: int) -> Tensor | str:
    """The crop, or the reason why there is none."""
    try:
        square = centre_crop(open_image(file), size)
        return torch.from_numpy(np.array(square, dtype=np.uint8)).permute(2, 0, 1).contiguous()
    except (ValueError, OSError) as error:
        return str(error)


def read_crops(
    files: Sequence[Path],
    size: int,
    skipped: list[tuple[Path, str]],
    *,
    ahead: int = 8,
    progress: Progress | None = None,
) -> Iterator[tuple[Path, Tensor]]:  # uint8 [3, size, size]
    """Crops of all readable files in their order, decoded by threads a few ahead; the others go to `skipped`."""
    waiting: deque[tuple[Path, Future[Tensor | str]]] = deque()
    upcoming = iter(files)
    with ThreadPoolExecutor(READERS) as pool:
        for done in range(len(files)):
            while len(waiting) <= ahead and (file := next(upcoming, None)) is not None:
                waiting.append((file, pool.submit(_try_crop, file, size)))
            file, future = waiting.popleft()
            found = future.result()
            if isinstance(found, str):
                skipped.append((file, found))
            else:
                yield file, found
            if progress is not None:
                progress(done + 1, len(files))


def batches(
    images: Iterator[tuple[Name, Tensor]],  # [C, H, W] each
    batch_size: int,
) -> Iterator[tuple[list[Name], Tensor]]:  # [B, C, H, W]
    """Images that come one by one, as many together as asked for; the last batch may be smaller."""
    names: list[Name] = []
    held: list[Tensor] = []
    for name, image in images:
        names.append(name)
        held.append(image)
        if len(held) == batch_size:
            yield names, torch.stack(held)
            names, held = [], []
    if held:
        yield names, torch.stack(held)
