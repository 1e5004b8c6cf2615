"""Timing: everybody in one process, in turns, on the same data.

A round times every contestant once, in a new order; ratios are taken within a round and then their median, so that a
machine that is slow for a while is slow for both sides of a ratio. Before a sample the process sleeps a moment (idle
OpenMP workers of the previous contestant spin for some milliseconds) and runs the call once untimed if it is short.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SAMPLE_SECONDS = 0.02  # calls are repeated until one sample lasts this long
SHORT_CALL_SECONDS = 0.05  # shorter calls get an untimed one before each sample: their caches and workers are cold
MAX_CALLS = 1000
MIN_ROUNDS, MAX_ROUNDS = 5, 200
PAUSE_SECONDS = 0.008

Action = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call in every round, in the order of the rounds."""

    samples: list[float]
    calls: int  # calls in one sample

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.samples)


def quartiles(values: list[float]) -> tuple[float, float]:
    """The 25th and 75th percentile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratios(baseline: Timing, other: Timing) -> list[float]:
    """How many times as fast as ``baseline`` the other was, round by round."""
    return [b / o for b, o in zip(baseline.samples, other.samples, strict=True)]


def _seconds_on_cpu(action: Action, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        action()
    return (time.perf_counter() - start) / calls


def _seconds_on_cuda(action: Action, calls: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


class Stopwatch:
    """Takes one sample of an action; remembers how many calls make a sample long enough."""

    def __init__(self, action: Action, device: str) -> None:
        self._action = action
        self._measure = _seconds_on_cuda if device.startswith("cuda") else _seconds_on_cpu
        self._pause = 0.0 if device.startswith("cuda") else PAUSE_SECONDS
        self._measure(action, 1)  # warm-up: first-call allocations and lazy set-up
        self.estimate = self._measure(action, 1)
        self.calls = max(1, min(MAX_CALLS, round(SAMPLE_SECONDS / max(self.estimate, 1e-9))))

    def sample(self) -> float:
        """Seconds of one call."""
        time.sleep(self._pause)
        if self.estimate < SHORT_CALL_SECONDS:
            self._action()
        return self._measure(self._action, self.calls)


def measure(
    actions: Mapping[str, Action],
    *,
    seconds: float,
    device: str = "cpu",
    seed: int = 0,
    min_rounds: int = MIN_ROUNDS,
    each_round: Action | None = None,
) -> dict[str, Timing]:
    """Time the actions in turns until the budget is spent, ``min_rounds`` at least; ``each_round`` runs untimed."""
    watches = {name: Stopwatch(action, device) for name, action in actions.items()}
    samples: dict[str, list[float]] = {name: [] for name in actions}
    order, shuffle = list(actions), random.Random(seed)
    deadline, rounds = time.perf_counter() + seconds, 0
    while rounds < min_rounds or (rounds < MAX_ROUNDS and time.perf_counter() < deadline):
        shuffle.shuffle(order)
        if each_round is not None:
            each_round()
        for name in order:
            samples[name].append(watches[name].sample())
        rounds += 1
    return {name: Timing(samples[name], watches[name].calls) for name in actions}
