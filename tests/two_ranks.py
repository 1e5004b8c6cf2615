"""A training run on two processes of gloo, as torchrun starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from vqkernels.models import TrainConfig, load_config, save_config

SCRIPT = """
import gc, sys
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from vqkernels.models import load_config, run_log, train

run_log.RunLog.draw_curves = lambda self: None  # takes seconds, and nobody looks
end = Accelerator.end_training

def end_training(self):
    # the last to hold the process group would wait for gloo's thread and keep the GIL, which that thread may wait for
    assert not any(type(each) is DistributedDataParallel for each in gc.get_objects()), "it outlives the process group"
    end(self)

Accelerator.end_training = end_training
{before}
train(load_config(sys.argv[1]))
"""


def train_with_two_ranks(config: TrainConfig, folder: Path, before: str = "") -> None:
    """Runs `config`, whose batch is that of one rank; `before` is code that each rank runs first."""
    save_config(config, folder / "config.yaml")
    assert load_config(folder / "config.yaml") == config
    (folder / "two.py").write_text(SCRIPT.format(before=before))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, str(folder / "two.py"), str(folder / "config.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stderr[-3000:]
