"""The training loop: it learns, resumes at the exact next step, survives a kill, and runs on several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from two_ranks import train_with_two_ranks
from vqkernels.models import (
    VQVAE,
    NonFiniteLossError,
    QuantizerConfig,
    TrainConfig,
    VQVAEConfig,
    load_checkpoint,
    load_config,
    save_config,
    train,
)
from vqkernels.models.checkpoint import load_newest, save_checkpoint
from vqkernels.models.optimization import learning_rate_at
from vqkernels.models.run_log import read_metrics
from vqkernels.models.weight_average import WeightAverage

SINGLE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    down, across = np.mgrid[0:48, 0:48] / 48
    for number in range(count):
        waves = [np.sin(6 * (number + 1) * down + channel + 5 * across) for channel in range(3)]
        pixels = (np.stack(waves, axis=-1) * 110 + 128).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "train", 5)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "held_out", 2)


def small_run(data: Path, output: Path, **changes) -> TrainConfig:
    quantizer = QuantizerConfig(codebook_size=32, dead_code_threshold=0.01, ema_decay=0.9)
    model = VQVAEConfig(
        patch_size=2, channels=16, channel_multipliers=[1, 2], blocks=1, latent_channels=8, quantizer=quantizer
    )
    options = {
        "model": model,
        "image_size": 16,
        "batch_size": 4,
        "steps": 6,
        "warmup_steps": 2,
        "learning_rate": 2e-3,
        "weight_ema_decay": 0.9,
        "threads": 1,
        "log_every": 1,
        "sample_every": 0,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    return TrainConfig(data=str(data), output=str(output), **{**options, **changes})


def assert_same_end(one: Path, other: Path) -> None:
    """Bitwise the same model, optimizer, averages and random state, and the same log."""
    mine, theirs = load_newest(one / "checkpoints"), load_newest(other / "checkpoints")
    assert mine["step"] == theirs["step"]
    for part in ("model", "average", "optimizer"):
        flat_mine, flat_theirs = (torch.utils._pytree.tree_leaves(state[part]) for state in (mine, theirs))
        for a, b in zip(flat_mine, flat_theirs, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, part
    assert torch.equal(mine["random"][0]["torch"], theirs["random"][0]["torch"])
    assert VQVAE.from_pretrained(one / "model").fingerprint() == VQVAE.from_pretrained(other / "model").fingerprint()
    assert untimed_log(one) == untimed_log(other)


def untimed_log(output: Path) -> list[dict]:
    lines = read_metrics(output)
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "peak_memory_mib")}
        for line in lines
    ]


class StopError(Exception):
    """Stands for whatever ends a run early."""


def stop_after(step: int):
    def progress(report):
        if report.step >= step:
            raise StopError

    return progress


def uneven_run(pictures: Path, output: Path) -> TrainConfig:
    """Log lines, samples and checkpoints fall on different steps, so that a checkpoint lies between them."""
    return small_run(pictures, output, steps=7, log_every=3, sample_every=2, validation=str(pictures))


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(uneven_run(pictures, output))
    return output


def test_training_lowers_the_loss_and_leaves_a_whole_run(pictures, held_out, tmp_path):
    output = tmp_path / "run"
    config = small_run(
        pictures, output, steps=120, validation=str(held_out), sample_every=60, log_every=20, checkpoint_every=60
    )
    reports = []
    result = train(config, progress=reports.append)
    losses = [line["loss"] for line in result.history if "loss" in line]
    quality = [line["held_out_psnr"] for line in result.history if "held_out_psnr" in line]
    assert losses[-1] < 0.6 * losses[0]
    assert quality[-1] > quality[0] + 0.5
    assert result.steps == 120
    assert [report.step for report in reports] == list(range(1, 121))
    assert reports[-1].share == 1
    assert reports[-1].seconds_left == 0
    assert reports[-1].metrics["psnr"] > reports[40].metrics["psnr"]
    assert load_config(output / "config.yaml") == config
    assert sorted(path.name for path in (output / "samples").iterdir()) == ["step-00000060.png", "step-00000120.png"]
    assert list(output.glob("events.out.tfevents.*"))
    assert result.history == [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert VQVAE.from_pretrained(output / "model").fingerprint() == result.model.fingerprint()


def test_resume_takes_the_exact_next_step(pictures, undisturbed, tmp_path):
    config = uneven_run(pictures, tmp_path / "run")
    with pytest.raises(StopError):
        train(config, progress=stop_after(5))  # the checkpoint is of step 4, the log has lines past it
    torch.manual_seed(999)
    train(dataclasses.replace(config, resume=True, num_workers=1))
    assert_same_end(tmp_path / "run", undisturbed)


def test_resume_of_a_finished_run_changes_nothing(pictures, undisturbed):
    files = ("model/model.safetensors", "metrics.jsonl")
    before = [(undisturbed / name).read_bytes() for name in files]
    result = train(dataclasses.replace(uneven_run(pictures, undisturbed), resume=True))
    assert result.steps == 7
    assert [(undisturbed / name).read_bytes() for name in files] == before


def test_sigkill_loses_nothing_before_the_last_checkpoint(pictures, undisturbed, tmp_path):
    config = uneven_run(pictures, tmp_path / "run")
    save_config(config, tmp_path / "config.yaml")
    script = textwrap.dedent(
        """
        import sys, time
        from vqkernels.models import load_config, train
        def slow(report):
            if report.step >= 3:
                print("ready", flush=True)
                time.sleep(60)
        train(load_config(sys.argv[1]), progress=slow)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "config.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=SINGLE_THREAD) as process:
        assert process.stdout.readline().strip() == "ready"
        process.send_signal(signal.SIGKILL)
    (tmp_path / "run" / "checkpoints" / ".step-00000004.pt.tmp-1").write_bytes(b"cut off while it was written")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    train(dataclasses.replace(config, resume=True))
    assert_same_end(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "unlisted"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, damage):
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, {"step": step, "weights": torch.full((1000,), float(step))}, keep=3)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2])
    if damage == "unlisted":
        (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000002.pt' (is truncated|is damaged|cannot be read)"):
        load_checkpoint(path)
    with pytest.warns(UserWarning, match=r"step-00000002.pt.*trying the one before"):
        assert load_newest(tmp_path)["step"] == 1
    for file in tmp_path.glob("*.pt"):
        file.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="trying the"),
        pytest.raises(ValueError, match="none of the 2 checkpoints"),
    ):
        load_newest(tmp_path)


def test_old_checkpoints_are_deleted_and_a_foreign_file_is_left(tmp_path):
    (tmp_path / "step-best.pt").write_bytes(b"mine")
    for step in range(5):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    names = ["step-00000003.pt", "step-00000004.pt", "step-best.pt"]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == names
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["newest"] == "step-00000004.pt"
    assert list(index["checkpoints"]) == ["step-00000003.pt", "step-00000004.pt"]


def test_a_run_is_neither_overwritten_nor_resumed_by_mistake(pictures, undisturbed, tmp_path):
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(uneven_run(pictures, undisturbed))
    config = dataclasses.replace(uneven_run(pictures, undisturbed), resume=True)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, latent_channels=4))
    with pytest.raises(ValueError, match=r"model.latent_channels is 4 now and was 8 in the checkpoint"):
        train(other)
    with pytest.raises(ValueError, match=r"batch_size is 2 now and was 4"):
        train(dataclasses.replace(config, batch_size=2))
    output = tmp_path / "run"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(small_run(tmp_path / "nowhere", output))
    assert [path.name for path in output.iterdir()] == ["notes.txt"]  # what fails at its start leaves nothing
    train(small_run(pictures, output, steps=1))
    train(small_run(pictures, output, steps=2, overwrite=True))
    assert (output / "notes.txt").exists()
    assert load_newest(output / "checkpoints")["step"] == 2


def test_accumulated_micro_batches_equal_one_joined_batch(pictures, tmp_path):
    options = {"steps": 4, "model": without_draws(pictures)}
    joined = train(small_run(pictures, tmp_path / "joined", batch_size=4, **options))
    parts = train(small_run(pictures, tmp_path / "parts", batch_size=2, gradient_accumulation=2, **options))
    assert parts.steps == joined.steps == 4
    assert_close_models(joined.model, parts.model)


def without_draws(pictures: Path) -> VQVAEConfig:
    """A model whose codebook depends on all tokens of a step together, and not on which come first."""
    quantizer = QuantizerConfig(codebook_size=32, kmeans_init=False, dead_code_threshold=0.0, ema_decay=0.9)
    return dataclasses.replace(small_run(pictures, pictures).model, quantizer=quantizer)


def assert_close_models(one: VQVAE, other: VQVAE) -> None:
    """Sums in another order differ by float32 rounding; Adam's division carries that into the weights.

    One step moves a weight by up to 2e-3 here, so a lost or doubled micro-batch shows far above 1e-5.
    """
    for name, values in one.state_dict().items():
        if name in ("quantizer.window_counts", "quantizer.last_used", "quantizer.step"):  # count forwards, not steps
            continue
        found = other.state_dict()[name]
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_two_processes_equal_one_with_the_joined_batch(pictures, tmp_path):
    device = "cpu" if torch.cuda.is_available() else "auto"  # the default must find the other process too
    options = {"steps": 4, "model": without_draws(pictures), "device": device}
    alone = train(small_run(pictures, tmp_path / "alone", batch_size=4, **options))
    config = small_run(pictures, tmp_path / "both", batch_size=2, **options)
    train_with_two_ranks(config, tmp_path)
    both = VQVAE.from_pretrained(tmp_path / "both" / "model")
    assert_close_models(alone.model, both)
    state = load_newest(tmp_path / "both" / "checkpoints")
    assert state["order"]["processes"] == 2
    assert len(state["random"]) == 2
    logs = [[line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("alone", "both")]
    assert logs[1] == pytest.approx(logs[0], rel=1e-3)
    with pytest.raises(ValueError, match="processes is 1 now and was 2"):
        train(dataclasses.replace(config, resume=True))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(pictures, tmp_path):
    config = small_run(pictures, tmp_path / "run", learning_rate=1e30, warmup_steps=0, max_grad_norm=0.0)
    with pytest.raises(NonFiniteLossError, match=r"step 2: the loss or its gradient is not finite .*learning_rate"):
        train(config)
    assert load_newest(tmp_path / "run" / "checkpoints") is None


def test_time_budget_ends_the_run_and_brings_the_learning_rate_down(pictures, tmp_path):
    config = small_run(pictures, tmp_path / "run", steps=None, max_seconds=2.0, checkpoint_every=1000)
    started = time.perf_counter()
    result = train(config)
    assert result.steps > 3
    assert 2.0 <= result.seconds < time.perf_counter() - started
    rates = [line["learning_rate"] for line in result.history if "learning_rate" in line]
    assert rates[-1] < 0.2 * max(rates)


def test_unreadable_files_are_counted_and_named(tmp_path):
    data = write_pictures(tmp_path / "data", 2)
    for number in range(7):
        (data / f"broken{number}.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"skipped 7 of 9 image files: .*broken0.png.*broken4.png.*; and 2 more"):
        result = train(small_run(data, tmp_path / "run", steps=1))
    assert len(result.skipped) == 7


def test_learning_rate_warms_up_and_ends_low():
    config = TrainConfig(steps=100, learning_rate=1.0, warmup_steps=10, final_learning_rate=0.1)
    rates = [learning_rate_at(config, step, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[50] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_a_run_that_ends_in_its_warm_up_says_so(pictures, tmp_path):
    with pytest.warns(UserWarning, match=r"ended at step 2 of warmup_steps 5, so its learning rate never reached"):
        train(small_run(pictures, tmp_path / "run", steps=2, warmup_steps=5))


def test_bfloat16_trains_and_half_needs_a_gpu(pictures, tmp_path):
    result = train(small_run(pictures, tmp_path / "bf16", steps=2, mixed_precision="bf16"))
    assert result.steps == 2
    assert all(weight.dtype is torch.float32 for weight in result.model.parameters())
    with pytest.raises(ValueError, match="mixed_precision fp16 needs a GPU"):
        train(small_run(pictures, tmp_path / "fp16", mixed_precision="fp16"))


def test_averaged_weights_lag_and_buffers_are_copied():
    model = torch.nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    model.running_mean.fill_(7.0)
    average.update(model, 1000)
    assert average.model.weight.tolist() == [2.0, 2.0]
    assert average.model.running_mean.tolist() == [7.0, 7.0]
    average.update(model, 0)  # early on the average follows quickly
    assert average.model.weight.tolist() == pytest.approx([2.9, 2.9])


def test_threads_are_set_for_the_run_and_restored(pictures, tmp_path):
    torch.set_num_threads(2)
    seen = []
    train(small_run(pictures, tmp_path / "run", steps=1), progress=lambda report: seen.append(torch.get_num_threads()))
    assert seen == [1]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"image_size": 18}, "image_size must be divisible by the model's factor 4, got 18"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"steps": 0}, "steps must be greater than 0, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be greater than 0, got -1.0"),
        ({"betas": [0.9]}, r"betas must be two numbers in \[0, 1\), got \[0.9\]"),
        ({"min_crop": 1.5}, r"min_crop must lie in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_options_are_refused(pictures, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small_run(pictures, tmp_path / "run", **changes)
