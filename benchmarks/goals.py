"""What a preset is expected to reach, and whether it did."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .report import narrow_table
from .shapes import parse_shape


@dataclass(frozen=True)
class Goal:
    """One expectation of ``provider``, for every case of the operation, shape, data and codebook.

    It is ``at_least`` times as fast as ``baseline``; or at ``at_least`` percent of the peak ``percent_of``; or takes
    ``max_ms`` at most; or stays under ``max_bytes`` of extra memory.
    """

    operation: str
    shape: str
    provider: str = "vqkernels-compiled"
    baseline: str | None = None
    percent_of: str | None = None
    at_least: float = 1.0
    max_bytes: int | None = None
    max_ms: float | None = None
    data: str | None = None  # any
    codebook: str = "fixed"
    threads: int | None = None  # any

    def speaks_of(self, case: dict[str, Any]) -> bool:
        """Whether a case is one of those that it is about."""
        shape = parse_shape(self.shape)
        sizes = {"N": shape.tokens, "K": shape.codes, "D": shape.dim}
        same = all(case["shape"][key] == size for key, size in sizes.items())
        about = (case["operation"], case["codebook"]) == (self.operation, self.codebook)
        return same and about and self.data in (None, case["data"]) and self.threads in (None, case["threads"])

    def value(self, entry: dict[str, Any]) -> float | None:
        """What was measured; None without a number (not run, refused)."""
        if self.max_bytes is not None:
            return entry["peak_extra_bytes"]
        if self.max_ms is not None:
            return entry["median_ms"]
        if self.percent_of is not None:
            return entry["percent_of_peak"].get(self.percent_of)
        ratio = entry["times_as_fast_as"].get(self.baseline)
        return None if ratio is None else ratio["median"]

    def is_met(self, value: float | None) -> bool:
        """Whether a measured value is enough; None is not."""
        if value is None:
            return False
        most = self.max_bytes if self.max_ms is None else self.max_ms
        return value >= self.at_least if most is None else value <= most


def judge_goal(goal: Goal, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One verdict for each case that the goal speaks of and its baseline took part in; a wrong one meets none."""
    verdicts = []
    for case in filter(goal.speaks_of, cases):
        if goal.baseline is not None and goal.baseline not in {entry["provider"] for entry in case["entries"]}:
            continue
        for entry in case["entries"]:
            if entry["provider"] == goal.provider:
                value = goal.value(entry)
                met = goal.is_met(value) and entry["status"] == "measured"
                told = {"data": case["data"], "threads": case["threads"], "value": value, "met": met}
                verdicts.append({**dataclasses.asdict(goal), **told})
    return verdicts


def _cells(verdict: dict[str, Any]) -> tuple[str, str]:
    """The goal and what was measured, in words."""
    value = verdict["value"]
    if verdict["max_bytes"] is not None:
        return f"<= {verdict['max_bytes'] / 1e6:.0f} MB", "none" if value is None else f"{value / 1e6:.1f}"
    if verdict["max_ms"] is not None:
        return f"<= {1e3 * verdict['max_ms']:.0f} us", "none" if value is None else f"{1e3 * value:.1f}"
    if verdict["percent_of"] is not None:
        return f">= {verdict['at_least']:g} % of {verdict['percent_of']}", "none" if value is None else f"{value:.1f}"
    return (
        f">= {verdict['at_least']:.3g} x {verdict['baseline'].removeprefix('vqkernels-')}",
        "none" if value is None else f"{value:.2f}",
    )


def goal_table(verdicts: list[dict[str, Any]]) -> Table:
    """Every goal with what was measured."""
    rows = []
    for verdict in verdicts:
        case = [verdict["operation"], verdict["shape"], verdict["data"], str(verdict["threads"])]
        rows.append([*case, *_cells(verdict), "met" if verdict["met"] else "missed"])
    return narrow_table(["goals", "shape", "data", "threads", "goal", "measured", ""], rows, folding=4)
