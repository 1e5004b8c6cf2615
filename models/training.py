"""The training loop, on accelerate: one process or many, resumable at the exact next step."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vqkernels.nn import Codebook, defer_codebook_update

from .checkpoint import (
    different_options,
    load_newest,
    random_state,
    replace_folder,
    restore_random_state,
    save_checkpoint,
)
from .config import TrainConfig, save_config, to_dict
from .config_reader import convert
from .data import EndlessBatches, ImageFolder
from .finite_guard import FiniteGuard, NonFiniteLossError
from .image_model import ImageModel
from .model_config import ModelConfig
from .objective import RECONSTRUCTION_PARTS, Objective
from .optimization import learning_rate_at, make_optimizer
from .pretrained import load_pretrained, make_model
from .process import broadcast_object_list, gather_object, make_accelerator, peak_memory, process_settings
from .run_log import NETWORKS, RunLog, delete_run, run_exists
from .sharding import (
    clip_gradients,
    gathered,
    load_model_state,
    load_optimizer_state,
    reduce_whole_gradients,
    set_gradient_sync,
    shard,
)
from .validation import HeldOut
from .weight_average import WeightAverage

__all__ = ["NonFiniteLossError", "TrainConfig", "TrainProgress", "TrainResult", "train"]

COLLAPSE_FROM = 200  # steps: twice the window over which usage is taken
MAX_NAMED = 5  # unreadable files that the warning names


@dataclass(frozen=True)
class TrainProgress:
    """What the progress callback is given after every step, on the main process."""

    step: int
    steps: int | None
    """Steps in all; None where only the time budget ends the run."""
    seconds: float
    """Time used, over all resumed parts."""
    seconds_left: float
    share: float
    """How much of the run is done, 0 to 1."""
    metrics: dict[str, float]
    """The newest value of everything that was logged."""


@dataclass
class TrainResult:
    """What train returns; the same on every process, except that only the main one holds the history."""

    output: Path
    model: ImageModel
    """The averaged weights, in eval mode on the CPU; also saved under output/model."""
    steps: int
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl."""
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Files of the data that could not be read, with the reason; also named in a warning at the start."""


def _skipped_in_words(data: ImageFolder) -> str:
    count, found = len(data.skipped), len(data.skipped) + len(data)
    reasons = "; ".join(reason for _, reason in data.skipped[:MAX_NAMED])
    more = f"; and {count - MAX_NAMED} more" if count > MAX_NAMED else ""
    return f"skipped {count} of {found} image files: {reasons}{more}"


def _take_weights(model: ImageModel, folder: str) -> None:
    """Gives a new model the weights and codes of a saved one; options that shape neither may differ.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: the saved model has another shape; names the option.
    """
    saved = load_pretrained(folder)
    state, own = saved.state_dict(), model.state_dict()
    if type(saved) is type(model) and {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in own.items()
    }:
        model.load_state_dict(state)
        for module in model.modules():
            if isinstance(module, Codebook):
                module.initialized.fill_(True)  # kmeans_init must not throw these codes away
        return
    different = "; ".join(different_options(to_dict(model.config), to_dict(saved.config), "model"))
    raise ValueError(f"cannot start from {folder!r}: {different} in it")


class Trainer:
    """One run. `train` is the way in."""

    def __init__(self, config: TrainConfig, progress: Callable[[TrainProgress], None] | None) -> None:
        self.config, self.progress = config, progress
        self.output = Path(config.output)
        self.accelerator = make_accelerator(config)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.sharded = config.sharding == "full" and self.accelerator.num_processes > 1
        self._prepare_output()
        self.data = ImageFolder(
            config.data,
            config.image_size,
            seed=config.seed,
            min_crop=config.min_crop,
            color_jitter=config.color_jitter,
            cache_bytes=config.cache_mb << 20,
        )
        if self.is_main and self.data.skipped:
            warnings.warn(_skipped_in_words(self.data), stacklevel=3)
        self._build_model()
        self.step, self.seconds_before = 0, 0.0
        self.names = (*self.objective.names, "grad_norm")  # summed up on the device between two lines of metrics.jsonl
        self.window, self.window_steps, self.window_started = torch.zeros(len(self.names), device=self.device), 0, 0.0
        self.metrics: dict[str, float] = {}
        self.rate = 0.0
        self.guard = FiniteGuard(config, self.names, self.accelerator.scaler, self.device)
        self.sampled_at, self.alarmed = -1, False
        state = self._restore() if config.resume else None
        if self.is_main:
            self.held_out = HeldOut(
                config.validation, config.data, config.image_size, self.raw_model.factor, self.data.files
            )
        # the first thing that writes, after most that can be wrong with the options
        self.log = RunLog(self.output, self.step) if self.is_main else None
        if self.log is not None:
            for line in self.log.history:
                self.metrics.update({name: value for name, value in line.items() if name not in ("step", NETWORKS)})
            save_config(config, self.output / "config.yaml")
            if (self.output / "samples" / f"step-{self.step:08d}.png").exists():
                self.sampled_at = self.step  # by the run before it was stopped
        self.batches = self._batches()
        self._warm_up()
        if state is not None:  # last, as what is built above may draw random numbers
            restore_random_state(state["random"][self.accelerator.process_index])
        if self.log is not None:  # after all that can be wrong with the options: it makes the folder that of a run
            self.log.networks(self.step, self.objective.networks())
        self.started = time.perf_counter()

    # Set-up

    def _prepare_output(self) -> None:
        if self.is_main:
            if run_exists(self.output) and self.config.overwrite:
                delete_run(self.output)
            if run_exists(self.output) and not self.config.resume:
                raise FileExistsError(
                    f"output {str(self.output)!r} already holds a run; resume or overwrite it, or name another folder"
                )
        self.accelerator.wait_for_everyone()
        if self.config.trackers:
            self.accelerator.init_trackers("vqkernels", config={"config": str(to_dict(self.config))})

    def _build_model(self) -> None:
        torch.manual_seed(self.config.seed)
        self.raw_model = make_model(self.config.model)
        if self.config.start_from is not None:
            _take_weights(self.raw_model, self.config.start_from)
        if self.config.channels_last and not self.sharded:  # FSDP slices contiguous weights alone
            nn.Module.to(self.raw_model, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = WeightAverage(self.raw_model.to(self.device), self.config.weight_ema_decay)
        self.objective = Objective(self.config, self.raw_model, self.accelerator)
        if self.sharded:
            shard(self.raw_model, self.device)
            self.average.follow(self.raw_model)
        self.model: nn.Module = self.raw_model
        self.optimizer = self.accelerator.prepare(make_optimizer(self.raw_model, self.config))
        if not self.sharded:
            self.model = self.accelerator.prepare(self.raw_model)

    def _batches(self) -> Iterator[Tensor]:  # [B, 3, S, S]
        config, ranks = self.config, self.accelerator.num_processes
        order = EndlessBatches(
            len(self.data),
            config.batch_size,
            seed=config.seed,
            first_batch=self.step * config.gradient_accumulation,
            rank=self.accelerator.process_index,
            ranks=ranks,
        )
        loader = DataLoader(
            self.data,
            batch_sampler=order,
            num_workers=config.num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(config.seed),  # else it draws from the global generator
        )
        return iter(loader)

    def _warm_up(self) -> None:
        """Compiles the kernels on their first use, before the clock starts; changes no state."""
        model = self.average.model
        if model.reconstructs:
            model.reconstruct(torch.zeros(1, model.in_channels, model.factor, model.factor, device=self.device))

    # Checkpoints

    def _restore(self) -> dict[str, Any] | None:
        state = load_newest(self.output / "checkpoints")
        if state is None:
            return None
        saved = to_dict(convert(state["model_config"], ModelConfig, "model"))  # with the options that are new since
        different = different_options(to_dict(self.config.model), saved, "model")
        if different:
            raise ValueError(f"cannot resume {str(self.output)!r}: {'; '.join(different)} in the checkpoint")
        for name, mine in self._order_options().items():
            before = state["order"].get(name, mine)  # an option that is new since
            if mine != before:
                raise ValueError(
                    f"cannot resume {str(self.output)!r}: {name} is {mine} now and was {before}, "
                    "so the next step would see other images"
                )
        load_model_state(self.raw_model, state["model"])
        self.average.model.load_state_dict(state["average"])
        self.average.follow(self.raw_model)
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.objective.load_state_dict(state.get("discriminator", {}))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds_before = state["step"], state["seconds"]
        self.guard.skipped = state.get("skipped", 0)
        self.window_started = state["window_started"]
        if state.get("window_names") == list(self.names):  # else some figures are new: the next line is of fewer steps
            self.window, self.window_steps = state["window"].to(self.device), state["window_steps"]
        return state

    def _order_options(self) -> dict[str, int | float]:
        """What the order of the images and their crops follow from; a resumed run must agree."""
        config = self.config
        return {
            "processes": self.accelerator.num_processes,
            "batch_size": config.batch_size,
            "gradient_accumulation": config.gradient_accumulation,
            "image_size": config.image_size,
            "min_crop": config.min_crop,
            "color_jitter": config.color_jitter,
            "seed": config.seed,
            "images": len(self.data),
        }

    def _save_checkpoint(self) -> None:
        self.guard.check_now()
        random, window = gather_object([random_state()]), self.accelerator.reduce(self.window.clone(), reduction="mean")
        self.average.gather()
        model, optimizer = gathered(self.raw_model.state_dict()), gathered(self.optimizer.state_dict())
        if not self.is_main:
            return
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "seconds": self._seconds(),
            "skipped": self.guard.skipped,
            "model_config": to_dict(self.config.model),
            "order": self._order_options(),
            "model": model,
            "average": self.average.model.state_dict(),
            "optimizer": optimizer,
            "discriminator": self.objective.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": random,
            "window": window,
            "window_names": list(self.names),
            "window_steps": self.window_steps,
            "window_started": self.window_started,
        }
        save_checkpoint(self.output / "checkpoints", self.step, state, self.config.keep_checkpoints)

    # Time

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _share_done(self) -> float:
        """0 to 1, by steps or by time, whichever is further; the same on all processes."""
        share = self.step / self.config.steps if self.config.steps is not None else 0.0
        if self.config.max_seconds is None:
            return share
        used = [self._seconds() / self.config.max_seconds]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(used)  # clocks differ, and all processes must stop at one step
        return min(1.0, max(share, used[0]))

    # One step

    def _micro_batch(self, last: bool) -> Tensor:  # as the objective's names
        images = next(self.batches).to(self.device, non_blocking=True)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        set_gradient_sync(self.model, last)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                out = self.model(images)
            return self.objective.backward(images, out)

    def _clip_gradients(self, max_norm: float) -> Tensor:  # []
        if not self.sharded:
            return self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        reduce_whole_gradients(self.model.parameters())
        return clip_gradients(self.model.parameters(), max_norm)

    def _train_step(self, share: float) -> None:
        self.rate = learning_rate_at(self.config, self.step, share)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        micro_batches = self.config.gradient_accumulation
        with ExitStack() as stack:
            if micro_batches > 1:
                stack.enter_context(defer_codebook_update(self.raw_model))
            parts = torch.stack([self._micro_batch(number == micro_batches - 1) for number in range(micro_batches)])
        norm = self._clip_gradients(self.config.max_grad_norm or math.inf)
        values = torch.cat([parts.mean(dim=0), norm.detach().float().reshape(1)])
        if self.guard.leaves_out(self.step, values):
            self.optimizer.zero_grad()
            self.objective.zero_grad()
            self.raw_model.discard_codebook_updates()
            self.step += 1
            return
        self.guard.check(self.step, values)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.step(self.rate)
        self.raw_model.update_codebooks()  # now, so that the copy of its buffers is up to date
        self.step += 1
        self.average.update(self.raw_model, self.step)
        self.window += values
        self.window_steps += 1

    # Reports

    def _log_window(self) -> None:
        """Means over the steps and processes since the last line."""
        if not self.window_steps:
            return
        means = self.accelerator.reduce(self.window / self.window_steps, reduction="mean").tolist()
        seconds = self._seconds()
        images = self.window_steps * self.config.gradient_accumulation * self.config.batch_size
        images *= self.accelerator.num_processes
        values = {"learning_rate": self.rate, **dict(zip(self.names, means, strict=True))}
        if self.raw_model.reconstructs:
            values["psnr"] = 10 * math.log10(4 / max(values["mse"], 1e-12))
        else:  # what a GAN makes is no attempt at the images of the batch
            values = {name: value for name, value in values.items() if name not in RECONSTRUCTION_PARTS}
        values |= {name: value.item() for name, value in self.raw_model.health().items()}
        values["images_per_second"] = images / max(seconds - self.window_started, 1e-9)
        values["peak_memory_mib"] = peak_memory(self.device)
        values["seconds"] = seconds
        values["skipped_steps"] = self.guard.skipped
        usages = [value for name, value in values.items() if name.endswith("usage")]
        if usages:
            self._watch_usage(min(usages))
        self.window.zero_()
        self.window_steps, self.window_started = 0, seconds
        self._publish(values)

    def _watch_usage(self, usage: float) -> None:
        """One warning in a run whose codebook has collapsed."""
        if usage >= self.config.collapse_usage or self.step < COLLAPSE_FROM or self.alarmed:
            return
        self.alarmed = True
        if self.is_main:
            warnings.warn(
                f"step {self.step}: {usage:.1%} of the codebook is in use; what helps: "
                "a higher dead_code_threshold, kmeans_init, a smaller codebook_dim, metric: cosine",
                stacklevel=2,
            )

    def _publish(self, values: dict[str, float]) -> None:
        """To the log, to the trackers, and to the progress callback as the newest values."""
        self.metrics.update(values)
        if self.log is not None:
            self.log.scalars(self.step, values)
        if self.config.trackers:
            self.accelerator.log(values, step=self.step)

    def _sample(self) -> None:
        self.average.gather()
        if self.log is None or self.sampled_at == self.step:
            return
        self.sampled_at = self.step
        figures, picture = self.held_out.evaluate(self.average.model)
        self.log.picture(self.step, picture)
        if figures:
            self._publish(figures)

    def _report(self, share: float) -> None:
        if not self.is_main or self.progress is None:
            return
        seconds = self._seconds()
        left = seconds * (1 - share) / share if share > 0 else math.inf
        if self.config.max_seconds is not None:
            left = min(left, max(self.config.max_seconds - seconds, 0.0))
        self.progress(TrainProgress(self.step, self.config.steps, seconds, left, share, dict(self.metrics)))

    # The loop

    def _every(self, period: int) -> bool:
        return period > 0 and self.step % period == 0

    def run(self) -> TrainResult:
        """Trains to the end of the steps or of the time budget, and saves the model."""
        self.model.train()
        share, saved_at = self._share_done(), self.step
        self.objective.begin(self.step, share)
        while share < 1:
            self._train_step(share)
            share = self._share_done()
            # a line ends where a loss begins, so that none mixes steps with it and steps without
            if self.objective.begin(self.step, share) or self._every(self.config.log_every):
                self._log_window()
            if self._every(self.config.sample_every):
                self._sample()
                if self.log is not None:
                    self.log.draw_curves()
            if self._every(self.config.checkpoint_every):
                self._save_checkpoint()
                saved_at = self.step
            self._report(share)
        return self._finish(saved_at)

    def end(self) -> None:
        """Ends the process group, after DistributedDataParallel's wrapper: where that is the last to hold the group, it
        waits for gloo's thread and keeps the GIL meanwhile, which that thread may be waiting for."""
        self.model = self.raw_model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _finish(self, saved_at: int) -> TrainResult:
        seconds = self._seconds()
        self._log_window()
        if self.is_main and self.step < (warmup := self.config.warmup_steps):
            text = f"the run ended at step {self.step} of warmup_steps {warmup}, so its learning rate never reached"
            warnings.warn(f"{text} {self.config.learning_rate:g}", stacklevel=3)
        if saved_at != self.step or self.step == 0:
            self._save_checkpoint()
        self._sample()
        if self.log is not None:
            self.log.draw_curves()
            replace_folder(self.output / "model", self.average.model.save_pretrained)
            self.log.close()
        self.accelerator.wait_for_everyone()
        history = self.log.history if self.log is not None else []
        return TrainResult(self.output, self.average.model.cpu(), self.step, seconds, history, self.data.skipped)


def train(
    config: TrainConfig,
    *,
    progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Trains a model.

    Start it under `torchrun --nproc-per-node N` for several processes; batch_size is per process. The order of
    the images and their crops follow from the seed and the step alone, so a resumed run takes the same next step
    as one that was never stopped: bit for bit on a CPU with the same number of threads and `steps` instead of a
    time budget, as the learning rate then does not depend on the clock.

    Args:
        config: all options, see TrainConfig. A folder that already holds a run needs `resume` or `overwrite`.
        progress: called on the main process after every step.

    Returns:
        the averaged weights as a model in eval mode, and the history; output/model holds the same model.

    Raises:
        ValueError: an option is wrong, the data holds no image, or the checkpoints belong to another model.
        FileExistsError: output holds a run already.
        NonFiniteLossError: the loss or its gradient became NaN or infinite; names the step.
    """
    with process_settings(config):
        trainer = Trainer(dataclasses.replace(config), progress)
        result = trainer.run()
        trainer.end()
        return result
