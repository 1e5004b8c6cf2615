"""A codebook that was prepared once: a snapshot of its numbers, and what each backend has made of them.

``vqkernels.prepare_codebook`` makes one. A backend keeps its packed form here under a key of its own, made when a
search first needs it, and never looks at the caller's codebook again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Form = TypeVar("Form")


class PreparedCodebook:
    """What ``vqkernels.prepare_codebook`` returns and ``nearest``, ``nearest_k``, ``quantize`` and ``lookup`` take in
    the place of a codebook.

    It never changes. A copy or a pickle takes the numbers along and is prepared again where it is first used.
    """

    def __init__(
        self,
        rows: Tensor,  # [K, D] contiguous, which nobody else holds
        metric: str,
    ) -> None:
        self.rows = rows  # for the kernels alone: whoever writes to it breaks the promise
        self.metric = metric
        self._forms: dict[Hashable, Any] = {}

    @property
    def shape(self) -> torch.Size:
        """[K, D]."""
        return self.rows.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the snapshot."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where it can be searched."""
        return self.rows.device

    def form(self, key: Hashable, make: Callable[[Tensor], Form]) -> Form:
        """What is kept under ``key``, else ``make(rows)``, which is then kept.

        Without a lock, so that a process that is forked meanwhile cannot find it held: of threads that come at the same
        time each makes one, and all take the first. What is made while a CUDA graph is recorded belongs to that graph
        and is not kept.
        """
        found = self._forms.get(key)
        if found is not None:
            return found
        made = make(self.rows)
        recording = self.rows.is_cuda and torch.cuda.is_current_stream_capturing()
        return made if recording else self._forms.setdefault(key, made)

    def known_form(self, key: Hashable) -> Any:
        """What is kept under ``key``, or None."""
        return self._forms.get(key)

    def __getstate__(self) -> dict[str, Any]:
        """Packed forms are this process's own."""
        return {"rows": self.rows, "metric": self.metric, "_forms": {}}

    def __repr__(self) -> str:
        size, dim = self.shape
        return f"PreparedCodebook({size} codes of {dim} dims, {self.dtype}, {self.device}, metric={self.metric!r})"
