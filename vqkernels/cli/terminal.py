"""What the commands print with: one console, tables, and progress that falls back to plain lines."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

Item = TypeVar("Item")

PLAIN_INTERVAL = 10.0  # seconds between progress lines where nothing can be drawn over


def make_console(*, quiet: bool = False) -> Console:
    """A console that does not break table rows when the output is a file or a pipe."""
    console = Console(highlight=False, quiet=quiet)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    return console


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str | None = None,
    text_columns: int = 1,
) -> Table:
    """A table whose first `text_columns` columns are text and whose others are numbers, right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title_justify="left", caption_justify="left")
    table.title, table.title_style, table.caption = title, "bold", caption
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < text_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


@contextmanager
def quiet_libraries(*, notes: bool = True) -> Iterator[None]:
    """Keeps warnings of other packages off the screen; ours become a line each on stderr, or nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(?!vqkernels)")
        warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr) if notes else None
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


class Meter(Protocol):
    """Shows how far a job is."""

    def update(self, fraction: float, text: str, *, left: float | None = None) -> None:
        """`fraction` of the whole in [0, 1], a few words about the state, seconds left where they are known."""


def _remaining(start: float, fraction: float, left: float | None) -> str:
    """Time left, at the speed so far unless it is known."""
    if left is None:
        left = (time.monotonic() - start) * (1 - fraction) / fraction if fraction > 0 else math.inf
    return "" if math.isinf(left) else f"{left // 60:.0f}:{left % 60:02.0f} left"


class _LiveMeter:
    def __init__(self, progress: Progress):
        self.progress, self.start = progress, time.monotonic()
        self.task = progress.add_task("", total=1.0, text="", left="")

    def update(self, fraction: float, text: str, *, left: float | None = None) -> None:
        remaining = _remaining(self.start, fraction, left)
        self.progress.update(self.task, completed=min(fraction, 1.0), text=text, left=remaining)


class _PlainMeter:
    def __init__(self, console: Console, title: str):
        self.console, self.title, self.start = console, title, time.monotonic()
        self.last = self.start

    def update(self, fraction: float, text: str, *, left: float | None = None) -> None:
        now = time.monotonic()
        if now - self.last < PLAIN_INTERVAL and fraction < 1.0:
            return
        self.last = now
        remaining = _remaining(self.start, fraction, left)
        self.console.print(f"{self.title} {fraction:4.0%}  {remaining}  {text}", markup=False, soft_wrap=True)


@contextmanager
def meter(console: Console, title: str) -> Iterator[Meter]:
    """A live bar with the time left on a terminal, a line every few seconds anywhere else."""
    if not console.is_terminal:
        yield _PlainMeter(console, title)
        return
    columns = (
        TextColumn(title),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[left]}", style="cyan"),
        TextColumn("{task.fields[text]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        yield _LiveMeter(progress)


def tracked(
    console: Console,
    items: Sequence[Item],
    title: str,
) -> Iterator[Item]:
    """Iterates with a meter when there is more than a handful to do."""
    if len(items) < 8:
        yield from items
        return
    with meter(console, title) as bar:
        for place, item in enumerate(items):
            yield item
            bar.update((place + 1) / len(items), f"{place + 1} of {len(items)}")
