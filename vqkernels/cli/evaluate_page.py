"""The page of `vqkernels evaluate`: one HTML file without anything from outside, the pictures inside it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vqkernels.models.evaluation_report import CROP, EvaluationReport, Example, Figure
from vqkernels.profiling.markup import facts, paragraph, section, table, whole_page
from vqkernels.profiling.style import STYLE
from vqkernels.profiling.units import count

from .evaluate_figures import histogram, usage_curve

AMPLIFICATION = 4  # of the difference
MOST_NAMED = 50  # skipped files on the page; evaluation.json has all

PAGE_STYLE = f"""{STYLE}
.cards {{ grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); }}
.example {{ margin: 22px 0 0; }}
.example figcaption {{ display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 16px;
  margin: 0 0 8px; }}
.example figcaption b {{ font-weight: 600; overflow-wrap: anywhere; }}
.example figcaption span {{ color: var(--soft); font-variant-numeric: tabular-nums; }}
.row {{ display: grid; gap: 10px; grid-template-columns: repeat(4, minmax(0, 1fr)); }}
.row.three {{ grid-template-columns: repeat(3, minmax(0, 1fr)); }}
.row.many {{ grid-template-columns: repeat(5, minmax(0, 1fr)); }}
.row div {{ min-width: 0; }}
.row img {{ display: block; width: 100%; height: auto; aspect-ratio: 1; border-radius: 6px; background: var(--line); }}
.row img.pixels {{ image-rendering: pixelated; }}
.row span {{ display: block; color: var(--soft); font-size: 13.5px; margin-top: 4px; }}
.mean {{ stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 4; }}
.curve {{ fill: none; stroke: var(--accent); stroke-width: 2.5; stroke-linejoin: round; }}
.curve-1 {{ stroke: var(--gather); }}
.curve-2 {{ stroke: var(--backward); }}
.scroll + p {{ margin-top: 12px; }}
ul.notes {{ margin: 8px 0 0; padding: 0 0 0 20px; }}
ul.notes li {{ margin: 4px 0; }}
@media (max-width: 640px) {{
  .row, .row.three, .row.many {{ grid-template-columns: 1fr 1fr; }}
  .cards {{ grid-template-columns: 1fr 1fr; }}
}}
"""


def _picture(image: Image.Image, described: str, kind: str = "") -> str:
    """An image inside the page, without loss."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    chosen = f' class="{kind}"' if kind else ""
    return (
        f'<img{chosen} width="{image.width}" height="{image.height}" alt="{escape(described)}" '
        f'src="data:image/png;base64,{data}">'
    )


def _levels(
    pixels: Tensor,  # uint8 [3, S, S]
) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def difference(
    image: Tensor,  # uint8 [3, S, S]
    reconstruction: Tensor,  # uint8 [3, S, S]
) -> Tensor:  # uint8 [3, S, S]
    """How far the two lie apart, amplified."""
    apart = (image.int() - reconstruction.int()).abs() * AMPLIFICATION
    return apart.clamp(max=255).to(torch.uint8)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# The top


def _card(name: str, value: str, note: str) -> str:
    return f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="note">{escape(note)}</dd></div>'


def _figure_card(figure: Figure) -> str:
    unit = f" {figure.kind.unit}" if figure.kind.unit and figure.value is not None else ""
    error = "" if figure.standard_error is None else f"± {_number(figure.standard_error, figure.kind.digits)}"
    arrow = {"higher": "↑", "lower": "↓"}[figure.kind.better]
    note = figure.missing or error or f"{figure.kind.better} is better"
    return _card(f"{figure.kind.label} {arrow}", figure.text() + unit, note)


def _cards(report: EvaluationReport) -> str:
    cards = [_figure_card(figure) for figure in report.figures.values()]
    if report.codes is None:
        cards.append(_card("Codes", "-", "there were none to count"))
    else:
        maps = report.codes.maps
        for number, use in enumerate(maps):
            which = f", map {number + 1}" if len(maps) > 1 else ""
            cards.append(_card(f"Codes used{which}", f"{100 * use.usage:.1f} %", f"{use.used} of {use.codebook_size}"))
            cards.append(
                _card(f"Perplexity{which}", f"{use.perplexity:.1f}", f"{use.rows} × {use.columns} codes a picture")
            )
        entropy = f"{report.codes.entropy_bits_per_pixel:.4f} entropy coded"
        cards.append(_card("Bits per pixel", f"{report.codes.bits_per_pixel:.4f}", entropy))
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _header(report: EvaluationReport) -> str:
    number, size = len(report.files), report.options.image_size
    pictures = f"{count(number)} picture{'s' * (number != 1)}"
    found = [figure for figure in report.figures.values() if figure.value is not None]
    lead = ", ".join(f"{figure.kind.label} {figure.text()} {figure.kind.unit}".rstrip() for figure in found)
    source = (
        f"Centre crops of {size} × {size} pixels. Model {report.model['fingerprint']}, "
        f"{count(int(report.model['parameters']))} parameters. Every number on this page was measured in this run."
    )
    title = f'<span>{escape(str(report.model["class"]))}</span> <span class="x">on</span> <span>{pictures}</span>'
    return (
        f'<header><p class="kicker">vqkernels evaluate</p><h1>{title}</h1>'
        f'<p class="lead">{escape(lead)}.</p><p class="source">{escape(source)}</p></header>'
    )


# Sections


def _warnings(report: EvaluationReport) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(each)}.</li>" for each in report.warnings)
    return section("warnings", "Before you compare", f'<ul class="notes">{items}</ul>')


def _example(example: Example, codes: Sequence[Tensor]) -> str:
    name = Path(example.file).name
    shown = [
        (_levels(example.image), "input", ""),
        (_levels(example.reconstruction), "reconstruction", ""),
        (_levels(difference(example.image, example.reconstruction)), f"difference × {AMPLIFICATION}", ""),
    ]
    for number, pixels in enumerate(codes):
        which = f" {number + 1}" if len(codes) > 1 else ""
        picture = Image.fromarray(pixels.numpy())
        shown.append((picture, f"codes{which}, {picture.width} × {picture.height}", "pixels"))
    cells = "".join(
        f"<div>{_picture(picture, f'{title} of {name}', kind)}<span>{escape(title)}</span></div>"
        for picture, title, kind in shown
    )
    kind = {3: "row three", 4: "row"}.get(len(shown), "row many")
    broken = "not finite" if math.isnan(example.psnr) else f"{example.psnr:.2f} dB"
    psnr = "equal" if math.isinf(example.psnr) else broken
    caption = f'<figcaption><b title="{escape(example.file)}">{escape(name)}</b><span>{psnr}</span></figcaption>'
    return f'<figure class="example">{caption}<div class="{kind}">{cells}</div></figure>'


def _pictures(report: EvaluationReport, codes: Sequence[Sequence[Tensor]]) -> str:
    parts, worst = [], len(report.worst)
    if report.worst:
        whole = len(report.worst) == len(report.files)
        title = "All pictures, worst first" if whole else "Worst pictures"
        intro = "By PSNR."
        if report.worst[0].codes:
            intro += " A code has the same colour in all pictures of this page; like colours are codes that lie close."
        parts.append(section("worst", title, paragraph(intro), *map(_example, report.worst, codes[:worst])))
    if report.best:
        parts.append(section("best", "Best pictures", *map(_example, report.best, codes[worst:])))
    return "".join(parts)


def _spread(report: EvaluationReport) -> str:
    values = [value for value in report.per_image.get("psnr", []) if math.isfinite(value)]
    if not values:
        return ""
    left = len(report.files) - len(values)
    note = paragraph(f"{left} pictures whose PSNR is not finite are left out.", "quiet") if left else ""
    return section("spread", "How PSNR is spread", histogram(values, sum(values) / len(values)), note)


def _usage(report: EvaluationReport) -> str:
    if report.codes is None:
        return ""
    maps = report.codes.maps
    intro = (
        "How much of all tokens the most used codes hold: the nearer to the dashed line, the more evenly they are used."
    )
    rows = []
    for number, use in enumerate(maps):
        name = f"map {number + 1}" if len(maps) > 1 else "codes"
        cells = (count(use.tokens), f"{count(use.used)} of {count(use.codebook_size)}", f"{100 * use.usage:.2f} %")
        rows.append((name, *cells, f"{use.perplexity:.1f}", f"{use.entropy_bits:.3f}"))
    head = ("", "tokens", "used", "usage", "perplexity", "bits a token")
    few = [use for use in maps if use.tokens < 10 * use.codebook_size]
    sparse = "So few tokens for this codebook that usage and perplexity rise with the number of pictures."
    note = paragraph(sparse, "quiet") if few else ""
    chart = usage_curve([use.curve for use in maps])
    return section("codes", "How the codes are used", paragraph(intro), chart, table(head, rows), note)


def _figures(report: EvaluationReport) -> str:
    rows = []
    for figure in report.figures.values():
        kind = figure.kind
        name = f"{kind.label}, {kind.unit}" if kind.unit else kind.label
        numbers = (figure.standard_error, figure.median, figure.minimum, figure.maximum)
        cells = (_number(value, kind.digits) for value in numbers)
        rows.append((escape(name), figure.text(), *cells, count(figure.images) if figure.value is not None else "-"))
    head = ("figure", "mean", "± standard error", "median", "lowest", "highest", "pictures")
    words = [(escape(figure.kind.label), escape(figure.kind.convention)) for figure in report.figures.values()]
    pixels = {
        "uint8": "reconstructions are clamped and rounded to 8 bits before anything is compared, as a saved picture is",
        "float": "reconstructions are clamped, and not rounded before they are compared",
    }[report.options.pixels]
    words += [("pictures", escape(CROP)), ("pixels", escape(pixels))]
    missing = [f"{each.kind.label} {each.missing}" for each in report.figures.values() if each.missing]
    note = paragraph("Not measured: " + "; ".join(missing) + ".", "quiet") if missing else ""
    return section("figures", "Figures", table(head, rows), note, "<h3>How they are measured</h3>", facts(words))


def _skipped(report: EvaluationReport) -> str:
    if not report.skipped:
        return ""
    rows = [(escape(str(file)), escape(reason)) for file, reason in report.skipped[:MOST_NAMED]]
    left = len(report.skipped) - len(rows)
    note = paragraph(f"... and {left} more, in evaluation.json.", "quiet") if left else ""
    return section("skipped", f"Skipped: {len(report.skipped)} of the files", facts(rows), note)


def _run(report: EvaluationReport, versions: dict[str, str]) -> str:
    options = report.options
    given = [(name, f"{found['file']}, SHA-256 {found['sha256']}") for name, found in report.weights.items()]
    rows = [
        ("model", f"{report.model['class']}, {report.model['source']}"),
        ("fingerprint", str(report.model["fingerprint"])),
        ("device", f"{report.device}, {report.seconds:.1f} s, {options.batch_size} pictures at a time"),
        *given,
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return section("run", "Model and versions", facts((name, escape(fact)) for name, fact in rows))


def render(report: EvaluationReport, codes: Sequence[Sequence[Tensor]], versions: dict[str, str]) -> str:
    """The page of a report.

    Args:
        report: with ``source`` in its model, where the model was taken from.
        codes: coloured maps, uint8 [h, w, 3] each, of the worst examples and then of the best; none without codes.
        versions: of the packages that took part.
    """
    top = _header(report) + _cards(report) + _warnings(report)
    middle = _pictures(report, codes) + _spread(report) + _usage(report)
    body = top + middle + _figures(report) + _skipped(report) + _run(report, versions)
    title = f"{report.model['class']} on {len(report.files)} pictures, vqkernels evaluate"
    footer = f"Written by vqkernels {versions['vqkernels']}; evaluation.json beside this page holds the same numbers."
    return whole_page(title, body, footer, PAGE_STYLE)
