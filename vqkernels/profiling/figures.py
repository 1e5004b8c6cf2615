"""The pictures of the page. Colours are CSS classes, so that light, dark and print share one drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .style import colour
from .svg import Box, Labels, LogAxis, element, text, text_box
from .units import percent, power, scaled, seconds

RATE_NAMES = {
    "byte": "byte multiply-add",
    "int8": "int8 tile",
    "int16": "int16 multiply-add",
    "float16": "fp16 matrix",
    "float32": "fp32 multiply-add",
}


LEADER = 8.0  # pixels between a point and its label that need no line


@dataclass(frozen=True)
class Canvas:
    """Size of a drawing and of its letters; one for screens, one for phones."""

    name: str
    width: float
    height: float
    font: float
    radius: float
    left: float
    details: bool  # labels carry numbers

    @property
    def frame(self) -> Box:
        return Box(self.left, 14.0, self.width - 14.0, self.height - 3.6 * self.font)


WIDE = Canvas("wide", 980.0, 500.0, 14.0, 7.0, 78.0, True)
NARROW = Canvas("narrow", 360.0, 400.0, 12.5, 6.0, 56.0, False)


def _bounds(values: Sequence[float], below: float, above: float) -> tuple[float, float]:
    return min(values) / below, max(values) * above


def _axes(document: dict[str, Any], canvas: Canvas) -> tuple[LogAxis, LogAxis]:
    peaks, kernels = document["peaks"], document["kernels"].values()
    ridge = max(peaks["rates"].values()) / peaks["bandwidth"]
    low, high = _bounds([*(kernel["intensity"] for kernel in kernels), ridge], 2.5, 2.5)
    rates = [*(kernel["flops_per_second"] for kernel in kernels), *peaks["rates"].values()]
    slow, fast = _bounds(rates, 2.5, 2.2)
    frame = canvas.frame
    return LogAxis(low, high, frame.left, frame.right), LogAxis(slow, fast, frame.bottom, frame.top)


def _label(content: str, x: float, y: float, anchor: str, kind: str) -> str:
    return element("text", {"x": x, "y": y, "text-anchor": anchor, "class": kind}, text(content))


def _grid(x_axis: LogAxis, y_axis: LogAxis, canvas: Canvas) -> list[str]:
    frame, font, parts = canvas.frame, canvas.font, []
    for value in x_axis.decades():
        x = x_axis.at(value)
        parts.append(element("line", {"x1": x, "x2": x, "y1": frame.top, "y2": frame.bottom, "class": "grid"}))
        parts.append(_label(f"{value:g}", x, frame.bottom + 1.3 * font, "middle", "tick"))
    for value in y_axis.decades():
        y = y_axis.at(value)
        parts.append(element("line", {"x1": frame.left, "x2": frame.right, "y1": y, "y2": y, "class": "grid"}))
        parts.append(_label(power(value), frame.left - 6, y + 0.35 * font, "end", "tick"))
    across = "operations per byte moved (FLOP/byte)"
    parts.append(_label(across, (frame.left + frame.right) / 2, canvas.height - 0.5 * font, "middle", "axis"))
    turned = f"rotate(-90 {font} {(frame.top + frame.bottom) / 2:.1f})"
    place = {"x": font, "y": (frame.top + frame.bottom) / 2, "text-anchor": "middle", "transform": turned}
    return [*parts, element("text", {**place, "class": "axis"}, "FLOP/s")]


def _slope(bandwidth: float, top: float, x_axis: LogAxis, y_axis: LogAxis, kind: str) -> str:
    """The line rate = bandwidth * intensity, from the frame's edge to where it meets ``top``."""
    low = max(x_axis.low, y_axis.low / bandwidth)
    high = min(x_axis.high, top / bandwidth)
    ends = (x_axis.at(low), x_axis.at(high), y_axis.at(bandwidth * low), y_axis.at(bandwidth * high))
    return element("line", dict(zip(("x1", "x2", "y1", "y2"), ends, strict=True)) | {"class": kind})


def _slope_label(bandwidth: float, content: str, axes: tuple[LogAxis, LogAxis], canvas: Canvas, labels: Labels) -> str:
    """Along the slope, near its lower end."""
    x_axis, y_axis = axes
    low = max(x_axis.low, y_axis.low / bandwidth)
    x, y = x_axis.at(low * 1.25), y_axis.at(bandwidth * low * 1.25)
    rise = y_axis.at(bandwidth * low * 12.5) - y
    angle = math.degrees(math.atan2(rise, x_axis.at(low * 12.5) - x))
    length = len(content) * 0.56 * canvas.font
    for part in range(8):  # the slanted line as a chain of small boxes
        along = length * (part + 0.5) / 8
        px, py = x + along * math.cos(math.radians(angle)), y + along * math.sin(math.radians(angle))
        labels.reserve(px, py - 0.6 * canvas.font, 0.8 * canvas.font)
    turn = f"rotate({angle:.1f} {x:.1f} {y:.1f})"
    place = {"x": x, "y": y - 0.5 * canvas.font, "transform": turn, "class": "roof-label"}
    return element("text", place, text(content))


def _roofs(document: dict[str, Any], axes: tuple[LogAxis, LogAxis], canvas: Canvas, labels: Labels) -> list[str]:
    peaks, (x_axis, y_axis), parts = document["peaks"], axes, []
    top = max(peaks["rates"].values())
    ridge = x_axis.at(max(x_axis.low, top / peaks["bandwidth"]))
    for name, rate in peaks["rates"].items():
        start, y = x_axis.at(max(x_axis.low, rate / peaks["bandwidth"])), y_axis.at(rate)
        kind = "roof" if rate == top else "roof second"
        parts.append(element("line", {"x1": start, "x2": x_axis.end, "y1": y, "y2": y, "class": kind}))
        content = f"{RATE_NAMES.get(name, name)} {scaled(rate, 'FLOP/s')}"
        content = content if canvas.details else f"{name} {scaled(rate, '')}"
        beside = -0.45 if rate == top else 1.15  # apart, however close the roofs are
        place = (ridge + canvas.font, y + beside * canvas.font)
        parts.append(_label(content, *place, "start", "roof-label"))
        labels.taken += [text_box(content, *place, canvas.font, "start"), Box(start, y - 2, x_axis.end, y + 2)]
    parts.append(_slope(peaks["bandwidth"], top, x_axis, y_axis, "roof"))
    memory = f"memory {scaled(peaks['bandwidth'], 'B/s')}"
    parts.append(_slope_label(peaks["bandwidth"], memory, axes, canvas, labels))
    if peaks["cache_bandwidth"]:
        parts.append(_slope(peaks["cache_bandwidth"], top, x_axis, y_axis, "roof cache"))
        ends = (max(x_axis.low, top / peaks["cache_bandwidth"]), top / peaks["bandwidth"])
        x1, x2 = (x_axis.at(min(max(end, x_axis.low), x_axis.high)) for end in ends)
        parts.append(
            element("line", {"x1": x1, "x2": x2, "y1": y_axis.at(top), "y2": y_axis.at(top), "class": "roof cache"})
        )
    return parts


def _points(document: dict[str, Any], axes: tuple[LogAxis, LogAxis], canvas: Canvas, labels: Labels) -> list[str]:
    places = {
        name: (axes[0].at(kernel["intensity"]), axes[1].at(kernel["flops_per_second"]), kernel)
        for name, kernel in document["kernels"].items()
    }
    for x, y, _ in places.values():
        labels.reserve(x, y, canvas.radius)
    leaders: list[str] = []
    parts: list[str] = []
    for name, (x, y, kernel) in places.items():
        share = percent(kernel["share_of_roof"])
        hint = f"{name}: {scaled(kernel['flops_per_second'], 'FLOP/s')}, {share} of its roof ({kernel['ceiling']})"
        title = element("title", {}, text(hint))
        parts.append(
            element("circle", {"cx": x, "cy": y, "r": canvas.radius, "class": f"point c-{colour(name)}"}, title)
        )
        content = f"{name} {share}" if canvas.details else name.removeprefix("k-means ")
        place = labels.place(content, x, y)
        leaders.append(_leader(x, y, text_box(content, place[0], place[1], canvas.font, place[2]), canvas.radius))
        parts.append(_label(content, *place, "point-label"))
    return leaders + parts


def _leader(x: float, y: float, box: Box, radius: float) -> str:
    """A thin line from a point to its label, where the label could not stand beside it."""
    tx, ty = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
    if math.hypot(tx - x, ty - y) < radius + LEADER:
        return ""
    return element("line", {"x1": x, "y1": y, "x2": tx, "y2": ty, "class": "leader"})


def _describe(document: dict[str, Any]) -> str:
    kernels = document["kernels"].items()
    return "; ".join(f"{name} reaches {percent(kernel['share_of_roof'])} of its roof" for name, kernel in kernels)


def roofline(document: dict[str, Any], canvas: Canvas) -> str:
    """The roofline of a document: both ceilings, the memory's slope, a point for each kernel."""
    axes, frame = _axes(document, canvas), canvas.frame
    labels = Labels(frame, canvas.font, canvas.radius + 5)
    parts = [*_grid(*axes, canvas), *_roofs(document, axes, canvas, labels), *_points(document, axes, canvas, labels)]
    box = {"x": frame.left, "y": frame.top, "width": frame.right - frame.left, "height": frame.bottom - frame.top}
    attributes = {
        "viewBox": f"0 0 {canvas.width:g} {canvas.height:g}",
        "class": f"chart {canvas.name}",
        "role": "img",
        "aria-label": f"Roofline. {_describe(document)}.",
        "font-size": canvas.font,
    }
    return element("svg", attributes, element("rect", {**box, "class": "frame"}), *parts)


def stacked_bar(parts: Mapping[str, float], described: str) -> str:
    """One bar of parts in proportion, as wide as the page."""
    total, before, drawn = sum(parts.values()) or 1.0, 0.0, []
    for name, value in parts.items():
        share = value / total
        if share > 0:
            title = element("title", {}, text(f"{name}: {seconds(value)}, {percent(share)}"))
            place = {"x": f"{100 * before:.3f}%", "width": f"{100 * share:.3f}%", "y": 0, "height": 34}
            drawn.append(element("rect", {**place, "class": f"part c-{colour(name)}"}, title))
        before += share
    attributes = {"class": "bar", "height": 34, "role": "img", "aria-label": described}
    return element("svg", {**attributes, "width": "100%"}, *drawn)


def single_bar(share: float, kind: str, described: str) -> str:
    """A bar of one value, the page's width standing for 1."""
    width = f"{max(100 * share, 0.3):.3f}%"
    bar = element("rect", {"x": 0, "y": 0, "height": 20, "width": width, "class": f"part {kind}"})
    ground = element("rect", {"x": 0, "y": 0, "height": 20, "width": "100%", "class": "ground"})
    attributes = {"class": "bar", "height": 20, "width": "100%", "role": "img", "aria-label": described}
    return element("svg", attributes, ground, bar)
