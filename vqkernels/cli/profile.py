"""`vqkernels profile`: where the time and memory of a search or of a training step go, as a page and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vqkernels.benchmarks.machine import fixed_threads
from vqkernels.models import load_config
from vqkernels.profiling.advice import headline, hints
from vqkernels.profiling.measure import measure_memory, measure_subject
from vqkernels.profiling.page import render
from vqkernels.profiling.subject import Subject, step_calls
from vqkernels.profiling.trace import trace_calls
from vqkernels.profiling.units import digits, percent, seconds

from .loading import choose_device
from .profile_inputs import make_subject
from .profile_options import ProfileConfig
from .terminal import make_console, make_table, quiet_libraries

PAGE, NUMBERS, TRACE = "report.html", "report.json", "trace.json.gz"


def _profile(
    config: ProfileConfig, device: torch.device, folder: Path, threads: int, say: Callable[[str], object]
) -> dict[str, Any]:
    """The whole document; tells `say` what it is at."""
    training = None
    if config.training is not None:
        from .profile_training import profile_training  # needs the [train] extra

        say("running training steps")
        training, trace, subject = profile_training(config, device, folder / TRACE)
    else:
        subject = make_subject(config, device)
        trace = _trace_kernels(subject, folder / TRACE)
    say("measuring every kernel, and the peaks of this machine")
    rounds = config.kmeans_iterations or 0
    document = measure_subject(subject, seconds=config.seconds, threads=threads, kmeans_iterations=rounds)
    say("measuring memory")
    memory = measure_memory(subject, threads)
    return {**document, "memory": memory, "training": training, "trace": {"file": TRACE, **trace}}


def _trace_kernels(subject: Subject, path: Path) -> dict[str, Any]:
    calls = {"search": subject.search, **step_calls(subject)}
    for call in calls.values():
        call()  # what the first call of each allocates and compiles is no part of the trace
    return {"of": "one call of every kernel", "operators": trace_calls(calls, path, subject.device)}


def write_report(document: dict[str, Any], folder: Path) -> None:
    """report.json and report.html."""
    (folder / NUMBERS).write_text(json.dumps(document, indent=1), encoding="utf-8")
    (folder / PAGE).write_text(render(document), encoding="utf-8")


def _print_kmeans(console: Console, kmeans: dict[str, Any]) -> None:
    rows = [(name, seconds(value), percent(value / kmeans["seconds"])) for name, value in kmeans["stages"].items()]
    passed = [*(each["inertia"] for each in kmeans["rounds"]), kmeans["inertia"]]
    console.print(make_table(f"k-means, {kmeans['iterations']} iterations", ("stage", "time", "share"), rows))
    console.print(f"inertia {digits(passed[0], 5)} to {digits(passed[-1], 5)}\n")


def _print(console: Console, document: dict[str, Any], folder: Path) -> None:
    subject, parts = document["subject"], document["step"]["stages"]
    total = document["step"]["seconds"]
    rows = [(name, seconds(value), percent(value / total)) for name, value in parts.items()]
    sizes = f"{subject['tokens']} tokens x {subject['codes']} codes x {subject['dim']}"
    console.print(f"[bold]{sizes}[/bold]: {headline(document)}\n", soft_wrap=True)
    console.print(make_table("A training step of the quantizer", ("stage", "time", "share"), rows))
    if document["kmeans"]:
        _print_kmeans(console, document["kmeans"])
    for what, help_ in hints(document):
        console.print(f"* {what} {help_}", markup=False, soft_wrap=True)
    console.print(
        f"report in {folder / PAGE}, numbers in {folder / NUMBERS}, trace in {folder / TRACE}",
        markup=False,
        soft_wrap=True,
    )


def _threads(config: ProfileConfig) -> int | None:
    """--threads, or those that the training config asks for."""
    if config.threads is not None or config.training is None:
        return config.threads
    return load_config(config.training).threads


def run(config: ProfileConfig) -> None:
    """Measures, writes the three files and prints the essence."""
    console, device, folder = make_console(), choose_device(config.device), Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_libraries(), fixed_threads(_threads(config)) as threads, console.status("making the input") as status:
        document = _profile(config, device, folder, threads, status.update)
    write_report(document, folder)
    _print(console, document, folder)
