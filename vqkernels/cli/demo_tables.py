"""The demo's closing tables."""

from __future__ import annotations

from rich.console import Console

from vqkernels.benchmarks.compare import SearchRow
from vqkernels.models import Evaluation, TrainResult

from .demo_measure import Measurements, Search
from .terminal import make_table

NOTES = """\
ms: median over rounds, everybody in turns in one process, {place}; time: theirs over ours, median over rounds.
peak memory: what one call needs beyond its inputs ({memory}).
wrong codes: against the nearest code by float64 brute force; a tie counts as right for torch."""
MEMORY = {
    "cpu": "growth of the resident set of a fresh process",
    "cuda": "by torch's CUDA allocator",
}


def evaluation_rows(
    evaluation: Evaluation,
    result: TrainResult,
    measured: Measurements,
) -> list[tuple[str, str]]:
    """Name and value of everything about the held-out photograph and the training."""
    usage, bits, codebook_size = evaluation.usage, evaluation.bits_per_pixel, evaluation.codebook_size
    height, width = evaluation.images.shape[2:]
    return [
        ("size", f"{width}x{height} pixels, {evaluation.codes.shape[2]}x{evaluation.codes.shape[1]} codes"),
        ("PSNR", f"{evaluation.psnr:.2f} dB"),
        ("SSIM", f"{evaluation.ssim:.4f}"),
        ("bits per pixel", f"{bits.fixed:.3f} fixed length, {bits.entropy:.3f} entropy coded (24 in the photograph)"),
        ("codes used", f"{usage.used} of {codebook_size}"),
        ("perplexity", f"{usage.perplexity:.1f}"),
        ("training", f"{result.steps} steps in {result.seconds:.0f} s, {result.steps / result.seconds:.1f} a second"),
        ("quantizer", f"{measured.quantizer_share:.1%} of a training step's forward and backward"),
    ]


def _search_cells(row: SearchRow) -> tuple[str, ...]:
    if row.milliseconds is None or row.times_slower is None:
        return row.name, "-", "-", "-", f"[dim]{row.reason or ''}[/dim]"
    memory = "-" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 1e6:.1f} MB"
    wrong = f"{row.wrong} of {row.checked}"
    shown = f"[red]{wrong}[/red]" if row.wrong else wrong
    return row.name, f"{row.milliseconds:.2f}", f"{row.times_slower:.2f}x", memory, shown


def print_searches(
    console: Console,
    searches: list[Search],
    device: str,
    threads: int | None,
) -> None:
    """The comparisons, ours first, and below them how they were measured."""
    columns = ("how", "ms", "time", "peak memory", "wrong codes")
    for search in searches:
        console.print(make_table(search.title, columns, map(_search_cells, search.rows)))
    place = "on the GPU" if device == "cuda" else f"{threads} threads"
    console.print(NOTES.format(place=place, memory=MEMORY[device]) + "\n", style="dim", soft_wrap=True)
