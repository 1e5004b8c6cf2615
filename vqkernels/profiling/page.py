"""The report as one HTML file without anything from outside: no script, no font, no picture of its own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from .advice import headline, hints
from .figures import NARROW, WIDE, roofline, single_bar, stacked_bar
from .markup import facts, paragraph, section, table, whole_page
from .style import STYLE
from .units import count, digits, percent, scaled, seconds

WORDS = {
    "prepare": "the codebook is scaled, rounded and packed for the coarse pass; not again while it is unchanged",
    "tokens": "the tokens are read, scaled, rounded and packed",
    "coarse": "the low-precision pass: a score for every token and code, of which only the best are kept",
    "rerank": "the codes that the coarse pass's error bound leaves open are scored in float64",
    "scan": "tokens that no bound can decide are compared with all codes in float64",
    "other": "what is left of the call: Python, dispatch, outputs, and threads that waited for the slowest",
    "search": "the whole call of the search, where it was not seen from inside",
    "gather": "the chosen codebook rows and their squared distance to the tokens",
    "losses": "the mean of those distances",
    "statistics": "tokens per code and their sum, for the moving averages",
    "ema": "the moving averages and the codebook that follows from them",
    "backward": "the gradient for the tokens",
    "rest": "everything else in the step: network, optimizer, data",
    "certified": "decided by the coarse pass alone: its error bound proves which group of codes holds the nearest one",
    "candidates": "mean number of code groups per token inside the bound, the best included",
    "roof": "the most that the machine allows a kernel: its arithmetic peak, or memory bandwidth times its operations "
    "per byte, whichever is less",
}


# The top


def _cards(document: dict[str, Any]) -> str:
    search, kernel, memory = document["search"], document["kernels"]["search"], document["memory"]
    low, high = search["quartiles"]
    rate = scaled(document["subject"]["tokens"] / search["seconds"], "")
    entries = [("Search", seconds(search["seconds"]), f"half of the samples lie in {seconds(low)} to {seconds(high)}")]
    entries.append(("Tokens a second", rate, scaled(kernel["flops_per_second"], "FLOP/s")))
    inside, training = search["unchanged"], document.get("training")
    if inside:
        note = f"{digits(inside['candidates_per_token'])} candidates a token"
        entries.append(("Certified at once", percent(inside["certified_share"]), note))
    if memory["ours_bytes"] is not None:
        note = f"{scaled(memory['scores_bytes'], 'B')} for the N × K scores"
        entries.append(("Extra memory", scaled(memory["ours_bytes"], "B"), note))
    if training:
        note = f"of {seconds(training['step_seconds'])} a step"
        entries.append(("Quantizer in training", percent(training["quantizer_share"]), note))
    cells = (f'<div><dt>{name}</dt><dd>{value}</dd><dd class="note">{note}</dd></div>' for name, value, note in entries)
    return f'<dl class="cards">{"".join(cells)}</dl>'


def _header(document: dict[str, Any]) -> str:
    subject, times = document["subject"], '<span class="x">×</span>'
    numbers = (count(subject["tokens"]), "tokens"), (count(subject["codes"]), "codes"), (subject["dim"], "dimensions")
    sizes = [f"{number} {unit}" for number, unit in numbers]
    title = "".join(f"<span>{size} {times}</span> " for size in sizes[:-1]) + f"<span>{sizes[-1]}</span>"
    machine = document["machine"]["gpu"] if subject["device"] != "cpu" else document["machine"]["cpu"]
    threads = f", {subject['threads']} thread{'s' * (subject['threads'] > 1)}" if subject["threads"] else ""
    where = f"{machine}{threads}, {subject['dtype']}, {subject['metric']}, {subject['precision']}"
    return (
        f'<header><p class="kicker">vqkernels profile</p><h1>{title}</h1>'
        f'<p class="lead">{escape(headline(document))}.</p>'
        f'<p class="source">{escape(where)}. Data: {escape(subject["source"])}.</p></header>'
    )


# Sections


def _legend(parts: Mapping[str, float]) -> str:
    total = sum(parts.values()) or 1.0
    items = (
        f'<li title="{escape(WORDS.get(name, ""))}"><i class="c-{_colour(name)}"></i><span>{escape(name)}</span>'
        f'<span>{seconds(value)}</span><span class="share">{percent(value / total)}</span></li>'
        for name, value in parts.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _colour(name: str) -> str:
    return {"quantizer forward": "coarse", "quantizer backward": "backward", "codebook update": "ema"}.get(name, name)


def _bar(title: str, parts: Mapping[str, float]) -> str:
    total = sum(parts.values())
    described = ", ".join(f"{name} {percent(value / (total or 1))}" for name, value in parts.items())
    bar = stacked_bar({_colour(name): value for name, value in parts.items()}, f"{title}: {described}")
    return f"<h3>{escape(title)} <span>{seconds(total)}</span></h3>{bar}{_legend(parts)}"


def _stages(document: dict[str, Any]) -> str:
    search, training, bars = document["search"], document.get("training"), []
    if search["unchanged"]:
        bars.append(_bar("One search, codebook unchanged since the last", search["unchanged"]["stages"]))
    else:
        bars.append(paragraph(f"The search is shown whole: {search['not_seen_because']}.", "quiet"))
    bars.append(_bar("One training step of the quantizer, codebook changed", document["step"]["stages"]))
    if training:
        bars.append(_bar("One training step of the whole model", training["parts"]))
    intro = "Wall time. Each stage of the search is the time of all its threads divided by their number."
    return section("stages", "Where the time goes", paragraph(intro), *bars)


def _roofline(document: dict[str, Any]) -> str:
    intro = (
        "Each point is a kernel: to the right the more it computes per byte, upwards the faster it runs. The lines are "
        "the most this machine allows, measured in the same run; the percentage is the share of it that is reached."
    )
    cache = "The dashed line is the second-level cache. A kernel above 100 % found its data in a cache."
    notes = paragraph(cache, "quiet") if document["peaks"]["cache_bandwidth"] else ""
    charts = roofline(document, WIDE) + roofline(document, NARROW)
    return section("roofline", "How near to the machine's limit", paragraph(intro), charts, notes)


def _kernels(document: dict[str, Any]) -> str:
    rows = [
        (
            name,
            seconds(kernel["seconds"]),
            scaled(kernel["flops_per_second"], "FLOP/s"),
            scaled(kernel["bytes_per_second"], "B/s"),
            digits(kernel["intensity"]),
            escape(kernel["ceiling"]),
            percent(kernel["share_of_roof"]),
        )
        for name, kernel in document["kernels"].items()
    ]
    head = ("kernel", "time", "arithmetic", "memory", "FLOP/byte", "limit", "reached")
    words = [
        (name, f"FLOP = {escape(kernel['flops_formula'])}<br>bytes = {escape(kernel['bytes_formula'])}")
        for name, kernel in document["kernels"].items()
    ]
    formulas = "<h3>Operations and bytes</h3>" + facts(words)
    meaning = (
        "N tokens, K codes, D dimensions, s bytes of a number. A multiply-add counts as two operations; bytes are the "
        "least that must be read and written once."
    )
    return section("kernels", "Kernels", table(head, rows), formulas, paragraph(meaning, "quiet"))


def _memory(document: dict[str, Any]) -> str:
    memory, rows = document["memory"], []
    entries = [
        ("this search, measured", memory["ours_bytes"], "ours", f"peak beyond its inputs ({memory['ours_method']})"),
        ("scores of every pair", memory["scores_bytes"], "theirs", memory["scores_formula"]),
        ("and one-hot for EMA", memory["one_hot_bytes"], "theirs", memory["one_hot_formula"]),
    ]
    most = max(value for _, value, _, _ in entries if value is not None)
    for name, value, kind, note in entries:
        size = scaled(value, "B") if value is not None else "not measured"
        bar = single_bar(value / most, kind, f"{name}: {size}") if value is not None else ""
        rows.append(f'<h3>{name} <span>{size}</span></h3>{bar}<span class="quiet">{escape(note)}</span>')
    inputs = f"Tokens and codebook themselves take {scaled(memory['inputs_bytes'], 'B')}."
    return section("memory", "Memory beside the unfused form", paragraph(inputs), *rows)


def _certificate(document: dict[str, Any]) -> str:
    inside, use = document["search"]["unchanged"], document["code_use"]
    rows = []
    if inside:
        tokens, reranked = max(inside["tokens"], 1), inside["codes_reranked"]
        certified = f"{count(inside['certified'])} of {count(tokens)} tokens, {percent(inside['certified_share'])}"
        rows = [
            ("coarse pass", f"{inside['coarse_pass']} on {inside['instruction_set']}"),
            ("certified", certified),
            ("candidates", f"{digits(inside['candidates_per_token'], 4)} code groups per token"),
            ("reranked", f"{count(reranked)} codes scored in float64, {digits(reranked / tokens)} per token"),
            ("full scan", f"{count(inside['scanned'])} tokens"),
        ]
    used = f"{count(use['codes_used'])} of {count(document['subject']['codes'])}, {percent(use['usage'])}"
    rows += [("codes used", used), ("perplexity", digits(use["perplexity"], 4))]
    exact = (
        "Every code is the exact nearest one, the lowest index on ties. The coarse pass proves most tokens; the others "
        "are decided in float64."
    )
    fast = "Precision is fast: a code may be farther than the nearest by the rounding of float32 scores."
    intro = exact if document["subject"]["precision"] == "exact" else fast
    return section("exactness", "Certificate and code use", paragraph(intro), facts(rows))


def _training(document: dict[str, Any]) -> str:
    training = document.get("training")
    if not training:
        return ""
    low, high = map(seconds, training["quartiles"])
    rows = [
        ("config", escape(training["config"])),
        ("pictures", escape(training["pictures"])),
        ("batch", escape(training["batch"])),
        ("step", f"{seconds(training['step_seconds'])}; half of the {training['steps']} steps lie in {low} to {high}"),
        ("quantizer", f"{seconds(training['quantizer_seconds'])}, {percent(training['quantizer_share'])} of the step"),
    ]
    intro = (
        "Steps of vqkernels train itself; the first ones, which allocate and place the first codebook, are left out. "
        "Forward and backward of the quantizer hold its search, lookup, losses, statistics and projections."
    )
    return section("training", "Share of the training step", paragraph(intro), facts(rows))


def _advice(document: dict[str, Any]) -> str:
    items = "".join(f"<li><b>{escape(what)}</b>{escape(help_)}</li>" for what, help_ in hints(document))
    return section("advice", "What limits it, and what to do", f'<ol class="hints">{items}</ol>')


def _machine(document: dict[str, Any]) -> str:
    machine, peaks, subject = document["machine"], document["peaks"], document["subject"]
    rates = ", ".join(f"{name} {scaled(rate, 'FLOP/s')}" for name, rate in peaks["rates"].items())
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['isa'])}"),
        ("GPU", machine["gpu"] or "none"),
        ("memory", scaled(machine["memory_bytes"], "B") if machine["memory_bytes"] else "unknown"),
        ("system", machine["system"]),
        ("load before", "unknown" if machine["load_before"] is None else f"{machine['load_before']:.1f} processes"),
        ("versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items())),
        ("commit", document["commit"] or "not a checkout"),
        ("backends", ", ".join(f"{op}: {backend}" for op, backend in subject["backends"].items())),
        ("peaks", f"{rates} ({peaks['method']['rates']})"),
        ("bandwidth", f"{scaled(peaks['bandwidth'], 'B/s')} ({peaks['method']['bandwidth']})"),
    ]
    if peaks["cache_bandwidth"]:
        rows.append(("cache", f"{scaled(peaks['cache_bandwidth'], 'B/s')} ({peaks['method']['cache_bandwidth']})"))
    return section("machine", "Machine and versions", facts((name, escape(fact)) for name, fact in rows))


def _words() -> str:
    rows = [(name, escape(meaning)) for name, meaning in WORDS.items()]
    return section("words", "Words", facts(rows))


def _operators(document: dict[str, Any]) -> str:
    trace = document["trace"]
    rows = [(escape(row["name"]), str(row["calls"]), seconds(row["seconds"])) for row in trace["operators"]]
    intro = (
        f"{trace['file']} beside this page holds {trace['of']}; ui.perfetto.dev shows it. Its most expensive "
        "operators, each without what it calls:"
    )
    return section("trace", "Trace", paragraph(intro), table(("operator", "calls", "time"), rows))


def render(document: dict[str, Any]) -> str:
    """The page of a document of ``measure_subject``, with ``memory``, ``trace`` and ``training`` (or None) beside."""
    subject = document["subject"]
    title = f"{subject['tokens']} x {subject['codes']} x {subject['dim']}, vqkernels profile"
    parts = (_header, _cards, _advice, _stages, _roofline, _kernels, _certificate, _memory, _training, _operators)
    body = "".join(part(document) for part in parts) + _machine(document) + _words()
    version = document["versions"].get("vqkernels", "")
    footer = f"Written by vqkernels {version}; report.json beside this page holds the same numbers."
    return whole_page(title, body, footer, STYLE)
