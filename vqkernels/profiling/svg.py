"""Small pieces of inline SVG: elements, logarithmic axes, and labels that keep out of each other's way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

CHARACTER = 0.56  # width of an average letter, in font sizes


def element(name: str, attributes: Mapping[str, object], *children: str) -> str:
    """An element; the children are markup already."""
    written = "".join(f' {key}="{escape(_number(value))}"' for key, value in attributes.items())
    return f"<{name}{written}>{''.join(children)}</{name}>" if children else f"<{name}{written}/>"


def text(content: str) -> str:
    """Character data."""
    return escape(content, quote=False)


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class LogAxis:
    """Values on a logarithmic scale to pixels."""

    low: float
    high: float
    start: float  # pixel of low
    end: float  # pixel of high

    def at(self, value: float) -> float:
        """Pixel of a value."""
        share = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return self.start + share * (self.end - self.start)

    def decades(self) -> list[float]:
        """Powers of ten inside."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        return [10.0**power for power in range(first, last + 1)]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)

    def inside(self, other: Box) -> bool:
        """Whether no part of it sticks out of the other."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


def text_box(content: str, x: float, y: float, size: float, anchor: str) -> Box:
    """About the room that a line takes whose baseline is at (x, y)."""
    width = CHARACTER * size * len(content)
    left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
    return Box(left, y - 0.85 * size, left + width, y + 0.3 * size)


@dataclass
class Labels:
    """Places a label beside each point where nothing lies yet."""

    frame: Box
    size: float  # of the font, pixels
    gap: float  # from the middle of the point
    taken: list[Box] = field(default_factory=list)

    def reserve(self, x: float, y: float, radius: float) -> None:
        """Keep a point free of labels."""
        self.taken.append(Box(x - radius, y - radius, x + radius, y + radius))

    def place(self, content: str, x: float, y: float) -> tuple[float, float, str]:
        """Baseline and anchor of the label of the point at (x, y); the first place in the frame where all are taken."""
        fits = [each for each in self._choices(x, y) if self._box(content, each).inside(self.frame)]
        free = [each for each in fits if not any(self._box(content, each).meets(other) for other in self.taken)]
        chosen = (free or fits or [(x + self.gap, y + 0.35 * self.size, "start")])[0]
        self.taken.append(self._box(content, chosen))
        return chosen

    def _box(self, content: str, place: tuple[float, float, str]) -> Box:
        return text_box(content, place[0], place[1], self.size, place[2])

    def _choices(self, x: float, y: float) -> Sequence[tuple[float, float, str]]:
        middle, gap, size = y + 0.35 * self.size, self.gap, self.size
        near = [(x + gap, middle, "start"), (x - gap, middle, "end")]
        for steps in (1.0, 2.0, 3.0, 4.0):
            up, down = y - gap * 0.6 - size * (steps - 0.6), y + gap * 0.6 + size * (steps + 0.2)
            near += [(x, up, "middle"), (x, down, "middle")]
            near += [(x + gap, middle - size * steps, "start"), (x + gap, middle + size * steps, "start")]
            near += [(x - gap, middle - size * steps, "end"), (x - gap, middle + size * steps, "end")]
        return near
