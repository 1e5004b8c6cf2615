"""One profile as plain numbers: the document that report.json holds and the page is made from."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from ..benchmarks.machine import describe_machine, describe_versions, git_commit
from ..benchmarks.memory import peak_memory
from ..benchmarks.peaks import SGEMM
from ..benchmarks.peaks import Peaks as Rounds
from ..benchmarks.problem import Problem
from ..benchmarks.runner import Timing, measure
from ..benchmarks.shapes import Shape
from .peaks import Peaks, measure_peaks
from .roofline import Sizes, kernel_work, place
from .search import Watch, as_actions, no_report, watches
from .subject import Subject, code_use, step_calls

SCHEMA = 1
PARTS = ("gather", "losses", "statistics", "ema", "backward")  # of a training step, after the search
SCORE_BYTES, ONE_HOT_BYTES = 4, 8  # float32 scores; int64 one-hot, as torch.nn.functional.one_hot makes it


def measure_subject(subject: Subject, *, seconds: float, threads: int) -> dict[str, Any]:
    """Times every kernel of a quantizer step in turns, and looks into the search.

    Args:
        subject: tokens and codebook.
        seconds: time budget of the timing; every call is made several times even where that takes longer.
        threads: CPU threads in force.

    Returns:
        the document, without ``memory``, ``training`` and ``trace``; plain dicts, lists, strings and numbers.
    """
    device, seen, load = subject.device, watches(subject), _load()
    rounds = Rounds(device.type, threads)
    actions = {SGEMM: rounds.sgemm, "search": subject.search, **step_calls(subject), **as_actions(seen)}
    timings = measure(actions, seconds=seconds, device=device.type, each_round=rounds.measure_round)
    rounds.add_sgemm(timings[SGEMM])
    peaks = measure_peaks(rounds, device, threads)
    search = _search_section(subject, timings["search"], seen)
    return {
        "schema": SCHEMA,
        "machine": {**describe_machine(), "load_before": load},
        "versions": describe_versions(),
        "commit": git_commit(),
        "subject": _subject_section(subject, threads),
        "peaks": asdict(peaks),
        "search": search,
        "kernels": _kernels(subject, timings, search, peaks),
        "step": _step_section(timings, search),
        "code_use": code_use(subject),
    }


def _load() -> float | None:
    """Processes that wanted to run in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _sizes(subject: Subject) -> Sizes:
    return Sizes(len(subject.x), len(subject.codebook), subject.x.shape[1], subject.x.element_size())


def _subject_section(subject: Subject, threads: int) -> dict[str, Any]:
    sizes = _sizes(subject)
    return {
        "tokens": sizes.tokens,
        "codes": sizes.codes,
        "dim": sizes.dim,
        "source": subject.source,
        "device": str(subject.device),
        "dtype": str(subject.x.dtype).removeprefix("torch."),
        "metric": subject.metric,
        "precision": subject.precision,
        "gradient": subject.gradient,
        "threads": threads if subject.device.type == "cpu" else None,
        "backends": subject.backends(),
    }


def _timing(timing: Timing) -> dict[str, Any]:
    low, high = timing.quartiles()
    return {"seconds": timing.median, "quartiles": [low, high], "samples": len(timing.samples)}


def _search_section(subject: Subject, timing: Timing, seen: dict[str, Watch]) -> dict[str, Any]:
    reports = {name: watch.median() for name, watch in seen.items()}
    return {
        **_timing(timing),
        "backend": subject.backend(),
        "unchanged": reports.get("unchanged"),
        "changed": reports.get("changed"),
        "not_seen_because": no_report(subject),
    }


def _kernels(subject: Subject, timings: dict[str, Timing], search: dict[str, Any], peaks: Peaks) -> dict[str, Any]:
    """Every kernel with its place under the roofline."""
    inside, rotation = search["unchanged"], subject.gradient == "rotation"
    coarse_pass = inside["coarse_pass"] if inside else None
    seconds = {name: timing.median for name, timing in timings.items()}
    if inside:
        seconds["coarse"] = inside["stages"]["coarse"]
    works = kernel_work(_sizes(subject), coarse_pass=coarse_pass, rotation=rotation, rates=peaks.rates)
    return {name: place(work, seconds[name], peaks) for name, work in works.items() if seconds[name] > 0}


def _step_section(timings: dict[str, Timing], search: dict[str, Any]) -> dict[str, Any]:
    """One training step of the quantizer; its search finds a codebook that the step before has changed."""
    changed = search["changed"]
    inside = changed["stages"] if changed else {"search": search["seconds"]}
    stages = {**inside, **{name: timings[name].median for name in PARTS}}
    return {"seconds": sum(stages.values()), "stages": stages}


def measure_memory(subject: Subject, threads: int) -> dict[str, Any]:
    """The search's peak beyond its inputs, in a process of its own, beside what arrays of N x K entries take."""
    sizes = _sizes(subject)
    scores = sizes.tokens * sizes.codes
    problem = Problem("search", Shape(sizes.tokens, sizes.codes, sizes.dim), subject.x, subject.codebook)
    provider = f"vqkernels-{subject.backend()}"
    peak = peak_memory([provider], problem, threads=threads)[provider]
    return {
        "ours_bytes": peak.bytes,
        "ours_method": peak.method,
        "inputs_bytes": subject.x.nbytes + subject.codebook.nbytes,
        "scores_bytes": SCORE_BYTES * scores,
        "scores_formula": "4 N K: one float32 score for every token and code, as cdist and matmul make them",
        "one_hot_bytes": (SCORE_BYTES + ONE_HOT_BYTES) * scores,
        "one_hot_formula": "4 N K + 8 N K: the scores, and an int64 one-hot array for the EMA statistics",
    }
