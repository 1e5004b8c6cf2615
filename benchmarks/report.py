"""What a benchmark says: plain dictionaries for JSON, tables for people. Losses are printed like wins."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .config import BenchConfig
from .gate import Verdict
from .machine import describe_machine, describe_versions, git_commit
from .memory import Peak
from .presets import Goal
from .problem import BYTES_FORMULA, FLOPS_FORMULA, Problem
from .providers import Provider
from .runner import Timing, quartiles, ratios
from .shapes import parse_shape

SCHEMA = 1
# what became of a provider: right and measured; wrong codes but measured; ours with wrong codes, so no time; the rest
STATES = ("measured", "wrong", "refused", "unavailable", "failed")


def new_entry(provider: Provider) -> dict[str, Any]:
    """One provider's part of a case, before anything is known."""
    return {
        "provider": provider.name,
        "ours": provider.ours,
        "note": provider.note,
        "status": "measured",
        "reason": None,
        "checked": None,
        "wrong": None,
        "median_ms": None,
        "p25_ms": None,
        "p75_ms": None,
        "min_ms": None,
        "rounds": None,
        "calls_per_round": None,
        "times_as_fast_as": {},
        "gflops": None,
        "percent_of_peak": None,
        "gbytes_per_second": None,
        "peak_extra_bytes": None,
        "peak_extra_method": None,
    }


def add_verdict(entry: dict[str, Any], verdict: Verdict) -> None:
    """Ours with a wrong code is refused; anybody else is marked."""
    entry["checked"], entry["wrong"] = verdict.checked, verdict.wrong
    if verdict.wrong:
        entry["status"] = "refused" if entry["ours"] else "wrong"
        rate = f"{verdict.wrong} of {verdict.checked} wrong ({100 * verdict.error_rate:.2g} %)"
        entry["reason"] = f"{rate}; no time is shown" if entry["ours"] else rate


def add_timing(entry: dict[str, Any], timing: Timing, problem: Problem, peak_flops: float) -> None:
    """Median, spread and rates of one provider."""
    low, high = timing.quartiles()
    entry["median_ms"], entry["min_ms"] = timing.median * 1e3, min(timing.samples) * 1e3
    entry["p25_ms"], entry["p75_ms"] = low * 1e3, high * 1e3
    entry["rounds"], entry["calls_per_round"] = len(timing.samples), timing.calls
    entry["gbytes_per_second"] = problem.bytes / timing.median / 1e9
    if problem.flops is not None:
        entry["gflops"] = problem.flops / timing.median / 1e9
        entry["percent_of_peak"] = 100 * problem.flops / timing.median / peak_flops


def add_ratio(entry: dict[str, Any], baseline: str, baseline_timing: Timing, timing: Timing) -> None:
    """Times as fast as the baseline: median and quartiles of the ratios of each round."""
    per_round = ratios(baseline_timing, timing)
    low, high = quartiles(per_round)
    entry["times_as_fast_as"][baseline] = {"median": statistics.median(per_round), "p25": low, "p75": high}


def add_peak(entry: dict[str, Any], peak: Peak) -> None:
    """Peak extra memory of one call."""
    entry["peak_extra_bytes"], entry["peak_extra_method"] = peak.bytes, peak.method


def new_case(config: BenchConfig, problem: Problem, threads: int) -> dict[str, Any]:
    """One shape at one thread count, without its entries."""
    shape = problem.shape
    return {
        "operation": problem.operation,
        "shape": {"name": shape.name or None, "N": shape.tokens, "K": shape.codes, "D": shape.dim},
        "threads": threads,
        "device": config.device,
        "dtype": config.dtype,
        "data": config.data,
        "gradient": config.gradient if problem.operation == "quantize-train-step" else None,
        "seed": config.seed,
        "flops": problem.flops,
        "flops_formula": FLOPS_FORMULA[problem.operation],
        "bytes": problem.bytes,
        "bytes_formula": BYTES_FORMULA[problem.operation],
        "peak_gflops": None,
        "baselines": [],
        "entries": [],
    }


def new_document(configs: list[BenchConfig]) -> dict[str, Any]:
    """The whole result: where, when, with what; cases follow."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "configs": [dataclasses.asdict(config) for config in configs],
        "cases": [],
        "goals": [],
    }


def write_json(document: dict[str, Any], path: str) -> None:
    """Write to a temporary name, then rename: a broken run leaves no half file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(target)


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _time_cells(entry: dict[str, Any]) -> tuple[str, str]:
    """Median, and the distance of the quartiles as a share of it; a wrong provider's time carries a mark."""
    if entry["median_ms"] is None:
        return "", ""
    mark = " !" if entry["status"] == "wrong" else ""
    spread = (entry["p75_ms"] - entry["p25_ms"]) / entry["median_ms"]
    return _milliseconds(entry["median_ms"]) + mark, f"{100 * spread:.0f} %"


def _wrong_cell(entry: dict[str, Any]) -> str:
    return "" if entry["checked"] is None else f"{entry['wrong']}/{entry['checked']}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _row(entry: dict[str, Any], baselines: list[str]) -> list[str]:
    ratio_of = entry["times_as_fast_as"]
    peak = entry["peak_extra_bytes"]
    return [
        f"[bold]{entry['provider']}[/bold]" if entry["ours"] else entry["provider"],
        _wrong_cell(entry),
        *_time_cells(entry),
        *(_number(ratio_of[b]["median"], ".2f") if b in ratio_of else "" for b in baselines),
        _number(entry["percent_of_peak"], ".0f"),
        _number(None if peak is None else peak / 1e6, ".1f"),
    ]


def _is_shown(entry: dict[str, Any]) -> bool:
    """Whether there is any number for the table; the others get a line below it."""
    return entry["median_ms"] is not None or entry["peak_extra_bytes"] is not None


def case_title(case: dict[str, Any]) -> str:
    """What was run, in one line."""
    shape = case["shape"]
    name = f" ({shape['name']})" if shape["name"] else ""
    how = f"{case['dtype']}, {case['data']}, {case['device']}, {case['threads']} thread(s)"
    return f"{case['operation']}  N={shape['N']} K={shape['K']} D={shape['D']}{name}  {how}"


def case_table(case: dict[str, Any]) -> Table:
    """One case for the terminal, fastest first; columns that nobody fills are left out, and JSON has more."""
    shown = sorted(filter(_is_shown, case["entries"]), key=lambda entry: entry["median_ms"] or 0.0)
    rows = [_row(entry, case["baselines"]) for entry in shown]
    against = ["vs\n" + name.replace("-", "-\n") for name in case["baselines"]]
    headings = ["", "wrong", "ms", "spread", *against, "%\nsgemm", "MB"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    filled = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in rows)]
    for i in filled:
        table.add_column(headings[i], justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[i] for i in filled))
    return table


def case_remarks(case: dict[str, Any]) -> str:
    """What the table cannot say: the peak of the run, who is wrong, who could not take part and why."""
    lines = []
    if case["peak_gflops"] and case["flops"]:
        lines.append(f"sgemm of this run: {case['peak_gflops']:.0f} GFLOP/s")
    if case["baselines"]:
        lines.append("vs: how many times as fast; the median over rounds of its time over theirs")
    lines += [f"! {e['provider']}: {e['reason']}" for e in case["entries"] if e["status"] == "wrong"]
    absent = [e for e in case["entries"] if e["status"] not in ("measured", "wrong")]
    lines += [f"- {e['provider']}: {e['status']}: {e['reason']}" for e in absent]
    return "\n".join(f"  {line}" for line in lines)


def judge_goal(goal: Goal, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One verdict for each case that the goal speaks of."""
    shape = parse_shape(goal.shape)
    wanted = {"N": shape.tokens, "K": shape.codes, "D": shape.dim}
    verdicts = []
    for case in cases:
        if case["operation"] != goal.operation or any(case["shape"][key] != wanted[key] for key in wanted):
            continue
        entry = next((e for e in case["entries"] if e["provider"] == goal.provider), None)
        if entry is not None:
            verdicts.append(_judge_entry(goal, case, entry))
    return verdicts


def _judge_entry(goal: Goal, case: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Without a number (not run, refused) a goal is not met."""
    if goal.max_bytes is not None:
        value = entry["peak_extra_bytes"]
        met = value is not None and value < goal.max_bytes
    else:
        ratio = entry["times_as_fast_as"].get(goal.baseline)
        value = None if ratio is None else ratio["median"]
        met = value is not None and value >= goal.at_least
    return {
        **dataclasses.asdict(goal),
        "threads": case["threads"],
        "value": value,
        "met": met and entry["status"] == "measured",
    }


def goal_table(verdicts: list[dict[str, Any]]) -> Table:
    """Every goal with what was measured."""
    table = Table(title="goals", title_justify="left")
    for heading in ("operation", "shape", "threads", "goal", "measured", ""):
        table.add_column(heading)
    for verdict in verdicts:
        if verdict["max_bytes"] is not None:
            goal, form, scale = f"< {verdict['max_bytes'] / 1e6:.0f} MB", ".1f", 1e-6
        else:
            goal, form, scale = f">= {verdict['at_least']:g} x {verdict['baseline']}", ".2f", 1.0
        value = None if verdict["value"] is None else verdict["value"] * scale
        state = "[green]met[/green]" if verdict["met"] else "[red]missed[/red]"
        table.add_row(
            verdict["operation"], verdict["shape"], str(verdict["threads"]), goal, _number(value, form) or "none", state
        )
    return table
