"""What a finished run of `vqkernels train` came to, as files for benchmarks/results/:

    python -m vqkernels.benchmarks.training_run runs/NAME -o benchmarks/results/NAME

writes NAME.json (figures, machine, versions, commit), NAME.jpg (the last sample picture) and NAME-curves.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image
from vqkernels.models import load_config
from vqkernels.models.config import to_dict
from vqkernels.models.run_log import CURVES, read_metrics

from .machine import describe_machine, describe_versions, git_commit

JPEG_QUALITY = 75
PALETTE = 64  # colours of the curves: lines and text need no more


def summary(run: Path) -> dict[str, Any]:
    """The newest value of every figure, the held-out ones by step, and what the run was."""
    history = read_metrics(run)
    last: dict[str, Any] = {}
    for line in history:
        last.update(line)
    held_out = [line for line in history if "held_out_psnr" in line]
    config = {name: value for name, value in to_dict(load_config(run / "config.yaml")).items() if name != "output"}
    return {
        "recorded_at_commit": git_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "config": config,
        "last": last,
        "held_out": held_out,
    }


def record(run: Path, target: Path) -> None:
    """Writes the three files; `target` is their path without a suffix."""
    samples = sorted((run / "samples").glob("step-*.png"))
    if not samples:
        raise FileNotFoundError(f"{run / 'samples'}: expected the pictures of a finished run, found none")
    target.with_suffix(".json").write_text(json.dumps(summary(run), indent=1) + "\n", encoding="utf-8")
    Image.open(samples[-1]).convert("RGB").save(target.with_suffix(".jpg"), quality=JPEG_QUALITY)
    curves = Image.open(run / CURVES).convert("RGB").quantize(PALETTE)
    curves.save(target.with_name(f"{target.name}-curves.png"), optimize=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    record(options.run, options.output)


if __name__ == "__main__":
    main()
