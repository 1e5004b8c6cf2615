"""The inputs of one benchmark, the same for every provider."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .data import make_inputs, normal_rows
from .shapes import Shape

EMA_DECAY = 0.8  # vector-quantize-pytorch's default, so that its training step runs as its users run it
EMA_EPS = 1e-5
NEAREST = 8  # codes of "nearest-k"
COMMITMENT_WEIGHT = 1.0  # likewise
TRIAL_SHAPE = Shape(4, 4, 2)


@dataclass(frozen=True, eq=False)
class Problem:
    """Tokens and codebook of one shape, and what the training operations need besides."""

    operation: str
    shape: Shape
    x: Tensor  # [N, D]
    codebook: Tensor  # [K, D]
    dquantized: Tensor | None = None  # [N, D]; train-step
    codes: Tensor | None = None  # [N] int64; ema
    gradient: str = "rotation"
    changing: bool = False  # the codebook is written to before every call
    iterations: int = 3  # kmeans; the codebook is where it starts

    @property
    def nearest(self) -> int:
        """How many codes "nearest-k" asks for."""
        return min(NEAREST, self.shape.codes)

    @property
    def scores(self) -> int:
        """Entries of the N x K matrix that an unfused search writes."""
        return self.shape.tokens * self.shape.codes

    @property
    def flops(self) -> int | None:
        """Multiply-adds of the search counted as two, whatever a provider executes; None where there is no search."""
        searches = {"ema": 0, "kmeans": self.iterations, "entropy": 3}.get(self.operation, 1)
        return 2 * self.scores * self.shape.dim * searches or None

    @property
    def bytes(self) -> int:
        """The least that has to be read and written: ``BYTES_FORMULA``."""
        n, k, d, size = self.shape.tokens, self.shape.codes, self.shape.dim, self.x.element_size()
        return {
            "search": size * (n * d + k * d) + 12 * n,
            "quantize": size * (2 * n * d + k * d) + 12 * n,
            "ema": size * n * d + 8 * n + 12 * k * d,
            "train-step": 6 * size * n * d + 24 * n + 24 * k * d,
            "entropy": 3 * size * (n * d + k * d),
            "nearest-k": size * (n * d + k * d) + 12 * n * self.nearest,
            "nearest-tokens": size * (n * d + k * d) + 12 * k,
            "nearest-both": size * (n * d + k * d) + 12 * (n + k),
            "kmeans": self.iterations * (2 * size * n * d + 20 * n + 3 * size * k * d),
        }[self.operation]


FLOPS_FORMULA = {
    "search": "2*N*K*D",
    "quantize": "2*N*K*D (the search)",
    "ema": None,
    "train-step": "2*N*K*D (the search)",
    "kmeans": "2*N*K*D an iteration (the search)",
    "nearest-k": "2*N*K*D (the search)",
    "nearest-tokens": "2*N*K*D (the search)",
    "nearest-both": "2*N*K*D (one search)",
    "entropy": "6*N*K*D: logits, and the gradients of x and codebook, each once",
}
BYTES_FORMULA = {
    "search": "s*(N*D + K*D) + 12*N, s = bytes of a number: read x and codebook, write codes and distance",
    "quantize": "s*(2*N*D + K*D) + 12*N: read x and codebook, write quantized, codes and errors",
    "ema": "s*N*D + 8*N + 12*K*D: read x and codes, update embed_sum, write the codebook",
    "train-step": "6*s*N*D + 24*N + 24*K*D: read x and write quantized; read x, quantized, dquantized and"
    " write dx; statistics and EMA",
    "nearest-k": "s*(N*D + K*D) + 12*N*k: read x and codebook, write k codes and distances",
    "nearest-tokens": "s*(N*D + K*D) + 12*K: read x and codebook, write indices and distances",
    "nearest-both": "s*(N*D + K*D) + 12*(N + K): read x and codebook, write indices and distances",
    "entropy": "3*s*(N*D + K*D): read x and codebook forward and backward, write their gradients",
    "kmeans": "s*(2*N*D + 3*K*D) + 20*N an iteration: read x and the centroids, write codes and distance; read x and"
    " codes, write and read sums",
}


class Touch:
    """Writes one element of a codebook in place, one rounding up every time: no two calls see the same numbers."""

    def __init__(self, codebook: Tensor) -> None:  # [K, D]
        self._element = codebook[0, 0]
        self._up = torch.full_like(self._element, torch.inf)

    def __call__(self) -> None:
        torch.nextafter(self._element, self._up, out=self._element)


def make_problem(
    operation: str,
    shape: Shape,
    *,
    data: str = "normal",
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    gradient: str = "rotation",
    changing: bool = False,
    iterations: int = 3,
) -> Problem:
    """The inputs of ``operation`` at ``shape``; see ``data`` for where they come from."""
    x, codebook = (tensor.to(device, getattr(torch, dtype)) for tensor in make_inputs(shape, data, seed))
    if changing:
        codebook = codebook.clone()
    dquantized = codes = None
    if operation == "train-step":
        dquantized = normal_rows(shape.tokens, shape.dim, 2 * seed + 7).to(x)
    if operation == "ema":
        generator = torch.Generator().manual_seed(2 * seed + 5)
        codes = torch.randint(shape.codes, (shape.tokens,), generator=generator).to(device)
    if operation == "kmeans" and shape.codes <= shape.tokens:  # where k-means starts: tokens, spread evenly
        codebook = x[torch.linspace(0, shape.tokens - 1, shape.codes, dtype=torch.float64).long().to(device)]
    return Problem(operation, shape, x, codebook, dquantized, codes, gradient, changing, iterations)


def trial_problem(
    operation: str, *, dtype: str = "float32", device: str = "cpu", gradient: str = "rotation"
) -> Problem:
    """A tiny problem that every provider of ``operation`` can run if it can run at all."""
    data = "signs" if operation == "entropy" else "normal"
    return make_problem(operation, TRIAL_SHAPE, data=data, dtype=dtype, device=device, gradient=gradient)


def entropy_temperature(shape: Shape) -> float:
    """Of the softmax over N(0, 1) codes: logits are then a few tens, whatever D."""
    return shape.dim / 16


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
