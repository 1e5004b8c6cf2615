"""Named sets of benchmarks with the ratios that they are expected to reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import BenchConfig


@dataclass(frozen=True)
class Goal:
    """``provider`` is at least ``at_least`` times as fast as ``baseline``, or stays under ``max_bytes``."""

    operation: str
    shape: str
    provider: str = "vqkernels-compiled"
    baseline: str | None = None
    at_least: float = 1.0
    max_bytes: int | None = None


@dataclass(frozen=True)
class Preset:
    """Benchmarks to run one after the other, and their goals."""

    configs: tuple[BenchConfig, ...]
    goals: tuple[Goal, ...]


_SEARCH = BenchConfig(
    operation="search",
    shape=["4096,1024,256", "4096,16384,32", "512,262144,18"],
    provider=["vqkernels-compiled", "faiss", "torch-cdist", "torch-addmm", "torch-chunked", "sklearn"],
    baseline=["faiss", "torch-cdist"],
    threads=[1, 2],
    seconds=30.0,
)
_MORE = BenchConfig(  # where the margin is thin, or negative
    operation="search",
    shape=["1024,16384,256", "16384,512,64", "64,262144,256", "4096,16384,8", "300,200,8"],
    provider=["vqkernels-compiled", "faiss", "torch-cdist"],
    baseline=["faiss", "torch-cdist"],
    threads=[1, 2],
    seconds=8.0,
)
_STEP = BenchConfig(
    operation="quantize-train-step",
    shape=["4096,16384,8"],
    provider=["vqkernels-compiled", "vector-quantize-pytorch", "torch-index-add"],
    baseline=["vector-quantize-pytorch", "torch-index-add"],
    threads=[1, 2],
    seconds=60.0,
)
_MEMORY = BenchConfig(
    operation="quantize-train-step",
    shape=["131072,16384,8"],
    provider=["vqkernels-compiled", "vector-quantize-pytorch"],
    threads=[2],
    measure="memory",
    check_rows=256,  # the reference scans them against all codes in float64
)

PRESETS = {
    "cpu": Preset(
        configs=(_SEARCH, _MORE, _STEP, _MEMORY),
        goals=(
            *(Goal("search", shape, baseline="faiss") for shape in _SEARCH.shape),
            *(Goal("search", shape, baseline="torch-cdist", at_least=3.0) for shape in _SEARCH.shape[1:]),
            Goal("quantize-train-step", "4096,16384,8", baseline="vector-quantize-pytorch", at_least=5.0),
            Goal("quantize-train-step", "131072,16384,8", max_bytes=64_000_000),
        ),
    ),
}


def preset_configs(name: str, base: BenchConfig) -> list[BenchConfig]:
    """The preset's benchmarks; ``threads``, ``device`` and ``seed`` of ``base`` hold where they were given.

    Raises:
        ValueError: no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}; got {name!r}")
    on_cpu = base.device == "cpu"
    return [
        replace(config, threads=base.threads or config.threads * on_cpu, device=base.device, seed=base.seed)
        for config in PRESETS[name].configs
    ]
