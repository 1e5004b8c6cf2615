"""``nearest`` beside what a user would write in torch, on the user's own tokens: speed, memory and wrong codes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from .gate import SearchGate, Verdict
from .memory import Peak, peak_memory
from .problem import Problem
from .providers import Call, choose
from .runner import Timing, measure, ratios
from .shapes import Shape

CONTESTANTS = {
    "vqkernels": "vqkernels.nearest",
    "torch-cdist": "torch.cdist + argmin",
    "torch-expanded": "x^2 + c^2 - 2xc, argmin",
    "torch-expanded-bf16": "the same under bf16 autocast",
}
OURS = "vqkernels"


@dataclass(frozen=True)
class SearchRow:
    """One way to find the nearest codes."""

    name: str
    milliseconds: float | None  # median
    times_slower: float | None  # its time over ours: median of the ratios of each round
    peak_extra_bytes: int | None
    wrong: int | None  # codes that are not the nearest, of `checked`
    checked: int | None
    reason: str | None = None  # why there is no number


def compare_search(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [K, D]
    seconds: float = 5.0,
    *,
    check_rows: int = 1024,
) -> list[SearchRow]:
    """Time, memory and wrong codes of each form on the same data, in the number of threads that torch has.

    Args:
        x: tokens, float32, on the device to measure.
        codebook: codes, float32.
        seconds: budget of the timing; set-up, check and memory come on top.
        check_rows: tokens whose codes are compared with float64 brute force.

    Returns:
        one row each, ``vqkernels.nearest`` first.
    """
    problem = _problem(x, codebook)
    providers = choose("search", list(CONTESTANTS))
    reasons = {p.name: p.unavailable(problem) for p in providers}
    calls: dict[str, Call] = {p.name: p.prepare(problem) for p in providers if reasons[p.name] is None}
    gate = SearchGate(problem, check_rows)
    verdicts = {name: _verdict(gate, name, call) for name, call in calls.items()}
    timings = measure(calls, seconds=seconds, device=problem.x.device.type, min_rounds=3)
    peaks = peak_memory(list(calls), problem, threads=torch.get_num_threads())
    return [
        _row(label, timings[name], timings[OURS], peaks[name], verdicts[name])
        if name in calls
        else SearchRow(label, None, None, None, None, None, reasons[name])
        for name, label in CONTESTANTS.items()
    ]


def _verdict(gate: SearchGate, name: str, call: Call) -> Verdict:
    codes = call()
    assert codes is not None
    return gate.check(codes, lowest_on_ties=name == OURS)


def _problem(x: Tensor, codebook: Tensor) -> Problem:  # x [..., D], codebook [K, D]
    tokens = x.detach().reshape(-1, x.shape[-1]).contiguous()
    shape = Shape(tokens.shape[0], codebook.shape[0], codebook.shape[1])
    return Problem("search", shape, tokens, codebook.detach().contiguous())


def _row(label: str, timing: Timing, ours: Timing, peak: Peak, verdict: Verdict) -> SearchRow:
    slower = statistics.median(ratios(timing, ours))
    return SearchRow(label, timing.median * 1e3, slower, peak.bytes, verdict.wrong, verdict.checked)
