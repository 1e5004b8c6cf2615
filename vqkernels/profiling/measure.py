"""One profile as plain numbers: the document that report.json holds and the page is made from."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from ..benchmarks.machine import describe_machine, describe_versions, git_commit
from ..benchmarks.memory import Peak, peak_memory
from ..benchmarks.peaks import SGEMM
from ..benchmarks.peaks import Peaks as Rounds
from ..benchmarks.problem import Problem
from ..benchmarks.runner import Timing, measure
from ..benchmarks.shapes import Shape
from .kmeans import profile_kmeans
from .peaks import Peaks, measure_peaks
from .roofline import Sizes, kernel_work, kmeans_work, place
from .search import Watch, as_actions, no_report, watches
from .subject import Call, Subject, code_use, step_calls

SCHEMA = 1
KEPT_ARRAYS = 3  # of N x K, at the least, while autograd goes back through a softmax and its entropy
MEASURED_ENTROPY = "; euclidean, with the gradients of tokens and codebook"  # whatever the step's own form
SCORE_BYTES, ONE_HOT_BYTES = 4, 8  # float32 scores; int64 one-hot, as torch.nn.functional.one_hot makes it


def measure_subject(subject: Subject, *, seconds: float, threads: int, kmeans_iterations: int = 0) -> dict[str, Any]:
    """Times every kernel of a quantizer step in turns, and looks into the search.

    Args:
        subject: tokens and codebook.
        seconds: time budget of the timing; every call is made several times even where that takes longer.
        threads: CPU threads in force.
        kmeans_iterations: of k-means on the tokens, run once besides; 0: none.

    Returns:
        the document, without ``memory``, ``training`` and ``trace``; plain dicts, lists, strings and numbers.
    """
    device, seen, load, calls = subject.device, watches(subject), _load(), step_calls(subject)
    rounds = Rounds(device.type, threads)
    actions = {SGEMM: rounds.sgemm, "search": subject.search, **calls, **as_actions(seen)}
    timings = measure(actions, seconds=seconds, device=device.type, each_round=rounds.measure_round)
    rounds.add_sgemm(timings[SGEMM])
    peaks = measure_peaks(rounds, device, threads)
    search = _search_section(subject, timings["search"], seen)
    medians = {name: timing.median for name, timing in timings.items()}
    kmeans, rounds = profile_kmeans(subject, kmeans_iterations) if kmeans_iterations else (None, {})
    return {
        "schema": SCHEMA,
        "machine": {**describe_machine(), "load_before": load},
        "versions": describe_versions(),
        "commit": git_commit(),
        "subject": _subject_section(subject, threads),
        "peaks": asdict(peaks),
        "search": search,
        "kernels": _kernels(subject, medians | rounds, search, peaks),
        "step": _step_section(calls, medians, search),
        "kmeans": kmeans,
        "code_use": code_use(subject),
    }


def _load() -> float | None:
    """Processes that wanted to run in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _sizes(subject: Subject) -> Sizes:
    return Sizes(len(subject.x), len(subject.codebook), subject.x.shape[1], subject.x.element_size())


def _subject_section(subject: Subject, threads: int) -> dict[str, Any]:
    sizes, options = _sizes(subject), subject.options
    return {
        "tokens": sizes.tokens,
        "codes": sizes.codes,
        "dim": sizes.dim,
        "source": subject.source,
        "device": str(subject.device),
        "dtype": str(subject.x.dtype).removeprefix("torch."),
        **asdict(options),
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


def _kernels(subject: Subject, seconds: dict[str, float], search: dict[str, Any], peaks: Peaks) -> dict[str, Any]:
    """Every kernel with its place under the roofline."""
    inside, sizes = search["unchanged"], _sizes(subject)
    coarse_pass = inside["coarse_pass"] if inside else "none" if subject.options.metric == "dot" else None
    if inside:
        seconds = {**seconds, "coarse": inside["stages"]["coarse"]}
    works = kernel_work(sizes, subject.options, coarse_pass=coarse_pass, rates=peaks.rates)
    works |= kmeans_work(sizes, works["search"])
    return {name: place(work, seconds[name], peaks) for name, work in works.items() if seconds.get(name, 0) > 0}


def _step_section(calls: dict[str, Call], seconds: dict[str, float], search: dict[str, Any]) -> dict[str, Any]:
    """One training step of the quantizer; its search finds a codebook that the step before has changed."""
    changed = search["changed"]
    inside = changed["stages"] if changed else {"search": search["seconds"]}
    if "sampling" in calls:
        inside = {}
    stages = {**inside, **{name: seconds[name] for name in calls}}
    return {"seconds": sum(stages.values()), "stages": stages}


def _peak(subject: Subject, operation: str, op: str, threads: int) -> Peak:
    """Peak extra memory of one of the benchmark's operations, at its own metric and temperature."""
    if subject.backend(op) == "torch":
        return Peak(None, "the largest products are found by plain torch, a block of codes at a time")
    sizes = _sizes(subject)
    problem = Problem(operation, Shape(sizes.tokens, sizes.codes, sizes.dim), subject.x, subject.codebook)
    provider = f"vqkernels-{subject.backend(op)}"
    return peak_memory([provider], problem, threads=threads)[provider]


def measure_memory(subject: Subject, threads: int) -> dict[str, Any]:
    """The search's peak beyond its inputs, in a process of its own, beside what arrays of N x K entries take."""
    sizes = _sizes(subject)
    scores, peak = sizes.tokens * sizes.codes, _peak(subject, "search", "nearest", threads)
    return {
        "ours_bytes": peak.bytes,
        "ours_method": peak.method,
        "inputs_bytes": subject.x.nbytes + subject.codebook.nbytes,
        "scores_bytes": SCORE_BYTES * scores,
        "scores_formula": "4 N K: one float32 score for every token and code, as cdist and matmul make them",
        "one_hot_bytes": (SCORE_BYTES + ONE_HOT_BYTES) * scores,
        "one_hot_formula": "4 N K + 8 N K: the scores, and an int64 one-hot array for the EMA statistics",
        "entropy": _entropy_memory(subject, threads) if subject.options.entropy is not None else None,
    }


def _entropy_memory(subject: Subject, threads: int) -> dict[str, Any]:
    """The same of the entropy loss, forward and backward, its gradients included."""
    peak, sizes = _peak(subject, "entropy", "softmax_backward", threads), _sizes(subject)
    scores = sizes.tokens * sizes.codes
    return {
        "ours_bytes": peak.bytes,
        "ours_method": peak.method + MEASURED_ENTROPY if peak.bytes is not None else peak.method,
        "probabilities_bytes": SCORE_BYTES * scores,
        "probabilities_formula": "4 N K: one float32 probability for every token and code",
        "autograd_bytes": KEPT_ARRAYS * SCORE_BYTES * scores,
        "autograd_formula": f"{KEPT_ARRAYS * SCORE_BYTES} N K: probabilities and their logarithms, kept for the "
        "backward, and the gradient of one of them",
    }
