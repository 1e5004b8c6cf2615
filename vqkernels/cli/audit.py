"""`vqkernels audit`: how many codes bf16, TF32 and fp32 formulas get wrong on a user's own latents, and the cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vqkernels._version import __version__
from vqkernels.audit import Audit, FormResult, audit, verdict
from vqkernels.models.checkpoint import write_text_atomically

from .audit_inputs import Inputs, load_inputs, thinned
from .loading import choose_device
from .options import AuditConfig
from .terminal import make_console, make_table, meter, quiet_libraries

COLUMNS = ("search", "wrong codes", "of all", "MSE", "relative", "worst token", "codes used", "perplexity")


def _signed(value: float) -> str:
    return f"{value:+.2g}" if value else "0"


def _row(form: FormResult, result: Audit) -> tuple[str, ...]:
    relative = f"{100 * form.mse_increase / result.mse:+.2g}%" if result.mse > 0 and form.mse_increase else "0"
    return (
        form.name,
        str(form.wrong),
        f"{form.wrong / result.tokens:.2%}" if form.wrong else "0",
        _signed(form.mse_increase),
        relative if result.mse > 0 or not form.mse_increase else "-",
        _signed(form.worst_excess),
        f"{form.used}" + (f" ({form.used - result.used:+d})" if form.used != result.used else ""),
        f"{form.perplexity:.2f}",
    )


def _exact_row(result: Audit) -> tuple[str, ...]:
    return ("exact", "0", "0", f"{result.mse:.4g}", "", "", f"{result.used}", f"{result.perplexity:.2f}")


def _print(console: Console, result: Audit, inputs: Inputs) -> None:
    unit = "unit vectors, cosine" if result.metric == "cosine" else "euclidean"
    title = f"Audit of {result.tokens} tokens, {result.codes} codes, {result.dim} dimensions, {unit}"
    ordered = sorted(result.forms, key=lambda form: form.wrong)
    rows = [_exact_row(result), *(_row(form, result) for form in ordered)]
    console.print(make_table(title, COLUMNS, rows))
    formulas = [(form.name, form.formula) for form in ordered]
    console.print(make_table("How each computes its scores", ("search", "formula"), formulas, text_columns=2))
    console.print(f"latents {inputs.latents_from}, codebook {inputs.codebook_from}", markup=False, soft_wrap=True)
    _print_notes(console, result)
    console.print(verdict(result), style="bold", markup=False, soft_wrap=True)


def _print_notes(console: Console, result: Audit) -> None:
    """What the columns mean, and what was left out."""
    if result.non_finite:
        console.print(f"{result.non_finite} tokens with NaN or Inf were left out")
    console.print(
        "MSE: that of the exact codes, then its rise, per entry; worst token: how much farther, squared, its code is "
        "than the nearest; tied codes are not wrong",
        soft_wrap=True,
    )


def _document(result: Audit, inputs: Inputs, device: torch.device) -> dict[str, Any]:
    return {
        "vqkernels": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "latents": inputs.latents_from,
        "codebook": inputs.codebook_from,
        **asdict(result),
        "verdict": verdict(result),
    }


def run(config: AuditConfig) -> None:
    """Prints the tables and the verdict; writes the JSON."""
    console, device = make_console(), choose_device(config.device)
    with quiet_libraries():
        inputs = load_inputs(config, device, console)
        x = thinned(inputs.x, config.tokens)
        with meter(console, "searching") as bar:
            result = audit(
                x,
                inputs.codebook.to(device),
                metric=inputs.metric,
                progress=lambda fraction: bar.update(fraction, f"of {len(x)} tokens"),
            )
    _print(console, result, inputs)
    if config.json is not None:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(Path(config.json), json.dumps(_document(result, inputs, device), indent=2) + "\n")
        console.print(f"written to {config.json}", markup=False)
