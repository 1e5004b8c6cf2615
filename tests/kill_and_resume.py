"""Kills a training run at random moments and resumes it; it must end with the bits of one that was left alone.

    python tests/kill_and_resume.py --steps 200 --kills 5 --seed 0     exits with 1 where any bit differs

The run is a small VQGAN on made-up pictures, deterministic, with everything that has a state: perceptual loss,
discriminator (ActNorm, LeCAM, augmentation) that begins on the way, dead codes that restart, a data worker, averaged
weights. A kill is a SIGKILL a random time after a random step, so it may fall into the writing of a checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from forked import SERVER, start
from PIL import Image
from vqkernels.models import QuantizerConfig, TrainConfig, VQGANConfig, load_config, run_log, save_config, train
from vqkernels.models.checkpoint import load_newest
from vqkernels.models.config import DiscriminatorConfig

COMPARED = ("model", "average", "optimizer", "discriminator", "step", "skipped")
MOST_NAMED = 5  # differences on the screen
LONGEST_DELAY = 0.05  # seconds between a step and the kill; a step of this run takes about that long


def write_pictures(folder: Path) -> Path:
    folder.mkdir(parents=True)
    random_pixels = np.random.default_rng(0)
    for number in range(6):
        coarse = random_pixels.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def make_config(data: Path, output: Path, steps: int) -> TrainConfig:
    quantizer = QuantizerConfig(codebook_size=64, dead_code_threshold=0.2, ema_decay=0.9)
    model = VQGANConfig(
        channels=8,
        channel_multipliers=[1, 2],
        attention_resolutions=[8],
        blocks=1,
        resolution=16,
        latent_channels=8,
        norm_groups=4,
        dropout=0.1,
        quantizer=quantizer,
    )
    critic = DiscriminatorConfig(
        kind="patch",
        channels=8,
        layers=1,
        norm="act",
        start_share=0.2,
        lecam_weight=0.01,
        augmentation=["color", "translation"],
    )
    return TrainConfig(
        data=str(data),
        output=str(output),
        model=model,
        discriminator=critic,
        deterministic=True,
        image_size=16,
        batch_size=2,
        steps=steps,
        perceptual_weight=0.1,
        perceptual_start=0.1,
        weight_ema_decay=0.9,
        threads=1,
        num_workers=1,
        log_every=5,
        sample_every=0,
        checkpoint_every=7,
        device="cpu",
    )


def _train(file: str, steps: Connection) -> None:
    run_log.RunLog.draw_curves = lambda self: None  # takes seconds, and nobody looks
    train(load_config(file), progress=lambda report: steps.send(report.step))


def run(config: TrainConfig, folder: Path, kill_after: float | None = None, delay: float = 0.0) -> int | None:
    """Trains in a process of its own; the step after which it was killed, or None where it came to its end."""
    file = folder / f"{Path(config.output).name}.yaml"
    save_config(config, file)
    steps, sender = SERVER.Pipe(duplex=False)
    process = start(_train, str(file), sender)
    sender.close()
    try:
        for count in itertools.count(1):
            step = steps.recv()
            if kill_after is not None and count >= kill_after:
                time.sleep(delay)
                process.kill()
                return int(step)
    except EOFError:
        pass
    finally:
        process.join()
    if process.exitcode:
        raise RuntimeError(f"the run ended with exit code {process.exitcode}")
    return None


def differences(one: Path, other: Path) -> list[str]:
    """Names of everything in the two last checkpoints that is not bit for bit the same."""
    mine, theirs = load_newest(one / "checkpoints"), load_newest(other / "checkpoints")
    assert mine is not None
    assert theirs is not None
    found = []
    for part in COMPARED:
        (paths, _), (others, _) = (torch.utils._pytree.tree_flatten_with_path(state[part]) for state in (mine, theirs))
        if len(paths) != len(others):
            found.append(f"{part}: {len(paths)} and {len(others)} entries")
        for (path, a), (_, b) in zip(paths, others, strict=False):
            if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
                found.append(part + torch.utils._pytree.keystr(path))
    if not torch.equal(mine["random"][0]["torch"], theirs["random"][0]["torch"]):
        found.append("torch's random generator")
    saved = [(each / "model" / "model.safetensors").read_bytes() for each in (one, other)]
    return found + (["model/model.safetensors"] if saved[0] != saved[1] else [])


def kill_and_resume(folder: Path, steps: int, kills: int, seed: int) -> tuple[list[int], list[str]]:
    """The steps at which the run was killed, and what differs in the end."""
    data, draw = write_pictures(folder / "pictures"), random.Random(seed)
    run(make_config(data, folder / "undisturbed", steps), folder)
    config, killed = make_config(data, folder / "killed", steps), []
    for left in range(kills, 0, -1):
        config.resume = bool(killed)
        done = killed[-1] if killed else 0
        last = run(config, folder, draw.randint(1, max(1, (steps - done) // left)), draw.uniform(0, LONGEST_DELAY))
        if last is None:
            break
        killed.append(last)
    config.resume = True
    run(config, folder)
    return killed, differences(folder / "undisturbed", folder / "killed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killed, found = kill_and_resume(Path(folder), options.steps, options.kills, options.seed)
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    named = ", ".join(found[:MOST_NAMED]) + more if found else "nothing"
    print(f"killed after steps {killed} of {options.steps} and resumed; different: {named}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
