"""The curves of a training run as one picture: what to look at, and where the losses begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#2f6db3", "#d1722c", "#3a8f5c", "#9a4fa8", "#b8a12b", "#3aa5a8", "#b3415e", "#7a7a85")
INK, FAINT = "#26262a", "#b8b8be"
COLUMNS = 3
FEW = 3  # points that make no line worth looking at


@dataclass(frozen=True)
class Panel:
    """Curves that belong on one pair of axes."""

    title: str
    names: tuple[str, ...]  # of metrics.jsonl; figures of one level or of held-out pictures end in them
    unit: str = ""
    logarithmic: bool = False


PANELS = (
    Panel("reconstruction", ("psnr",), "PSNR, dB"),
    Panel("losses", ("l1", "mse", "perceptual", "logit_distance"), logarithmic=True),
    Panel("codebook in use", ("usage", "dead_share"), "share of the codes"),
    Panel("perplexity", ("perplexity",), "codes"),
    Panel("discriminator", ("real_logit", "fake_logit", "discriminator_loss"), "logit, loss"),
    Panel("adaptive weight", ("adaptive_weight",), logarithmic=True),
    Panel("commitment loss", ("commitment_loss",), logarithmic=True),
    Panel("length of the codes", ("code_length",), "mean"),
    Panel("entropy loss", ("entropy_loss",)),
    Panel("latents", ("kl",), "KL divergence", logarithmic=True),
    Panel("spread of the latents", ("latent_std",), "standard deviation"),
    Panel("gradient", ("grad_norm",), "norm", logarithmic=True),
    Panel("speed", ("images_per_second",), "images per second"),
)


def _curve(history: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure; zeros of a loss that has not begun are left out."""
    points = [(line["step"], line[name]) for line in history if name in line]
    begun = next((place for place, (_, value) in enumerate(points) if value), len(points))
    return [step for step, _ in points[begun:]], [value for _, value in points[begun:]]


def _beginnings(history: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """Steps after the first line at which the perceptual and the adversarial loss begin."""
    first = next((line["step"] for line in history if "loss" in line), 0)
    found = []
    for name, word in (("perceptual", "perceptual"), ("discriminator_loss", "adversarial")):
        steps, _ = _curve(history, name)
        if steps and steps[0] > first:
            found.append((steps[0], word))
    return found


def _belongs(name: str, panel: Panel) -> bool:
    """Whether a figure is one of the panel's: `usage`, `held_out_usage`, `top_usage`, `top_quantizer.dead_share`."""
    return any(name == each or name.endswith((f"_{each}", f".{each}")) for each in panel.names)


def _draw(axes: Any, panel: Panel, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    for colour, (name, (steps, values)) in zip(COLOURS, curves.items(), strict=False):
        dotted = name.startswith("held_out") or len(steps) < FEW
        label = name.replace("held_out_psnr", "held out").replace("_", " ").replace(".", " ")
        axes.plot(steps, values, color=colour, linewidth=1.4, marker="o" if dotted else None, markersize=3, label=label)
    axes.set_title(panel.title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("step", fontsize=8, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(panel.unit, fontsize=8, color=INK)
    if panel.logarithmic and all(value > 0 for _, values in curves.values() for value in values):
        axes.set_yscale("log")
    axes.tick_params(which="both", labelsize=8, colors=INK)
    axes.grid(color=FAINT, linewidth=0.4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curves) > 1 or panel.title != next(iter(curves)).replace("_", " "):
        axes.legend(fontsize=7, frameon=False)


def draw_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the lines of metrics.jsonl into a PNG file; panels without figures are left out.

    Args:
        history: the lines, as `run_log.read_metrics` gives them.
        path: the file.
    """
    drawn = []
    for panel in PANELS:
        names = dict.fromkeys(name for line in history for name in line if _belongs(name, panel))
        curves = {name: curve for name in names if (curve := _curve(history, name))[0]}
        if curves:
            drawn.append((panel, curves))
    rows = max(1, -(-len(drawn) // COLUMNS))
    last, beginnings = history[-1]["step"] if history else 1, _beginnings(history)
    figure = Figure(figsize=(4 * COLUMNS, 2.6 * rows), layout="constrained", dpi=100)
    for place, (panel, curves) in enumerate(drawn):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        _draw(axes, panel, curves)
        axes.set_xlim(0, last)
        for step, word in beginnings:
            axes.axvline(step, color=FAINT, linewidth=0.9, linestyle=":")
            if place == 0:
                axes.text(step, axes.get_ylim()[0], word, fontsize=7, color=INK, va="bottom", ha="right", rotation=90)
    FigureCanvasAgg(figure).print_png(str(path))
