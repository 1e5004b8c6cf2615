"""The report as one HTML file without anything from outside: no script, no font, no picture of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .advice import headline, hints
from .figures import NARROW, WIDE, roofline, single_bar, stacked_bar
from .markup import facts, paragraph, section, table, whole_page
from .style import STYLE, colour
from .units import count, digits, percent, scaled, seconds

GENERAL = {
    "certified": "decided by the coarse pass alone: its error bound proves which group of codes holds the nearest one",
    "candidates": "mean number of code groups per token inside the bound, the best included",
    "roof": "the most that the machine allows a kernel: its arithmetic peak, or memory bandwidth times its operations "
    "per byte, whichever is less",
}
MOST_ROUNDS = 20  # rows of k-means
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
    "sampling": "codes drawn from the softmax over the codebook, in place of the search",
    "codebook gradient": "the gradient of the codebook loss for the codes",
    "propagation": "the gradient for the tokens and for every code, through the softmax over the codebook",
    "entropy forward": "the entropy loss: two walks over all codes, for the softmax of each token and for their mean",
    "entropy backward": "its gradient; the softmax is computed again, as it was never written down",
    "quantizer forward": "search, lookup, losses, statistics and projections",
    "quantizer backward": "from the gradient of the quantized tokens to that of the encoder's output",
    "codebook update": "the statistics of the step before become the codebook",
    "start": "the first centroids: candidates drawn from the tokens, and K of these chosen (k-means||)",
    "assignment": "a search with centroids that have moved since the last",
    "sums": "tokens, distances and their number, by centroid",
    "update": "means, and a place beside the centroid with the largest inertia for each that has no token",
    "last pass": "assignment and sums once more, for codes, counts and inertia at the final centroids",
    "rest": "everything else in the step: network, optimizer, data",
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
    stages = document["step"]["stages"]
    if "entropy forward" in stages:
        entropy = stages["entropy forward"] + stages["entropy backward"]
        note = f"{percent(entropy / document['step']['seconds'])} of a step of the quantizer"
        entries.append(("Entropy loss", seconds(entropy), note))
    if document.get("kmeans"):
        note = f"{document['kmeans']['iterations']} iterations and the start"
        entries.append(("k-means", seconds(document["kmeans"]["seconds"]), note))
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
        f'<li title="{escape(WORDS.get(name, ""))}"><i class="c-{colour(name)}"></i><span>{escape(name)}</span>'
        f'<span>{seconds(value)}</span><span class="share">{percent(value / total)}</span></li>'
        for name, value in parts.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _bar(title: str, parts: Mapping[str, float]) -> str:
    total = sum(parts.values())
    described = ", ".join(f"{name} {percent(value / (total or 1))}" for name, value in parts.items())
    bar = stacked_bar(parts, f"{title}: {described}")
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
    if document.get("kmeans"):
        iterations = document["kmeans"]["iterations"]
        bars.append(_bar(f"k-means, {iterations} iteration{'s' * (iterations > 1)}", document["kmeans"]["stages"]))
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


def _memory_bars(entries: Sequence[tuple[str, int | None, str, str]]) -> list[str]:
    """Names, bytes, kinds and notes, the largest as wide as the page."""
    most, rows = max(value for _, value, _, _ in entries if value is not None), []
    for name, value, kind, note in entries:
        size = scaled(value, "B") if value is not None else "not measured"
        bar = single_bar(value / most, kind, f"{name}: {size}") if value is not None else ""
        rows.append(f'<h3>{name} <span>{size}</span></h3>{bar}<span class="quiet">{escape(note)}</span>')
    return rows


def _memory(document: dict[str, Any]) -> str:
    memory, entropy = document["memory"], document["memory"]["entropy"]
    one_hot = [("and one-hot for EMA", *_theirs(memory, "one_hot"))]
    rows = _memory_bars(
        [
            ("this search, measured", memory["ours_bytes"], "ours", _peak_note(memory)),
            ("scores of every pair", *_theirs(memory, "scores")),
            *(one_hot if document["subject"]["update"] == "ema" else []),
        ]
    )
    if entropy:
        rows += _memory_bars(
            [
                ("entropy loss, forward and backward, measured", entropy["ours_bytes"], "ours", _peak_note(entropy)),
                ("probabilities of every pair", *_theirs(entropy, "probabilities")),
                ("and what autograd keeps", *_theirs(entropy, "autograd")),
            ]
        )
    inputs = f"Tokens and codebook themselves take {scaled(memory['inputs_bytes'], 'B')}."
    return section("memory", "Memory beside the unfused form", paragraph(inputs), *rows)


def _peak_note(part: Mapping[str, Any]) -> str:
    measured = part["ours_bytes"] is not None
    return f"peak beyond its inputs ({part['ours_method']})" if measured else part["ours_method"]


def _theirs(part: Mapping[str, Any], name: str) -> tuple[int, str, str]:
    return part[f"{name}_bytes"], "theirs", part[f"{name}_formula"]


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
            ("reranked", f"{count(reranked)} codes scored anew, {digits(reranked / tokens)} per token"),
            ("left to a finer pass", f"{count(inside['refined'])} tokens"),
            ("full scan", f"{count(inside['scanned'])} tokens"),
        ]
    used = f"{count(use['codes_used'])} of {count(document['subject']['codes'])}, {percent(use['usage'])}"
    rows += [("codes used", used), ("perplexity", digits(use["perplexity"], 4))]
    exact = (
        "Every code is the exact nearest one, the lowest index on ties. The coarse pass proves most tokens; the others "
        "are decided in float64."
    )
    fast = "Precision is fast: a code may be farther than the nearest by the rounding of float32 scores."
    product = "Every code is the one with the largest product in float32 arithmetic, the lowest index on ties."
    intro = exact if document["subject"]["precision"] == "exact" else fast
    intro = product if document["subject"]["metric"] == "dot" else intro
    return section("exactness", "Certificate and code use", paragraph(intro), facts(rows))


def _kmeans(document: dict[str, Any]) -> str:
    kmeans = document.get("kmeans")
    if not kmeans:
        return ""
    tokens, rounds = document["subject"]["tokens"], kmeans["rounds"]
    every = max(1, -(-len(rounds) // MOST_ROUNDS))
    rows = [
        (
            str(number + 1),
            *(seconds(each[name]) for name in ("assignment", "sums", "update")),
            digits(each["inertia"] / tokens, 5),
            count(each["without_tokens"]),
        )
        for number, each in enumerate(rounds)
        if number % every == 0 or number == len(rounds) - 1
    ]
    intro = (
        f"From {kmeans['init']}, {kmeans['metric']}. Inertia is the distance of the tokens to their centroids, here "
        "the mean of a token, before the centroids move; a centroid without tokens is placed beside the one with the "
        f"largest. At the end it is {digits(kmeans['inertia'] / tokens, 5)}."
    )
    head = ("iteration", "assignment", "sums", "update", "inertia", "without tokens")
    return section("kmeans", "k-means", paragraph(intro), table(head, rows))


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
    entropy = sum(each for name, each in training["parts"].items() if name.startswith("entropy"))
    if entropy:
        share = percent(entropy / training["step_seconds"])
        rows.append(("entropy loss", f"{seconds(entropy)} of it, {share} of the step"))
    intro = (
        "Steps of vqkernels train itself; the first ones, which allocate and place the first codebook, are left out. "
        "Forward and backward of the quantizer hold its search, lookup, losses, statistics and projections; an entropy "
        "loss has parts of its own."
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


def _words(document: dict[str, Any]) -> str:
    """Those that stand on the page."""
    search, training, kmeans = document["search"]["unchanged"], document.get("training"), document.get("kmeans")
    used = {*document["step"]["stages"], *document["kernels"], *(search["stages"] if search else ())}
    used |= {*(training["parts"] if training else ()), *(kmeans["stages"] if kmeans else ())}
    rows = [(name, escape(meaning)) for name, meaning in {**WORDS, **GENERAL}.items() if name in used | set(GENERAL)]
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
    parts = (
        _header,
        _cards,
        _advice,
        _stages,
        _roofline,
        _kernels,
        _certificate,
        _kmeans,
        _memory,
        _training,
        _operators,
    )
    body = "".join(part(document) for part in parts) + _machine(document) + _words(document)
    version = document["versions"].get("vqkernels", "")
    footer = f"Written by vqkernels {version}; report.json beside this page holds the same numbers."
    return whole_page(title, body, footer, STYLE)
