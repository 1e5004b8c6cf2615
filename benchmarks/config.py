"""What to measure. Imports neither torch nor the rest of this package, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from .shapes import parse_shape

Operation = Literal[
    "search", "quantize", "ema", "train-step", "kmeans", "entropy", "nearest-k", "nearest-tokens", "nearest-both"
]
Data = Literal[
    "normal",
    "kmeans",
    "unit",
    "init",
    "offset",
    "near-duplicates",
    "mixed-scales",
    "same",
    "near-ties",
    "outlier",
    "signs",
]
OPERATIONS: tuple[str, ...] = get_args(Operation)
DEFAULT_SHAPES = ("4096,1024,256", "4096,16384,32", "512,262144,18")


@dataclass
class BenchConfig:
    """One benchmark: an operation, its shapes, and who takes part."""

    operation: Operation = field(default="search", metadata={"positional": True})
    """what to measure: search | quantize (search, lookup, errors: what inference does) | ema (statistics and update) |
    train-step (forward, backward and EMA) | kmeans (Lloyd's iterations from given centroids) |
    entropy (the entropy loss over all codes, forward and backward) | nearest-k (the 8 nearest codes) |
    nearest-tokens (the nearest token of every code) | nearest-both (search and nearest-tokens)"""
    shape: list[str] = field(default_factory=list)
    """N,K,D or a model's name (vqgan-1024, llamagen, open-magvit2, encodec ...); repeat for more"""
    provider: list[str] = field(default_factory=list)
    """who takes part; repeat for more; all that can run when left out"""
    threads: list[int] = field(default_factory=list)
    """CPU threads; repeat for more; torch's own number when left out"""
    baseline: list[str] = field(default_factory=list)
    """whom the ratios are against; repeat for more; faiss or the first peer that runs when left out"""
    device: str = "cpu"
    """cpu | cuda"""
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    """float32 | float16 | bfloat16 | float64"""
    data: Data = "normal"
    """normal N(0,1) | kmeans (tokens of a mixture, its k-means codebook) | unit vectors | init (codebook uniform in
    +-1/K) | offset (mean of 100 sigma) | near-duplicates (codes in groups 1e-4 apart) | mixed-scales (1e-3 to 1e3); to
    do harm: same (all codes equal) | near-ties (four heaps 1e-6 wide) | outlier (one code 1e6 times longer); and signs
    (the codebook of a lookup-free quantizer, where K = 2^D)"""
    codebook: Literal["fixed", "changing"] = "fixed"
    """fixed: prepared once where a provider can | changing: one element is written before every call"""
    gradient: Literal["rotation", "straight_through"] = "rotation"
    """how the training step sends gradients past the codes: rotation | straight_through"""
    iterations: int = 3
    """Lloyd iterations of kmeans"""
    measure: Literal["time", "memory", "both"] = "time"
    """time | memory | both"""
    seconds: float = 20.0
    """time budget of one shape at one thread count, without the set-up"""
    check_rows: int = 1024
    """tokens whose codes are compared with float64 brute force"""
    seed: int = 0
    """seed of the inputs"""
    json: str | None = None
    """write the whole result to this file"""
    preset: str | None = None
    """a named set of benchmarks instead of the options above: cpu | search | kmeans | data | avx2 | worst | h200"""

    def __post_init__(self) -> None:
        for name, allowed in _choices().items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("seconds", "check_rows", "iterations"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if any(count < 1 for count in self.threads):
            raise ValueError(f"threads: expected positive integers, got {self.threads}")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got {self.device!r}")
        if self.codebook == "changing" and self.operation not in ("search", "quantize"):
            raise ValueError(
                f"codebook: expected fixed for {self.operation}, which changes it by itself; got 'changing'"
            )
        for text in self.shape:
            parse_shape(text)


def _choices() -> dict[str, tuple[str, ...]]:
    """The fields that take one of a few words, with the words."""
    return {name: get_args(kind) for name, kind in get_type_hints(BenchConfig).items() if _is_literal(kind)}


def _is_literal(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is Literal
