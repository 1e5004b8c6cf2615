"""Show versions, hardware and which backend runs which operator, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

import torch
from rich.console import Console

from vqkernels import backends
from vqkernels._dtypes import accumulation_dtype
from vqkernels._extension import describe
from vqkernels._version import __version__

from .options import InfoConfig
from .terminal import make_console, make_table, quiet_libraries

PACKAGES = ("torch", "triton", "numpy", "accelerate", "tensorboard", "scikit-image", "faiss-cpu")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _hardware() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        ("CPU", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores usable"),
        ("torch threads", str(torch.get_num_threads())),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "none that torch can use")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        rows.append((f"GPU {index}", f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"))
    return rows


def _environment() -> list[tuple[str, str]]:
    set_here = {name: value for name, value in sorted(os.environ.items()) if name.startswith("VQKERNELS_")}
    return list(set_here.items()) or [("VQKERNELS_*", "none set")]


def example_arguments(dtype: torch.dtype, device: str) -> dict[str, tuple[Any, ...]]:
    """Small tensors for every op, to ask the backends about."""
    x = torch.zeros(1, 4, 8, dtype=dtype, device=device)  # [B, T, D]
    codebook = torch.zeros(3, 8, dtype=dtype, device=device)  # [K, D]
    codes = torch.zeros(1, 4, dtype=torch.int64, device=device)  # [B, T]
    error = torch.zeros(1, 4, device=device)  # [B, T]
    state = accumulation_dtype(dtype)
    rows, sizes = (torch.zeros(3, 8, dtype=state, device=device), torch.zeros(3, dtype=state, device=device))
    revive = torch.zeros(3, dtype=torch.bool, device=device)  # [K]
    return {
        "nearest": (x, codebook, "euclidean", "exact"),
        "gather": (x, codebook, codes),
        "quantize": (x, codebook, None, "euclidean", "exact"),
        "quantize_backward": (x, x, codes, x, error, False),
        "codebook_gradient": (x, x, codes, error, 3),
        "codebook_stats": (x, codes, 3),
        "add_statistics_": (x, codes, sizes, rows),
        "ema_update_": (rows, sizes, rows, sizes, rows, revive, 0.99, 1e-5, 1.0, False),
        "ema_step_": (x, codes, rows, sizes, rows, 0.99, 1e-5, False),
    }


def _chosen(op: str, arguments: tuple[Any, ...]) -> str:
    """The backend that vqkernels.explain marks."""
    marked = [line.split()[0] for line in backends.explain(op, *arguments).splitlines() if "<- chosen" in line]
    return marked[0] if marked else "none"


def backend_rows(dtype: torch.dtype, device: str) -> list[tuple[str, ...]]:
    """Per op: its name, the backend that runs it, and which others could, on one device."""
    rows: list[tuple[str, ...]] = []
    for op, arguments in example_arguments(dtype, device).items():
        chosen, states = _chosen(op, arguments), backends.candidates(op, *arguments)
        able = [state.backend for state in states if state.reason is None and state.backend != chosen]
        rows.append((op, chosen, ", ".join(able) or "-"))
    return rows


def refusal_rows(dtype: torch.dtype, device: str) -> list[tuple[str, ...]]:
    """Every reason for which a backend does not run an op, with the ops that it holds for."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for op, arguments in example_arguments(dtype, device).items():
        for state in backends.candidates(op, *arguments):
            if state.reason is not None:
                reasons.setdefault((state.backend, state.reason), []).append(op)
    every = len(example_arguments(dtype, device))
    return [
        (backend, "every operator" if len(ops) == every else ", ".join(ops), reason)
        for (backend, reason), ops in reasons.items()
    ]


def _print_operators(console: Console, dtype: torch.dtype, device: str) -> None:
    title, columns = f"Operators on {device}, {str(dtype)[6:]}", ("operator", "runs on", "could also run on")
    console.print(make_table(title, columns, backend_rows(dtype, device), text_columns=3))
    refusals = refusal_rows(dtype, device)
    if refusals:
        title, columns = f"Backends that do not run on {device}", ("backend", "for", "because")
        console.print(make_table(title, columns, refusals, text_columns=3))


def run(config: InfoConfig) -> None:
    """Prints the tables."""
    console, dtype = make_console(), getattr(torch, config.dtype)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    versions = [("vqkernels", __version__), ("Python", sys.version.split()[0]), ("system", platform.platform())]
    versions += [(package, _version(package)) for package in PACKAGES]
    with quiet_libraries(notes=False), console.status("loading the kernels (compiled once, then cached)"):
        for device in devices:
            backend_rows(dtype, device)
        about = [*versions, *_hardware(), *describe().items(), *_environment()]
    console.print(make_table("Versions, hardware and compiled kernels", ("what", "here"), about, text_columns=2))
    for device in devices:
        _print_operators(console, dtype, device)
