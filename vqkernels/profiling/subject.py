"""What is profiled: tokens, a codebook, and the calls of one quantizer step on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._dtypes import accumulation_dtype
from ..ops import codebook_stats, ema_update_, nearest

EMA_DECAY = 0.99


@dataclass(eq=False)
class Subject:
    """Tokens and a codebook of one dtype on one device; the calls leave both as they are."""

    x: Tensor  # [N, D]
    codebook: Tensor  # [K, D]
    source: str  # where they come from, for the report
    metric: str = "euclidean"
    precision: str = "exact"
    gradient: str = "straight_through"

    def __post_init__(self) -> None:
        if self.x.dim() != 2 or self.codebook.dim() != 2 or self.x.shape[1] != self.codebook.shape[1]:
            shapes = f"{list(self.x.shape)} and {list(self.codebook.shape)}"
            raise ValueError(f"tokens, codebook: expected [N, D] and [K, D], got {shapes}")
        if 0 in self.x.shape or 0 in self.codebook.shape:
            raise ValueError("tokens, codebook: expected at least one token, one code and one dimension, got none")

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def batch(self) -> Tensor:  # [1, N, D]
        """The tokens as the kernels take them."""
        return self.x[None]

    @cached_property
    def codes(self) -> Tensor:  # int64 [N]
        return self.search()[0]

    def search(self) -> tuple[Tensor, Tensor]:  # codes [N], distance [N]
        """The public call."""
        return nearest(self.x, self.codebook, metric=self.metric, precision=self.precision)

    def gather(self) -> tuple[Tensor, Tensor]:  # quantized [1, N, D], error [1, N]
        """Lookup and squared errors, as the layer's forward runs them."""
        arguments = (self.batch, self.codebook, self.codes[None])
        return backends.select("gather", *arguments)(*arguments)

    def backend(self, op: str = "nearest") -> str:
        """Which backend runs an op on these tensors."""
        arguments = self._arguments()[op]
        wanted = backends.requested_backend()
        able = [each.backend for each in backends.candidates(op, *arguments) if each.reason is None]
        return wanted or able[0]

    def _arguments(self) -> dict[str, tuple[Any, ...]]:
        """Arguments like those of each op, for the question which backend runs it; only dtypes and shapes matter."""
        x, codebook, codes = self.batch, self.codebook, self.x.new_zeros((1, len(self.x)), dtype=torch.int64)
        wide = accumulation_dtype(self.x.dtype)
        rows, sizes = codebook.to(wide), codebook.new_zeros(len(codebook), dtype=wide)
        error, revive = codes.to(wide), sizes.bool()
        return {
            "nearest": (x, codebook, self.metric, self.precision),
            "gather": (x, codebook, codes),
            "quantize": (x, codebook, None, self.metric, self.precision),
            "codebook_gradient": (x, x, codes, error, len(codebook)),
            "codebook_stats": (x, codes, len(codebook)),
            "add_statistics_": (x, codes, sizes, rows),
            "ema_update_": (rows, sizes, rows, sizes, rows, revive, EMA_DECAY, 1e-5, 1.0, False),
            "quantize_backward": (x, x, codes, x, error, self.gradient == "rotation"),
        }

    def backends(self) -> dict[str, str]:
        """The backend of every op of the step."""
        return {op: self.backend(op) for op in self._arguments()}


def step_calls(subject: Subject) -> dict[str, Callable[[], object]]:
    """Everything after the search in one training step of the quantizer, each with inputs of its own made before."""
    x, codes, count = subject.batch, subject.codes, len(subject.codebook)
    quantized, error = subject.gather()
    dquantized, derror = torch.ones_like(x), torch.ones_like(error)
    counts, sums = codebook_stats(subject.x, codes, count)
    state = (subject.codebook.to(sums.dtype, copy=True), torch.ones_like(counts), sums.clone())
    backward = (x, quantized, codes[None], dquantized, derror, subject.gradient == "rotation")
    backward_kernel = backends.select("quantize_backward", *backward)
    return {
        "gather": subject.gather,
        "losses": lambda: error.sum() / (error.numel() * x.shape[-1]),
        "statistics": lambda: codebook_stats(subject.x, codes, count),
        "ema": lambda: ema_update_(*state, counts, sums, decay=EMA_DECAY),
        "backward": lambda: backward_kernel(*backward),
    }


def code_use(subject: Subject) -> dict[str, float | int]:
    """How the tokens spread over the codes: codes in use, their share, and the perplexity exp(entropy)."""
    counts, _ = codebook_stats(subject.x[:, :1].contiguous(), subject.codes, len(subject.codebook))
    frequency = counts.double() / counts.sum().clamp(min=1)
    used = int((counts > 0).sum())
    perplexity = float(torch.special.entr(frequency).sum().exp())
    return {"codes_used": used, "usage": used / len(counts), "perplexity": perplexity}
