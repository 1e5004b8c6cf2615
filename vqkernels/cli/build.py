"""`vqkernels build`: the compiled kernels ahead of time, into the cache where the first use looks for them."""

from __future__ import annotations

from rich.console import Console

from vqkernels._extension import BuildReport, build, describe

from .options import BuildConfig
from .terminal import make_console, make_table, quiet_libraries


def _state(report: BuildReport) -> tuple[str, str, str]:
    """Library, what became of it, seconds."""
    if report.reason is not None:
        return report.name, "[red]not built[/red]", f"{report.seconds:.1f}"
    return report.name, "built" if report.built else "was there", f"{report.seconds:.1f}"


def _print_report(console: Console, reports: list[BuildReport]) -> None:
    console.print(make_table("Compiled kernels", ("library", "state", "seconds"), map(_state, reports), text_columns=2))
    for report in reports:
        text = str(report.path) if report.reason is None else report.reason
        console.print(f"{report.name}: {text}", markup=False, soft_wrap=True)
    for topic in ("instruction set", "compiler", "CUDA toolkit", "cache"):
        console.print(f"{topic}: {describe()[topic]}", markup=False, soft_wrap=True)


def run(config: BuildConfig) -> int:
    """Builds what is not built yet; 1 where one of the libraries asked for could not be."""
    console = make_console()
    with quiet_libraries(notes=False), console.status("compiling"):
        reports = build(cuda=config.cuda or None)
    _print_report(console, reports)
    return int(any(report.reason is not None for report in reports))
