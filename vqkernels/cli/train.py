"""`vqkernels train`: the training loop of vqkernels.models with a progress bar."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from vqkernels.models import TrainConfig, TrainProgress, TrainResult, train

from .loading import report_skipped
from .terminal import make_console, make_table, meter, quiet_libraries

SHOWN = (
    ("psnr", "PSNR {:.1f} dB"),
    *(("usage", "codebook used {:.0%}"), ("top_usage", "top used {:.0%}"), ("bottom_usage", "bottom used {:.0%}")),
    ("held_out_psnr", "held out {:.2f} dB"),
)


def _state(progress: TrainProgress) -> str:
    """What the bar says about a step."""
    of = f" of {progress.steps}" if progress.steps is not None else ""
    figures = [form.format(progress.metrics[name]) for name, form in SHOWN if name in progress.metrics]
    return "  ".join([f"step {progress.step}{of}", *figures])


def train_with_meter(console: Console, config: TrainConfig) -> TrainResult:
    """Trains under a progress bar; plain lines where the output is no terminal."""
    with quiet_libraries(), meter(console, "training") as bar:

        def show(progress: TrainProgress) -> None:
            bar.update(progress.share, _state(progress), left=progress.seconds_left)

        return train(config, progress=show)


def _print_result(console: Console, result: TrainResult) -> None:
    last: dict[str, float] = {}
    for record in result.history:
        last.update(record)
    names = ("psnr", "held_out_psnr", "held_out_ssim", "held_out_perplexity", "held_out_bits_per_pixel")
    rows = [("steps", f"{result.steps}"), ("seconds", f"{result.seconds:.0f}")]
    rows += [(name.replace("_", " "), f"{last[name]:.4g}") for name in names if name in last]
    console.print(make_table("Trained", ("what", "value"), rows))
    report_skipped(console, result.skipped)
    console.print(f"model in {result.output}/model, pictures in {result.output}/samples", markup=False)


def _hint_after_stop(console: Console, output: str) -> None:
    checkpoints = sorted(Path(output, "checkpoints").glob("step-*.pt"))
    if checkpoints:
        text = f"last checkpoint: {checkpoints[-1]}; the same command with --resume goes on from there"
    else:
        text = f"there was no checkpoint yet in {output}/checkpoints"
    console.print(text, markup=False, soft_wrap=True)


def run(config: TrainConfig) -> None:
    """Trains and prints where the model is; under torchrun only the first process prints."""
    console = make_console(quiet=os.environ.get("RANK", "0") != "0")
    try:
        result = train_with_meter(console, config)
    except KeyboardInterrupt:
        _hint_after_stop(console, config.output)
        raise
    _print_result(console, result)
