"""A few steps of `vqkernels train`, with the quantizer's part of each: forward, backward and codebook update."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqkernels.benchmarks.runner import quartiles
from vqkernels.models import TrainConfig, TrainProgress, VectorQuantizerConfig, load_config
from vqkernels.nn import EntropyOptions, IndexPropagationQuantizer, QuantizerOutput, VectorQuantizer
from vqkernels.ops import EntropyLoss
from vqkernels.profiling.clock import Clock
from vqkernels.profiling.subject import StepOptions, Subject
from vqkernels.profiling.trace import make_profiler, named_range, start, stop, write_trace

from .profile_options import ProfileConfig

WARM_UP_STEPS = 3  # the first one runs k-means, the next ones still allocate
PICTURES = 8
NEVER = 1 << 30
PARTS = ("quantizer forward", "entropy forward", "quantizer backward", "entropy backward", "codebook update")
GRAIN = 16  # pixels of a generated picture's coarsest pattern


def generate_pictures(folder: Path, size: int, seed: int) -> None:
    """Smooth random colours with some noise, a little larger than a crop."""
    random = np.random.default_rng(seed)
    side = size + size // 4
    for number in range(PICTURES):
        coarse = random.integers(0, 256, (max(2, side // GRAIN), max(2, side // GRAIN), 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + random.integers(-12, 13, smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")


@dataclass
class QuantizerWatch:
    """Hooks of one quantizer: when its forward, its backward and its codebook's update begin and end.

    The entropy loss inside it has spans of its own, which are no part of the quantizer's.
    """

    quantizer: VectorQuantizer | IndexPropagationQuantizer
    clock: Clock
    ends: list[Any]  # of the steps so far
    spans: list[tuple[str, int, Any, Any]] = field(default_factory=list)  # what, in which step, from, to
    seen: Tensor | None = None  # the newest input, [B, dim, *spatial] or [..., dim]
    _begun: dict[str, Any] = field(default_factory=dict)
    _interrupted: set[str] = field(default_factory=set)
    _ranges: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.quantizer.register_forward_pre_hook(self._before)
        self.quantizer.register_forward_hook(self._after)
        update = self.quantizer.update_codebook

        def timed_update() -> None:
            self._begin("codebook update")
            with named_range("quantizer codebook update", self.clock.device):
                update()
            self._end("codebook update")

        self.quantizer.update_codebook = timed_update  # type: ignore[method-assign]
        self._watch_entropy()

    def _watch_entropy(self) -> None:
        entropy_of = self.quantizer.entropy_of

        def timed_entropy(
            tokens: Tensor,  # [B, T, D]
            rows: Tensor,  # [K, D]
            mask: Tensor | None,  # bool [B, T]
        ) -> EntropyLoss:
            own = tokens.view_as(tokens)  # its gradient is that of the entropy loss alone
            self._interrupt("quantizer forward", "entropy forward")
            with named_range("quantizer entropy forward", self.clock.device):
                found = entropy_of(own, rows, mask)
            self._resume("quantizer forward", "entropy forward")
            if own.requires_grad:
                found.loss.register_hook(lambda _gradient: self._interrupt("quantizer backward", "entropy backward"))
                own.register_hook(lambda _gradient: self._resume("quantizer backward", "entropy backward"))
            return found

        self.quantizer.entropy_of = timed_entropy  # type: ignore[method-assign]

    def _interrupt(self, outer: str, name: str) -> None:
        """Begins a span, and stops the one around it where there is one."""
        if outer in self._begun:
            self._end(outer)
            self._interrupted.add(outer)
        self._begin(name)

    def _resume(self, outer: str, name: str) -> None:
        self._end(name)
        if outer in self._interrupted:
            self._interrupted.remove(outer)
            self._begin(outer)

    def _begin(self, name: str) -> None:
        self._begun[name] = self.clock.now()

    def _end(self, name: str) -> None:
        if name in self._begun:
            self.spans.append((name, len(self.ends), self._begun.pop(name), self.clock.now()))

    def _before(self, _module: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        self.seen = x.detach()
        if x.requires_grad:  # its gradient is the last that the quantizer's backward makes
            x.register_hook(lambda _gradient: self._end("quantizer backward"))
        if torch.is_grad_enabled():
            self._ranges.append(named_range("quantizer forward", self.clock.device))
            self._ranges[-1].__enter__()
            self._begin("quantizer forward")

    def _after(self, _module: Any, _arguments: tuple[Any, ...], out: QuantizerOutput) -> None:
        if not self._ranges:
            return
        self._end("quantizer forward")
        self._ranges.pop().__exit__(None, None, None)
        if out.quantized.requires_grad:  # the decoder's backward is over when this gradient is there
            out.quantized.register_hook(lambda _gradient: self._begin("quantizer backward"))

    def tokens(self) -> Tensor:  # [N, D]
        """The newest input as the search saw it."""
        assert self.seen is not None
        quantizer, x = self.quantizer, self.seen
        tokens = x.flatten(2).transpose(1, 2) if quantizer.layout.first else x
        with torch.no_grad():
            return quantizer.project_in(tokens.float()).reshape(-1, quantizer.codebook_dim).contiguous()


class Enough(Exception):
    """Raised after the last step: the validation and the checkpoint that would follow are of no interest."""


class StepWatch:
    """The progress callback of a run: when each step ended; profiles the last one and ends the run after it."""

    def __init__(self, clock: Clock, steps: int) -> None:
        self.clock, self.steps = clock, steps
        self.ends: list[Any] = []
        self.profiler = make_profiler(clock.device)

    def __call__(self, progress: TrainProgress) -> None:
        self.ends.append(self.clock.now())
        if progress.step == self.steps - 1:
            start(self.profiler)
        elif progress.step == self.steps:
            stop(self.profiler, self.clock.device)
            raise Enough


def _prepare(options: ProfileConfig, device: torch.device, scratch: Path) -> tuple[TrainConfig, str]:
    """The user's training config for a few steps in a scratch folder, and a word about its pictures."""
    assert options.training is not None
    config: TrainConfig = load_config(options.training)
    folder = options.images or config.data
    pictures = f"the images in {folder}"
    quantizer = getattr(config.model, "quantizer", None)
    if not isinstance(quantizer, VectorQuantizerConfig):
        got = getattr(quantizer, "kind", None)
        kind = f"a quantizer of kind {got}" if got else f"a model of kind {getattr(config.model, 'kind', 'unknown')}"
        raise ValueError(
            f"{options.training}: expected a model with one quantizer that searches a codebook (kind vq), got {kind}"
        )
    if folder is None:
        folder = str(scratch / "pictures")
        Path(folder).mkdir()
        generate_pictures(Path(folder), config.image_size, options.seed)
        pictures = f"{PICTURES} generated pictures, as neither the config nor --images names a folder"
    changed: dict[str, Any] = {
        "data": folder,
        "validation": None,
        "output": str(scratch / "run"),
        "steps": WARM_UP_STEPS + options.steps + 1,
        "max_seconds": None,
        "device": device.type,
        "log_every": NEVER,
        "sample_every": 0,
        "checkpoint_every": NEVER,
        "trackers": [],
        "resume": False,
        "overwrite": False,
    }
    return dataclasses.replace(config, **changed), pictures


def _parts(watch: QuantizerWatch, clock: Clock) -> dict[str, Any]:
    """Medians over the timed steps; the last one, which the profiler slowed down, is not among them."""
    ends, timed = watch.ends, range(WARM_UP_STEPS, len(watch.ends) - 1)
    times = [clock.between(ends[step - 1], ends[step]) for step in timed]
    sums = {name: [0.0] * len(ends) for name in PARTS}
    for name, step, since, until in watch.spans:
        if step < len(ends):
            sums[name][step] += clock.between(since, until)
    occurred = {name for name, _, _, _ in watch.spans}
    parts = {name: statistics.median(sums[name][step] for step in timed) for name in PARTS if name in occurred}
    step_seconds, quantizer = statistics.median(times), sum(parts.values())
    return {
        "step_seconds": step_seconds,
        "quartiles": list(quartiles(times)),
        "steps": len(times),
        "quantizer_seconds": quantizer,
        "quantizer_share": quantizer / step_seconds,
        "parts": {**parts, "rest": max(0.0, step_seconds - quantizer)},
    }


def _step_options(config: VectorQuantizerConfig) -> StepOptions:
    entropy = config.entropy
    return StepOptions(
        metric=config.metric,
        precision=config.precision,
        gradient=config.gradient,
        update=config.update,
        entropy=EntropyOptions(**dataclasses.asdict(entropy)) if entropy.weight > 0 else None,
        sampling_temperature=config.sampling_temperature,
    )


def profile_training(
    options: ProfileConfig,
    device: torch.device,
    trace: Path,
) -> tuple[dict[str, Any], dict[str, Any], Subject]:
    """Runs the training loop for a few steps.

    Args:
        options: the command's.
        device: where to train.
        trace: file for the trace of the last step.

    Returns:
        the document's ``training`` and ``trace``, and the last step's tokens with the codebook that they met.

    Raises:
        ValueError: a mistake in the config, or a folder without images.
    """
    from vqkernels.models.training import Trainer

    with tempfile.TemporaryDirectory() as scratch:
        config, pictures = _prepare(options, device, Path(scratch))
        assert config.steps is not None
        clock = Clock(device)
        steps = StepWatch(clock, config.steps)
        trainer = Trainer(config, steps)
        watch = QuantizerWatch(trainer.raw_model.quantizer, clock, steps.ends)
        with contextlib.suppress(Enough):
            trainer.run()
        if trainer.log is not None:
            trainer.log.close()
        trainer.accelerator.end_training()
        operators = write_trace(steps.profiler, trace, device)
    size, batch, micro = config.image_size, config.batch_size, config.gradient_accumulation
    training = {"config": str(options.training), "pictures": pictures, **_parts(watch, clock)}
    training["batch"] = f"{batch} pictures of {size} x {size}" + (f", {micro} of them a step" if micro > 1 else "")
    subject = Subject(
        watch.tokens(),
        trainer.raw_model.quantizer.codebook.detach().clone(),
        f"tokens of the encoder of {options.training} after {config.steps} steps on {pictures}, and its codebook",
        _step_options(config.model.quantizer),
    )
    return training, {"of": "one training step", "operators": operators}, subject
