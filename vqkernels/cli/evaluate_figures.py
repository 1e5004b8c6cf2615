"""The drawings of an evaluation's page: how PSNR is spread, and how evenly the codes are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vqkernels.profiling.figures import Canvas
from vqkernels.profiling.svg import Box, element, text

WIDE = Canvas("wide", 980.0, 300.0, 14.0, 7.0, 64.0, True)
NARROW = Canvas("narrow", 360.0, 260.0, 12.5, 6.0, 48.0, False)
MOST_BINS = 30


@dataclass(frozen=True)
class Axis:
    """Values on a linear scale to pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Round values inside, `about` as many as asked for."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [place * step for place in range(first, last + 1)]


def _label(content: str, x: float, y: float, anchor: str, kind: str) -> str:
    return element("text", {"x": x, "y": y, "text-anchor": anchor, "class": kind}, text(content))


def _grid(axes: tuple[Axis, Axis], canvas: Canvas, names: tuple[str, str], write: Callable[[float], str]) -> list[str]:
    """Lines and numbers of both axes; the names stand at the end of theirs."""
    (x_axis, y_axis), frame, font = axes, canvas.frame, canvas.font
    parts = []
    for value in y_axis.ticks(4):
        y = y_axis.at(value)
        parts.append(element("line", {"x1": frame.left, "x2": frame.right, "y1": y, "y2": y, "class": "grid"}))
        parts.append(_label(write(value), frame.left - 6, y + 0.35 * font, "end", "tick"))
    for value in x_axis.ticks(8 if canvas.details else 4):
        x = x_axis.at(value)
        parts.append(element("line", {"x1": x, "x2": x, "y1": frame.bottom, "y2": frame.bottom + 4, "class": "grid"}))
        parts.append(_label(write(value), x, frame.bottom + 1.5 * font, "middle", "tick"))
    parts.append(_label(names[0], (frame.left + frame.right) / 2, canvas.height - 0.3 * font, "middle", "axis"))
    turned = f"rotate(-90 {font} {(frame.top + frame.bottom) / 2:.1f})"
    place = {"x": font, "y": (frame.top + frame.bottom) / 2, "text-anchor": "middle", "transform": turned}
    return [*parts, element("text", {**place, "class": "axis"}, text(names[1]))]


def _chart(canvas: Canvas, described: str, *parts: str) -> str:
    attributes = {
        "viewBox": f"0 0 {canvas.width:g} {canvas.height:g}",
        "class": f"chart {canvas.name}",
        "role": "img",
        "aria-label": described,
        "font-size": canvas.font,
    }
    return element("svg", attributes, *parts)


def _bins(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:  # counts [n], edges [n + 1]
    """About as many bins as the cube root rule gives, over a range that is never empty."""
    low, high = min(values), max(values)
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    number = min(MOST_BINS, max(5, math.ceil(3 * len(values) ** (1 / 3))))
    return np.histogram(values, bins=number, range=(low, high))


def _bar(left: float, right: float, y: float, frame: Box, hint: str) -> str:
    place = {"x": left, "y": y, "width": max(right - left, 0.5), "height": frame.bottom - y}
    return element("rect", {**place, "class": "part ours"}, element("title", {}, text(hint)))


def _histogram(values: Sequence[float], mean: float, canvas: Canvas) -> str:
    (counts, edges), frame = _bins(values), canvas.frame
    x_axis = Axis(float(edges[0]), float(edges[-1]), frame.left, frame.right)
    y_axis = Axis(0.0, max(float(counts.max()) * 1.12, 4.0), frame.bottom, frame.top)
    parts = _grid((x_axis, y_axis), canvas, ("PSNR, dB", "pictures"), lambda value: f"{round(value, 6):g}")
    for place, count in enumerate(counts):
        if count:
            low, high = edges[place], edges[place + 1]
            hint = f"{count} from {low:.2f} to {high:.2f} dB"
            parts.append(_bar(x_axis.at(low), x_axis.at(high), y_axis.at(float(count)), frame, hint))
    x = x_axis.at(mean)
    parts.append(element("line", {"x1": x, "x2": x, "y1": frame.top, "y2": frame.bottom, "class": "mean"}))
    anchor = "start" if x < (frame.left + frame.right) / 2 else "end"
    beside = x + (6 if anchor == "start" else -6)
    parts.append(_label(f"mean {mean:.2f} dB", beside, frame.top + canvas.font, anchor, "point-label"))
    described = f"Histogram of PSNR over {len(values)} pictures, from {min(values):.2f} to {max(values):.2f} dB"
    return _chart(canvas, described, *parts)


def histogram(values: Sequence[float], mean: float) -> str:
    """How many pictures have which PSNR, for screens and for phones."""
    return _histogram(values, mean, WIDE) + _histogram(values, mean, NARROW)


def _usage_curve(curves: Sequence[Sequence[Sequence[float]]], canvas: Canvas) -> str:
    frame = canvas.frame
    x_axis, y_axis = Axis(0.0, 100.0, frame.left, frame.right), Axis(0.0, 100.0, frame.bottom, frame.top)
    across = "% of the codebook, most used codes first" if canvas.details else "% of the codebook"
    parts = _grid((x_axis, y_axis), canvas, (across, "% of the tokens"), lambda value: f"{value:g}")
    ends = {"x1": x_axis.at(0), "y1": y_axis.at(0), "x2": x_axis.at(100), "y2": y_axis.at(100)}
    parts.append(element("line", {**ends, "class": "roof cache"}))
    parts.append(_label("all codes equally often", x_axis.at(99), y_axis.at(22), "end", "roof-label"))
    for number, curve in enumerate(curves):
        points = " ".join(f"{x_axis.at(100 * x):.1f},{y_axis.at(100 * y):.1f}" for x, y in curve)
        parts.append(element("polyline", {"points": points, "class": f"curve curve-{number % 3}"}))
    half = next(x for x, y in curves[0] if y >= 0.5)
    described = f"Code usage: half of the tokens lie in the most used {100 * half:.1f} % of the codebook"
    return _chart(canvas, described, *parts)


def usage_curve(curves: Sequence[Sequence[Sequence[float]]]) -> str:
    """The share of the tokens that the most used codes hold, a line for every map; for screens and for phones."""
    return _usage_curve(curves, WIDE) + _usage_curve(curves, NARROW)
