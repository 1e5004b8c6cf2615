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
from .peaks import Peaks
from .problem import BYTES_FORMULA, FLOPS_FORMULA, Problem
from .providers import Provider
from .runner import Timing, quartiles, ratios

SCHEMA = 2
# what became of a provider: right and measured; wrong codes but measured; ours with wrong codes, so no time; the rest
PEAKS_SHOWN = {"int16": "int16", "float32": "fp32", "sgemm": "sgemm"}
STATES = ("measured", "wrong", "refused", "unavailable", "failed")


def new_entry(provider: Provider) -> dict[str, Any]:
    """One provider's part of a case, before anything is known."""
    return {
        "provider": provider.name,
        "ours": provider.ours,
        "yardstick": provider.yardstick,
        "note": provider.note,
        "status": "measured",
        "reason": None,
        "checked": None,
        "wrong": None,
        "inertia": None,
        "median_ms": None,
        "p25_ms": None,
        "p75_ms": None,
        "min_ms": None,
        "rounds": None,
        "calls_per_round": None,
        "times_as_fast_as": {},
        "gflops": None,
        "percent_of_peak": {},
        "search": None,
        "gbytes_per_second": None,
        "peak_extra_bytes": None,
        "peak_extra_method": None,
    }


def add_verdict(entry: dict[str, Any], verdict: Verdict) -> None:
    """Ours with a wrong code is refused, unless it is a yardstick; anybody else is marked."""
    entry["checked"], entry["wrong"], entry["inertia"] = verdict.checked, verdict.wrong, verdict.inertia
    if verdict.wrong:
        refused = entry["ours"] and not entry["yardstick"]
        entry["status"] = "refused" if refused else "wrong"
        rate = f"{verdict.wrong} of {verdict.checked} wrong ({100 * verdict.error_rate:.2g} %)"
        entry["reason"] = f"{rate}; no time is shown" if refused else rate


def add_timing(entry: dict[str, Any], timing: Timing, problem: Problem, peaks: Peaks) -> None:
    """Median, spread and rates of one provider; the peaks of integers are only for those whose coarse pass has some.

    The passes of bytes are held against int16's peak too, which they may pass: of numbers as precise as one of theirs
    (int8), or of what decides the tokens that one leaves (byte).
    """
    low, high = timing.quartiles()
    entry["median_ms"], entry["min_ms"] = timing.median * 1e3, min(timing.samples) * 1e3
    entry["p25_ms"], entry["p75_ms"] = low * 1e3, high * 1e3
    entry["rounds"], entry["calls_per_round"] = len(timing.samples), timing.calls
    entry["gbytes_per_second"] = problem.bytes / timing.median / 1e9
    if problem.flops is not None:
        entry["gflops"] = problem.flops / timing.median / 1e9
        coarse = (entry["search"] or {}).get("coarse_pass")
        beside = {"sgemm", "float32", coarse} | ({"int16"} if coarse in ("byte", "int8") else set())
        names = [name for name in peaks.rates if name in beside]
        entry["percent_of_peak"] = {name: peaks.percent(name, problem.flops, timing) for name in names}


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
        "codebook": config.codebook,
        "gradient": config.gradient if problem.operation == "train-step" else None,
        "seed": config.seed,
        "flops": problem.flops,
        "flops_formula": FLOPS_FORMULA[problem.operation],
        "bytes": problem.bytes,
        "bytes_formula": BYTES_FORMULA[problem.operation],
        "peak_gflops": {},
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
        *(_number(entry["percent_of_peak"].get(name), ".0f") for name in PEAKS_SHOWN),
        _number(None if entry["percent_of_peak"] else entry["gbytes_per_second"], ".1f"),
        _number(None if peak is None else peak / 1e6, ".1f"),
    ]


def _is_shown(entry: dict[str, Any]) -> bool:
    """Whether there is any number for the table; the others get a line below it."""
    return entry["median_ms"] is not None or entry["peak_extra_bytes"] is not None


def case_title(case: dict[str, Any]) -> str:
    """What was run, in one line."""
    shape = case["shape"]
    name = f" ({shape['name']})" if shape["name"] else ""
    changing = ", changing codebook" if case["codebook"] == "changing" else ""
    how = f"{case['dtype']}, {case['data']}{changing}, {case['device']}, {case['threads']} thread(s)"
    return f"{case['operation']}  N={shape['N']} K={shape['K']} D={shape['D']}{name}  {how}"


def case_table(case: dict[str, Any]) -> Table:
    """One case for the terminal, fastest first; columns that nobody fills are left out, and JSON has more."""
    shown = sorted(filter(_is_shown, case["entries"]), key=lambda entry: entry["median_ms"] or 0.0)
    rows = [_row(entry, case["baselines"]) for entry in shown]
    against = ["vs\n" + name.removeprefix("vqkernels-").replace("-", "-\n") for name in case["baselines"]]
    headings = ["", "wrong", "ms", "spread", *against, *(f"%\n{short}" for short in PEAKS_SHOWN.values()), "GB/s", "MB"]
    filled = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in rows)]
    return narrow_table([headings[i] for i in filled], [[row[i] for i in filled] for row in rows], folding=0)


def narrow_table(headings: list[str], rows: list[list[str]], *, folding: int) -> Table:
    """A table of which only the column ``folding`` gives way to a narrow terminal; numbers stay whole."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, heading in enumerate(headings):
        widths = [len(line) for cell in [heading, *(row[i] for row in rows)] for line in cell.split("\n")]
        right = i > 0 and all(row[i][:1] in ("", *"0123456789") for row in rows)
        least = None if i == folding else max(widths)
        table.add_column(heading, justify="right" if right else "left", min_width=least, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def case_remarks(case: dict[str, Any]) -> str:
    """What the table cannot say: the peak of the run, who is wrong, who could not take part and why."""
    lines = [_work(case)]
    if case["peak_gflops"] and case["flops"]:
        peaks = ", ".join(f"{name} {rate:.0f}" for name, rate in case["peak_gflops"].items())
        lines.append(f"peaks of this run, GFLOP/s: {peaks}; a percentage is the median over rounds")
    lines += [f"{e['provider']}: {_search_line(e['search'])}" for e in case["entries"] if e["search"]]
    lines += [
        f"{e['provider']}: inertia {e['inertia']:.6f} of the plain form's" for e in case["entries"] if e["inertia"]
    ]
    if case["baselines"]:
        lines.append("vs: how many times as fast; the median over rounds of its time over theirs")
    lines += [f"! {e['provider']}: {e['reason']}" for e in case["entries"] if e["status"] == "wrong"]
    absent = [e for e in case["entries"] if e["status"] not in ("measured", "wrong")]
    lines += [f"- {e['provider']}: {e['status']}: {e['reason']}" for e in absent]
    return "\n".join(f"  {line}" for line in lines)


def _work(case: dict[str, Any]) -> str:
    """Bytes and FLOPs by formula."""
    flops = f"{case['flops'] / 1e9:.3g} GFLOP = {case['flops_formula']}; " if case["flops"] else ""
    return f"{flops}{case['bytes'] / 1e6:.3g} MB = {case['bytes_formula']}"


def _search_line(search: dict[str, Any]) -> str:
    where = f"{search['coarse_pass']} coarse pass on {search['instruction_set']}"
    left = f"{search['candidates']:.3g} granules left a token, {search['scanned']} tokens scanned in float64"
    if search["coarse_pass"] == "byte":
        left += f", {search['refined']} left to the finer pass"
    return f"{where}: {search['certified_percent']:.1f} % certified, {left}"
