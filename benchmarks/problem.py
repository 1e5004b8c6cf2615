"""The inputs of one benchmark, the same for every provider."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Shape

EMA_DECAY = 0.8  # vector-quantize-pytorch's default, so that its training step runs as its users run it
EMA_EPS = 1e-5
COMMITMENT_WEIGHT = 1.0  # likewise
OFFSET_SIGMAS = 10.0


@dataclass(frozen=True, eq=False)
class Problem:
    """Tokens and codebook of one shape, and what the training operations need besides."""

    operation: str
    shape: Shape
    x: Tensor  # [N, D]
    codebook: Tensor  # [K, D]
    dquantized: Tensor | None = None  # [N, D]; quantize-train-step
    codes: Tensor | None = None  # [N] int64; ema
    gradient: str = "rotation"

    @property
    def scores(self) -> int:
        """Entries of the N x K matrix that an unfused search writes."""
        return self.shape.tokens * self.shape.codes

    @property
    def flops(self) -> int | None:
        """Multiply-adds of the search counted as two, whatever a provider executes; None where there is no search."""
        return None if self.operation == "ema" else 2 * self.scores * self.shape.dim

    @property
    def bytes(self) -> int:
        """The least that has to be read and written: ``BYTES_FORMULA``."""
        n, k, d, size = self.shape.tokens, self.shape.codes, self.shape.dim, self.x.element_size()
        if self.operation == "search":
            return size * (n * d + k * d) + 12 * n
        if self.operation == "ema":
            return size * n * d + 8 * n + 20 * k * d
        return 6 * size * n * d + 24 * n + 24 * k * d


FLOPS_FORMULA = {"search": "2*N*K*D", "quantize-train-step": "2*N*K*D (the search)", "ema": None}
BYTES_FORMULA = {
    "search": "s*(N*D + K*D) + 12*N, s = bytes of a number: read x and codebook, write codes and distance",
    "quantize-train-step": "6*s*N*D + 24*N + 24*K*D: read x and write quantized; read x, quantized, dquantized and"
    " write dx; statistics and EMA",
    "ema": "s*N*D + 8*N + 20*K*D: read x and codes; write and read sums, update embed_sum, write the codebook",
}


def _normal(rows: int, dim: int, seed: int) -> Tensor:  # [rows, dim] float32
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def make_inputs(shape: Shape, data: str, seed: int) -> tuple[Tensor, Tensor]:  # x [N, D], codebook [K, D], float32
    """Tokens and codes of a distribution: normal | unit | offset | init."""
    x, codebook = _normal(shape.tokens, shape.dim, 2 * seed), _normal(shape.codes, shape.dim, 2 * seed + 1)
    if data == "unit":
        return torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(codebook, dim=1)
    if data == "offset":
        return x + OFFSET_SIGMAS, codebook + OFFSET_SIGMAS
    if data == "init":
        generator = torch.Generator().manual_seed(2 * seed + 1)
        return x, (torch.rand(codebook.shape, generator=generator) * 2 - 1) / shape.codes
    return x, codebook


def make_problem(
    operation: str,
    shape: Shape,
    *,
    data: str = "normal",
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    gradient: str = "rotation",
) -> Problem:
    """The inputs of ``operation`` at ``shape``; the same seed gives the same inputs on every machine."""
    x, codebook = (tensor.to(device, getattr(torch, dtype)) for tensor in make_inputs(shape, data, seed))
    dquantized = codes = None
    if operation == "quantize-train-step":
        dquantized = _normal(shape.tokens, shape.dim, 2 * seed + 7).to(x)
    if operation == "ema":
        generator = torch.Generator().manual_seed(2 * seed + 5)
        codes = torch.randint(shape.codes, (shape.tokens,), generator=generator).to(device)
    return Problem(operation, shape, x, codebook, dquantized, codes, gradient)


@dataclass(eq=False)
class EmaState:
    """What an EMA codebook carries from step to step (van den Oord et al. 2017, appendix A.1)."""

    codebook: Tensor  # [K, D] float32
    cluster_size: Tensor  # [K] float32
    embed_sum: Tensor  # [K, D] float32

    def update_(self, counts: Tensor, sums: Tensor) -> None:  # counts [K], sums [K, D]
        """The update in plain torch: what users write, and in float64 what results are checked against."""
        self.cluster_size.lerp_(counts.to(self.cluster_size.dtype), 1 - EMA_DECAY)
        self.embed_sum.lerp_(sums.to(self.embed_sum.dtype), 1 - EMA_DECAY)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + EMA_EPS) / (total + len(self.cluster_size) * EMA_EPS) * total
        torch.div(self.embed_sum, smoothed[:, None], out=self.codebook)


def initial_state(
    codebook: Tensor,  # [K, D]
    dtype: torch.dtype = torch.float32,
) -> EmaState:
    """Every code as if one token had chosen it."""
    start = codebook.to(dtype, copy=True)
    return EmaState(start, torch.ones(len(start), dtype=dtype, device=start.device), start.clone())
