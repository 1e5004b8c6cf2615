"""A training run on two processes of gloo."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

from accelerate import Accelerator
from forked import LONGEST, run_ranks
from torch.nn.parallel import DistributedDataParallel
from vqkernels.models import TrainConfig, load_config, run_log, save_config, train


def train_rank(rank: int, file: str, before: str) -> None:
    """What each rank does; ``before`` is code that it runs first."""
    run_log.RunLog.draw_curves = lambda self: None  # takes seconds, and nobody looks
    end = Accelerator.end_training

    def end_training(self: Accelerator) -> None:
        # the last to hold the process group would wait for gloo's thread, which may wait for the GIL
        alive = any(type(each) is DistributedDataParallel for each in gc.get_objects())
        assert not alive, "it outlives the process group"
        end(self)

    Accelerator.end_training = end_training
    exec(before, {})
    train(load_config(file))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def train_with_two_ranks(config: TrainConfig, folder: Path, before: str = "") -> None:
    """Runs ``config``, whose batch is that of one rank; what torchrun would tell them stands in their environment."""
    file = folder / "config.yaml"
    save_config(config, file)
    assert load_config(file) == config
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    run_ranks(
        train_rank,
        2,
        str(file),
        before,
        environment=lambda rank: told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
    )


def train_with_torchrun(config: TrainConfig, folder: Path) -> None:
    """The same in new processes, as its users start it."""
    save_config(config, folder / "config.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, "-m", "two_ranks", str(folder / "config.yaml")]
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LONGEST)
    assert found.returncode == 0, found.stderr[-3000:]


if __name__ == "__main__":
    train_rank(int(os.environ["RANK"]), sys.argv[1], "")
