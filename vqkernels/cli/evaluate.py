"""`vqkernels evaluate`: a model on many images, as a table, a page and JSON."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from vqkernels._version import __version__
from vqkernels.models import EvaluationOptions, EvaluationReport, ImageModel, evaluate_files
from vqkernels.models.checkpoint import write_text_atomically
from vqkernels.models.levels import CodedModel
from vqkernels.models.pictures import code_colours
from vqkernels.models.quantizer import code_table

from .evaluate_page import render
from .loading import choose_device, collect_images, load_model, report_skipped
from .options import EvaluateConfig
from .terminal import make_console, make_table, meter, quiet_libraries

NO_CODE = (255, 255, 255)  # colour of a token that was not finite
PAGE, NUMBERS = "report.html", "evaluation.json"


def _options(config: EvaluateConfig) -> EvaluationOptions:
    return EvaluationOptions(**{entry.name: getattr(config, entry.name) for entry in fields(EvaluationOptions)})


def code_pictures(
    model: ImageModel, report: EvaluationReport
) -> list[list[Tensor]]:  # uint8 [h, w, 3] for every map of every example
    """The coloured codes of the worst examples, then of the best: one colour for a code in all of them."""
    shown = [*report.worst, *report.best]
    if not isinstance(model, CodedModel) or not shown:
        return [[] for _ in shown]
    device, columns = next(model.parameters()).device, []
    for number, each in enumerate(model.maps.values()):
        codes = torch.stack([example.codes[number] for example in shown])  # [n, h, w]
        places, table = code_table(each.quantizer, codes.clamp_min(0).to(device))
        colours = code_colours(table)[places]  # [n, h, w, 3]
        colours[codes < 0] = torch.tensor(NO_CODE, dtype=torch.uint8)
        columns.append(colours)
    return [list(row) for row in zip(*columns, strict=True)]


def _versions() -> dict[str, str]:
    import numpy
    import PIL

    return {"vqkernels": __version__, "torch": torch.__version__, "numpy": numpy.__version__, "pillow": PIL.__version__}


def _rows(report: EvaluationReport) -> list[tuple[str, str, str, str]]:
    rows = []
    for figure in report.figures.values():
        unit = f", {figure.kind.unit}" if figure.kind.unit else ""
        error = "" if figure.standard_error is None else f"± {figure.standard_error:.{figure.kind.digits}f}"
        rows.append(
            (figure.kind.label + unit, figure.text(), error, figure.missing or f"{figure.kind.better} is better")
        )
    if report.codes is None:
        return [*rows, ("codes used", "-", "", "there were no codes to count")]
    for number, use in enumerate(report.codes.maps):
        which = f", map {number + 1}" if len(report.codes.maps) > 1 else ""
        rows.append((f"codes used{which}", f"{100 * use.usage:.2f} %", "", f"{use.used} of {use.codebook_size}"))
        rows.append((f"perplexity{which}", f"{use.perplexity:.1f}", "", f"{use.rows} x {use.columns} codes a picture"))
    entropy = f"{report.codes.entropy_bits_per_pixel:.4f} entropy coded"
    return [*rows, ("bits per pixel", f"{report.codes.bits_per_pixel:.4f}", "", entropy)]


def _print(console: Console, report: EvaluationReport, folder: Path) -> None:
    number, size = len(report.files), report.options.image_size
    title = f"{report.model['class']} on {number} picture{'s' * (number != 1)} of {size} x {size}"
    table = make_table(title, ("figure", "value", "standard error", "note"), [])
    table.columns[-1].justify = "left"
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    report_skipped(console, report.skipped)
    for warning in report.warnings:
        console.print(f"note: {warning}", markup=False, soft_wrap=True)
    console.print(f"report in {folder / PAGE}, numbers in {folder / NUMBERS}", markup=False, soft_wrap=True)


def run(config: EvaluateConfig) -> None:
    """Measures, writes both files and prints the figures."""
    console, device, folder, options = (
        make_console(),
        choose_device(config.device),
        Path(config.output),
        _options(config),
    )
    model, files = load_model(config.model, device), collect_images(config.images)
    with quiet_libraries(), meter(console, "evaluating") as bar:
        report = evaluate_files(
            model, files, options, progress=lambda done, of: bar.update(done / of, f"{done} of {of} pictures")
        )
    report, versions = replace(report, model={**report.model, "source": config.model}), _versions()
    folder.mkdir(parents=True, exist_ok=True)
    document = {**report.document(), "versions": versions}
    write_text_atomically(folder / NUMBERS, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text_atomically(folder / PAGE, render(report, code_pictures(model, report), versions))
    _print(console, report, folder)
