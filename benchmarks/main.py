"""Runs benchmarks: inputs, gate, timing, memory, report."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from vqkernels.backends import BackendError

from .config import DEFAULT_SHAPES, BenchConfig
from .gate import Gate, make_gate
from .goals import goal_table, judge_goal
from .machine import fixed_threads
from .memory import peak_memory
from .peaks import SGEMM, Peaks
from .presets import PRESETS, preset_configs
from .problem import Problem, Touch, make_problem
from .providers import Call, Provider, Result, Unavailable, choose
from .report import (
    add_peak,
    add_ratio,
    add_timing,
    add_verdict,
    case_remarks,
    case_table,
    case_title,
    new_case,
    new_document,
    new_entry,
    write_json,
)
from .runner import Timing, measure
from .shapes import Shape, parse_shape

FAVOURITE_BASELINES = ("faiss", "vector-quantize-pytorch", "torch-index-add", "torch-chunked")


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 means float32 for everybody: no TF32 on CUDA, and no silent bf16 on CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _admit(
    provider: Provider,
    problem: Problem,
    gate: Gate,
    entry: dict[str, Any],
) -> Call | None:
    """The provider's call if it may be measured; the entry says why not. Errors of our own are not swallowed."""
    reason = provider.unavailable(problem)
    if reason is not None:
        entry["status"], entry["reason"] = "unavailable", reason
        return None
    try:
        call = provider.prepare(problem)
        result = call()
    except (Unavailable, BackendError) as error:
        entry["status"], entry["reason"] = "unavailable", str(error)
        return None
    except Exception as error:
        if provider.ours:
            raise
        first = (str(error).splitlines() or [""])[0]
        entry["status"], entry["reason"] = "failed", f"{type(error).__name__}: {first}"
        return None
    if result is not None:
        add_verdict(entry, gate.check(result, lowest_on_ties=provider.ours))
    if provider.explain is not None:
        entry["search"] = provider.explain(problem)
    return None if entry["status"] == "refused" else call


def _baselines(config: BenchConfig, providers: list[Provider], timings: dict[str, Timing]) -> list[str]:
    """The asked-for baselines that ran, or the most telling peer that did."""
    if config.baseline:
        return [name for name in dict.fromkeys(config.baseline) if name in timings]
    peers = [p.name for p in providers if not p.ours and p.name in timings]
    return [name for name in FAVOURITE_BASELINES if name in peers][:1] or peers[:1]


def _touching(call: Call, touch: Touch) -> Call:
    """The call after one element of the codebook was written."""

    def run() -> Result:
        touch()
        return call()

    return run


def _time(config: BenchConfig, case: dict[str, Any], problem: Problem, calls: dict[str, Call]) -> dict[str, Timing]:
    """Everybody's timing, the peaks in the same rounds."""
    if not calls:
        return {}
    if problem.changing:
        touch = Touch(problem.codebook)
        calls = {name: _touching(call, touch) for name, call in calls.items()}
    peaks = Peaks(config.device, case["threads"])
    contestants = {SGEMM: peaks.sgemm, **calls}
    timings = measure(
        contestants, seconds=config.seconds, device=config.device, seed=config.seed, each_round=peaks.measure_round
    )
    peaks.add_sgemm(timings.pop(SGEMM))
    case["peak_gflops"] = {name: rate / 1e9 for name, rate in peaks.medians().items()}
    for entry in case["entries"]:
        if entry["provider"] in timings:
            add_timing(entry, timings[entry["provider"]], problem, peaks)
    return timings


def _add_ratios(case: dict[str, Any], timings: dict[str, Timing]) -> None:
    for entry in case["entries"]:
        for name in case["baselines"]:
            if entry["provider"] in timings and entry["provider"] != name:
                add_ratio(entry, name, timings[name], timings[entry["provider"]])


def run_shape(config: BenchConfig, shape: Shape) -> Iterator[dict[str, Any]]:
    """One shape: a case for each thread count, on the same inputs and held against the same truth."""
    providers = choose(config.operation, config.provider, config.device)
    for package in filter(None, (p.package for p in providers)):
        with contextlib.suppress(ImportError):
            importlib.import_module(package)  # so that its thread pool exists when the threads are fixed
    problem = make_problem(
        config.operation,
        shape,
        data=config.data,
        seed=config.seed,
        dtype=config.dtype,
        device=config.device,
        gradient=config.gradient,
        changing=config.codebook == "changing",
        iterations=config.iterations,
    )
    gate = make_gate(problem, config.check_rows)
    for threads in config.threads or (None,):
        with _full_precision(), fixed_threads(threads) as count:
            case = new_case(config, problem, count)
            _fill(config, case, problem, gate, providers)
        yield case


def _fill(
    config: BenchConfig,
    case: dict[str, Any],
    problem: Problem,
    gate: Gate,
    providers: list[Provider],
) -> None:
    """Every provider gated, then timed together, then measured for memory."""
    calls: dict[str, Call] = {}
    for provider in providers:
        entry = new_entry(provider)
        case["entries"].append(entry)
        call = _admit(provider, problem, gate, entry)
        if call is not None:
            calls[provider.name] = call
    timings = _time(config, case, problem, calls) if config.measure != "memory" else {}
    case["baselines"] = _baselines(config, providers, timings)
    _add_ratios(case, timings)
    if config.measure != "time":
        _measure_memory(case, problem, list(calls), case["threads"])


def _measure_memory(case: dict[str, Any], problem: Problem, names: list[str], threads: int) -> None:
    """A fresh process for each provider, so that none finds memory that another has left."""
    entries = {entry["provider"]: entry for entry in case["entries"]}
    for name in names:
        add_peak(entries[name], peak_memory([name], problem, threads=threads)[name])


def _check_config(config: BenchConfig) -> None:
    """What can only be known with torch imported, before anything slow starts."""
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no CUDA device")
    if config.device.startswith("cuda") and config.threads:
        raise ValueError("threads: CPU threads have no meaning on cuda")
    names = [provider.name for provider in choose(config.operation, config.provider, config.device)]
    for name in config.baseline:
        if name not in names:
            raise ValueError(f"baseline: expected one of the providers {', '.join(names)}; got {name!r}")


def run_bench(config: BenchConfig, console: Console | None = None) -> dict[str, Any]:
    """Run a benchmark or a preset, print its tables, write its JSON, return the whole result.

    Args:
        config: what to measure.
        console: where tables go; the terminal when None.

    Returns:
        the document that ``config.json`` receives: machine, versions, commit, configs, cases, goals.

    Raises:
        ValueError: an unknown provider, baseline or preset; a device that is not there.
    """
    console = console or Console()
    configs = [config] if config.preset is None else preset_configs(config.preset, config)
    for each in configs:
        _check_config(each)
    document = new_document(configs)
    console.print(_headline(document), highlight=False, soft_wrap=True)
    for each in configs:
        for shape in map(parse_shape, each.shape or DEFAULT_SHAPES):
            for case in run_shape(each, shape):
                document["cases"].append(case)
                _print_case(console, case)
                if config.json is not None:
                    write_json(document, config.json)
    goals = PRESETS[config.preset].goals if config.preset is not None else ()
    document["goals"] = [verdict for goal in goals for verdict in judge_goal(goal, document["cases"])]
    if document["goals"]:
        console.print(goal_table(document["goals"]))
    if config.json is not None:
        write_json(document, config.json)
    return document


def _print_case(console: Console, case: dict[str, Any]) -> None:
    console.print(f"\n[bold]{case_title(case)}[/bold]", highlight=False, soft_wrap=True)
    if any(entry["checked"] is not None or entry["median_ms"] is not None for entry in case["entries"]):
        console.print(case_table(case))
    console.print(case_remarks(case), markup=False, highlight=False, soft_wrap=True)


def _headline(document: dict[str, Any]) -> str:
    machine, versions = document["machine"], document["versions"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{machine['cpu']} ({' '.join(machine['isa'])}; {machine['cores']} cores){gpu}\n{packages}"


def exit_code(document: dict[str, Any]) -> int:
    """1 where one of ours returned a wrong code or a goal was missed, else 0."""
    refused = any(entry["status"] == "refused" for case in document["cases"] for entry in case["entries"])
    return int(refused or any(not goal["met"] for goal in document["goals"]))
