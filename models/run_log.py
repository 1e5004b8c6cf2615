"""The folder of a training run: metrics.jsonl, TensorBoard events and sample pictures, all safe to resume."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .checkpoint import write_atomically, write_text_atomically

METRICS = "metrics.jsonl"
CURVES = "curves.png"
NETWORKS = "networks"  # key of the lines that say which networks the figures are by
RANDOM = "random"  # how the label of one without a weight file begins
PARTS = ("config.yaml", "checkpoints", "samples", "model", METRICS, CURVES)  # what a run leaves, beside events*


def run_exists(output: Path) -> bool:
    """Whether the folder holds anything that a run has learned; one that failed at its start does not count."""
    metrics = output / METRICS
    return any((output / "checkpoints").glob("step-*.pt")) or (metrics.exists() and metrics.stat().st_size > 0)


def delete_run(output: Path) -> None:
    """Deletes what a run leaves in its folder, and nothing else."""
    for path in [*(output / name for name in PARTS), *output.glob("events.out.tfevents.*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_metrics(output: str | Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, up to a step; a last line that a kill left unfinished is dropped."""
    path = Path(output) / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if last_step is None or record["step"] <= last_step:
            records.append(record)
    return records


def _summary_writer(output: Path, first_step: int) -> Any:
    """TensorBoard's writer, which forgets steps that a killed run had logged past its checkpoint."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "tensorboard is not installed, so no events are written: pip install 'vqkernels[train]'", stacklevel=3
        )
        return None
    return SummaryWriter(log_dir=str(output), purge_step=first_step)


class RunLog:
    """Writes what a run reports. Only the main process has one.

    Args:
        output: the folder of the run.
        last_step: the step that the run continues after; later lines in metrics.jsonl are dropped.
    """

    def __init__(self, output: Path, last_step: int) -> None:
        self.output = output
        (output / "samples").mkdir(parents=True, exist_ok=True)
        self.history = read_metrics(output, last_step)
        text = "".join(json.dumps(record) + "\n" for record in self.history)
        write_text_atomically(output / METRICS, text)
        self.file = open(output / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self.writer = _summary_writer(output, last_step + 1)

    def _line(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def networks(self, step: int, labels: dict[str, str]) -> None:
        """What the networks that judge the reconstructions are called, where that is new; a warning for random ones."""
        before = [record[NETWORKS] for record in self.history if NETWORKS in record]
        if labels and before[-1:] != [labels]:
            self._line({"step": step, NETWORKS: labels})
            if self.writer is not None:
                self.writer.add_text(NETWORKS, "\n".join(f"{name}: {label}  " for name, label in labels.items()), step)
        for name, label in labels.items():
            if label.startswith(RANDOM):
                warnings.warn(f"{name}: {label}, as no weight file is given", stacklevel=4)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard."""
        self._line({"step": step, **values})
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def picture(self, step: int, picture: Image.Image) -> Path:
        """A sample picture as samples/step-00000000.png, and to TensorBoard."""
        path = self.output / "samples" / f"step-{step:08d}.png"
        write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
        if self.writer is not None:
            self.writer.add_image("samples", np.array(picture), step, dataformats="HWC")
        return path

    def draw_curves(self) -> None:
        """curves.png of everything in metrics.jsonl."""
        try:
            from .curves import draw_curves
        except ImportError:
            warnings.warn(
                "matplotlib is not installed, so curves.png is not drawn: pip install 'vqkernels[train]'", stacklevel=2
            )
            return
        write_atomically(self.output / CURVES, lambda temporary: draw_curves(self.history, temporary))

    def close(self) -> None:
        """Flushes and closes the files."""
        self.file.close()
        if self.writer is not None:
            self.writer.close()
