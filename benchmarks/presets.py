"""Named sets of benchmarks with what they are expected to reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import BenchConfig, Data
from .goals import Goal


@dataclass(frozen=True)
class Preset:
    """Benchmarks to run one after the other, and their goals."""

    configs: tuple[BenchConfig, ...]
    goals: tuple[Goal, ...]


OURS = "vqkernels-compiled"
PREPARED = "vqkernels-compiled-prepared"
AT_ONCE = "vqkernels-at-once"  # the EMA step of a module that keeps no pending statistics
TIMES_FAISS = {  # at its best setting
    "4096,1024,256": 1.7,
    "1024,16384,256": 2.2,
    "4096,8192,64": 2.7,
    "4096,16384,32": 2.2,
    "4096,16384,8": 1.4,
    "512,262144,18": 3.8,
    "64,262144,256": 1.5,
    "16384,512,64": 1.5,
}
# bound by arithmetic, by whom: unprepared, (64,262144,256) reads a codebook for 64 tokens
LARGE = {"1024,16384,256": OURS, "4096,8192,64": OURS, "64,262144,256": PREPARED}
PERCENT_OF_INT16 = 85.0
STEP, LONG_STEP = "4096,16384,8", "131072,16384,8"
SIGNS, LARGE_CODEBOOK = "1024,262144,18", "1024,262144,256"
TIMES_LUCIDRAINS = {"4096,1024,256": 8.0, "16384,512,64": 15.0, "2048,16384,32": 50.0, STEP: 120.0}
EMA_SHAPES = ("16384,1024,256", "16384,16384,256", "65536,16384,32", "65536,512,64", "8192,262144,18")


def _beside_faiss(data: Data) -> BenchConfig:
    return BenchConfig(
        shape=[*TIMES_FAISS, "300,200,8"], provider=[OURS, PREPARED, "faiss"], threads=[1, 2], data=data, seconds=4.0
    )


def _ema_goals(provider: str) -> list[Goal]:
    """Twice the best form in torch, and within twice the time that memory needs."""
    least = {"torch-index-add": 2.0, "read-and-write": 0.5}
    return [
        Goal("ema", shape, provider, baseline=baseline, at_least=times)
        for baseline, times in least.items()
        for shape in EMA_SHAPES
    ]


_CHANGING = BenchConfig(
    shape=list(TIMES_FAISS), provider=[OURS, "faiss"], threads=[1, 2], codebook="changing", seconds=2.0, check_rows=256
)
_EVERYBODY = BenchConfig(
    shape=["4096,1024,256", "4096,16384,32", "512,262144,18"],
    provider=[
        OURS,
        "faiss",
        "torch-cdist",
        "torch-expanded",
        "torch-addmm",
        "torch-chunked",
        "torch-compile",
        "sklearn",
    ],
    baseline=["faiss", "torch-cdist"],
    threads=[1, 2],
    seconds=8.0,
)
_QUANTIZE = BenchConfig(
    operation="quantize",
    shape=["4096,1024,256", STEP],
    provider=[OURS, "faiss", "torch-addmm", "vector-quantize-pytorch"],
    baseline=["faiss", "vector-quantize-pytorch"],
    threads=[1, 2],
    seconds=6.0,
)
_STEP = BenchConfig(
    operation="train-step",
    shape=list(TIMES_LUCIDRAINS),
    provider=[OURS, "vector-quantize-pytorch", "torch-index-add"],
    baseline=["vector-quantize-pytorch", "torch-index-add"],
    threads=[1, 2],
    seconds=15.0,
)
_EMA = BenchConfig(
    operation="ema",
    shape=list(EMA_SHAPES),
    provider=[OURS, AT_ONCE, "torch-index-add", "read-and-write"],
    baseline=["torch-index-add", "read-and-write"],
    threads=[1, 2],
    seconds=4.0,
)
_MEMORY = BenchConfig(
    operation="train-step",
    shape=[LONG_STEP],
    provider=[OURS, "vector-quantize-pytorch"],
    threads=[2],
    measure="memory",
    check_rows=256,  # the reference scans them against all codes in float64
)
_ENTROPY = BenchConfig(
    operation="entropy",
    shape=[SIGNS],
    provider=[OURS, "vqkernels-signs", "torch-chunked"],
    baseline=["torch-chunked"],
    threads=[1, 2],
    data="signs",
    seconds=10.0,
)
_ENTROPY_MEMORY = BenchConfig(
    operation="entropy", shape=[LARGE_CODEBOOK], provider=[OURS], threads=[2], measure="memory"
)
_PEERS_MEMORY = BenchConfig(  # at a size that the others' N x K arrays fit into
    operation="train-step",
    shape=["4096,8192,8"],
    provider=[OURS, "vector-quantize-pytorch", "torch-index-add", "torch-one-hot"],
    threads=[2],
    measure="memory",
)
_SEARCH = Preset(
    configs=(_beside_faiss("normal"), _CHANGING, _beside_faiss("kmeans"), _EVERYBODY),
    goals=(
        *(
            Goal("search", shape, provider, baseline="faiss", at_least=times)
            for provider in (OURS, PREPARED)
            for shape, times in TIMES_FAISS.items()
        ),
        *(
            Goal("search", shape, provider, percent_of="int16", at_least=PERCENT_OF_INT16, threads=1)  # of a core
            for shape, provider in LARGE.items()
        ),
        *(Goal("search", shape, baseline="torch-cdist", at_least=3.0) for shape in _EVERYBODY.shape[1:]),
    ),
)
_TRAINING = Preset(
    configs=(_QUANTIZE, _STEP, _EMA, _MEMORY, _PEERS_MEMORY, _ENTROPY, _ENTROPY_MEMORY),
    goals=(
        *(
            Goal("train-step", shape, baseline="vector-quantize-pytorch", at_least=times)
            for shape, times in TIMES_LUCIDRAINS.items()
        ),
        *_ema_goals(OURS),
        *_ema_goals(AT_ONCE),
        Goal("train-step", LONG_STEP, max_bytes=64_000_000),
        Goal("entropy", SIGNS, baseline="torch-chunked", at_least=3.0),
        Goal("entropy", LARGE_CODEBOOK, max_bytes=64_000_000 + 4 * 262144 * 256),  # beyond the codebook's gradient
    ),
)
_CPU = Preset(configs=_SEARCH.configs + _TRAINING.configs, goals=_SEARCH.goals + _TRAINING.goals)

_DATA = Preset(  # no wrong code on any of them; how fast each is besides
    configs=tuple(
        BenchConfig(
            shape=list(TIMES_FAISS), provider=[OURS, "faiss"], threads=[2], data=data, seconds=1.5, check_rows=256
        )
        for data in ("unit", "init", "offset", "near-duplicates", "mixed-scales")
    ),
    goals=(),
)

AVX2 = "vqkernels-compiled-avx2"
_AVX2 = Preset(
    configs=tuple(
        BenchConfig(
            shape=["512,262144,18"],
            provider=[AVX2, "vqkernels-compiled-portable", "faiss"],
            baseline=["faiss"],
            threads=[1, 2],
            data=data,
            seconds=10.0,
        )
        for data in ("normal", "kmeans")
    ),
    goals=(Goal("search", "512,262144,18", AVX2, baseline="faiss", at_least=1.3),),
)

WORST_SHAPES = ("1024,8192,64", "1024,16384,8", "4096,1024,256")
PLAIN = "vqkernels-compiled-plain"
_WORST = Preset(
    configs=tuple(
        BenchConfig(
            shape=list(WORST_SHAPES),
            provider=[OURS, "vqkernels-compiled-float32", "vqkernels-compiled-fast", PLAIN, "faiss"],
            baseline=[PLAIN, "faiss"],
            threads=[1, 2],
            data=data,
            seconds=5.0,
            check_rows=32,  # the reference decides thousands of ties for each
        )
        for data in ("same", "near-ties", "outlier")
    ),
    goals=tuple(Goal("search", shape, baseline=PLAIN, at_least=1 / 3) for shape in WORST_SHAPES),
)

_ON_GPU = (
    *("vqkernels-triton", "vqkernels-compiled", "flash-kmeans", "faiss-gpu-stand-in", "cuvs-hopper-stand-in"),
    *("cuvs-blackwell-stand-in", "torch-cdist", "torch-addmm", "torch-chunked", "torch-compile", "cublas-fp16-gemm"),
)
MICROSECONDS_H200 = {
    "16384,1024,256": 20,
    "16384,16384,256": 260,
    "16384,16384,8": 35,
    "65536,16384,32": 150,
    "8192,262144,18": 300,
    "4096,262144,256": 1000,
}
_H200 = Preset(
    configs=(BenchConfig(shape=list(MICROSECONDS_H200), provider=["vqkernels", *_ON_GPU], device="cuda", seconds=6.0),),
    goals=tuple(Goal("search", shape, "vqkernels", max_ms=most / 1e3) for shape, most in MICROSECONDS_H200.items()),
)

KMEANS = "1000000,4096,64"
_KMEANS = Preset(
    configs=(
        BenchConfig(
            operation="kmeans", shape=[KMEANS], provider=[OURS, "faiss"], threads=[1, 2], iterations=3, seconds=30.0
        ),
    ),
    goals=(Goal("kmeans", KMEANS, baseline="faiss", at_least=2.0),),
)

PRESETS = {
    "cpu": _CPU,
    "search": _SEARCH,
    "training": _TRAINING,
    "kmeans": _KMEANS,
    "data": _DATA,
    "avx2": _AVX2,
    "worst": _WORST,
    "h200": _H200,
}


def preset_configs(name: str, base: BenchConfig) -> list[BenchConfig]:
    """The preset's benchmarks; ``threads``, ``device`` and ``seed`` of ``base`` hold where they were given.

    Raises:
        ValueError: no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}; got {name!r}")
    configs = []
    for config in PRESETS[name].configs:
        device = config.device if base.device == "cpu" else base.device
        threads = base.threads or (config.threads if device == "cpu" else [])
        configs.append(replace(config, threads=threads, device=device, seed=base.seed))
    return configs
