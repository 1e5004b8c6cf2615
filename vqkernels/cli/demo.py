"""`vqkernels demo`: a VQ-VAE from photographs to codes and back, in about two minutes."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import torch
from rich.console import Console

import vqkernels
from vqkernels.benchmarks.machine import describe_machine, describe_versions, git_commit
from vqkernels.models import (
    CodesWriter,
    Evaluation,
    TrainConfig,
    TrainResult,
    bundled_photographs,
    evaluate,
    held_out_photograph,
    load_config,
    load_image,
)
from vqkernels.models.run_log import run_exists
from vqkernels.models.validation import crop_to_multiple

from .demo_measure import Measurements, measure_demo
from .demo_tables import evaluation_rows, print_searches
from .loading import choose_device
from .options import DemoConfig
from .terminal import make_console, make_table, quiet_libraries
from .train import train_with_meter

REPORT = "demo.json"  # the tables as numbers; also marks the folder as one that a demo may replace
MOST_THREADS = 8  # the demo's model is too small for more


def usable_cores() -> int:
    """Logical cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cores


def _training_config(config: DemoConfig) -> TrainConfig:
    """The bundled demo.yaml with the options of the command line."""
    if config.seconds <= 0:
        raise ValueError(f"--seconds: expected a positive number, got {config.seconds:g}")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {config.threads}")
    output = Path(config.output)
    if run_exists(output) and not (output / REPORT).exists():
        raise ValueError(f"--output: expected a new folder or that of an earlier demo, {output} holds another run")
    return dataclasses.replace(
        load_config("demo"),
        data=config.data,
        output=config.output,
        max_seconds=config.seconds,
        threads=config.threads or min(usable_cores(), MOST_THREADS),
        device=choose_device(config.device).type,
        seed=config.seed,
        overwrite=True,
    )


def _prepare_kernels(console: Console, device: str) -> None:
    """The first search of a fresh installation compiles the kernels."""
    started = time.perf_counter()
    with console.status("preparing the kernels (compiled once, then cached)"):
        vqkernels.nearest(torch.zeros(1, 4, device=device), torch.zeros(2, 4, device=device))
    seconds = time.perf_counter() - started
    if seconds > 2:
        console.print(f"kernels compiled in {seconds:.0f} s; the next start finds them ready")


def _introduce(console: Console, config: TrainConfig) -> None:
    photographs = config.data or f"{len(bundled_photographs())} photographs from scikit-image"
    where = "the GPU" if config.device == "cuda" else f"the CPU, {config.threads} threads"
    model = config.model
    console.print(
        f"Training a VQ-VAE on {photographs} for {config.max_seconds:g} s on {where}: every "
        f"{model.factor}x{model.factor} pixels become one of {model.quantizer.codebook_size} codes. "
        f"The astronaut is held out. Ctrl-C stops.",
        markup=False,
    )


def _evaluate(result: TrainResult, device: str) -> Evaluation:
    """The held-out photograph through codes and back; leaves its picture and its codes in the run's folder."""
    model, path = result.model.to(device).eval(), held_out_photograph()
    image = crop_to_multiple(load_image(path), model.factor)[None]
    evaluation = evaluate(model, image)
    evaluation.picture().save(result.output / "astronaut.png")
    with CodesWriter(result.output / "codes", model) as writer:
        writer.append(evaluation.codes, [path.name])
    return evaluation


def _save_report(output: Path, rows: list[tuple[str, str]], measured: Measurements) -> None:
    """The tables as numbers, with what they were measured on."""
    report = {
        "commit": git_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "threads": torch.get_num_threads(),
        "held_out": dict(rows),
        "quantizer_share": measured.quantizer_share,
        "nearest": {search.title: [dataclasses.asdict(row) for row in search.rows] for search in measured.searches},
    }
    (output / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _print_files(console: Console, output: Path) -> None:
    rows = [
        ("astronaut.png", "input | reconstruction | codes of the held-out photograph"),
        ("codes/", "its codes: codes.npy and meta.json"),
        ("model/", f"the model: vqkernels reconstruct {output} IMAGE"),
        ("checkpoints/, samples/", "the last training state, and pictures from on the way"),
        ("metrics.jsonl, events*", f"curves: tensorboard --logdir {output}"),
    ]
    console.print(make_table(f"In {output}/", ("file", "what it is"), rows, text_columns=2))


def run(config: DemoConfig) -> None:
    """Trains, evaluates, measures, and prints the closing tables."""
    console, training = make_console(), _training_config(config)
    device, output = str(training.device), Path(config.output)
    torch.set_num_threads(training.threads or 1)
    with quiet_libraries():
        _prepare_kernels(console, device)
        _introduce(console, training)
        output.mkdir(parents=True, exist_ok=True)
        (output / REPORT).write_text("{}\n", encoding="utf-8")
        result = train_with_meter(console, training)
        evaluation = _evaluate(result, device)
        with console.status("measuring the quantizer and the search beside torch"):
            measured = measure_demo(result.model, training, evaluation, seconds=min(5.0, config.seconds / 8))
    rows = evaluation_rows(evaluation, result, measured)
    _save_report(output, rows, measured)
    console.print(make_table("Held-out photograph (astronaut)", ("what", "value"), rows, text_columns=2))
    print_searches(console, measured.searches, device, training.threads)
    _print_files(console, output)
