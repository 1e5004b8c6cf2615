"""What is profiled: tokens, a codebook, and the calls of one quantizer step on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._dtypes import accumulation_dtype
from ..nn.entropy import EntropyOptions
from ..ops import codebook_stats, ema_update_, entropy_loss, index_propagation, nearest, sample_codes
from ..ops.index_propagation import softmax_choose

EMA_DECAY = 0.99
Call = Callable[[], object]


@dataclass(frozen=True)
class StepOptions:
    """How the quantizer of the step measures and learns; the names are those of ``vqkernels.nn``."""

    metric: str = "euclidean"
    precision: str = "exact"
    gradient: str = "straight_through"  # or "rotation", or "index_propagation" (IBQ)
    update: str = "ema"
    entropy: EntropyOptions | None = None
    sampling_temperature: float = 0.0  # 0: the nearest codes

    def __post_init__(self) -> None:
        if self.propagates and self.update != "gradient":
            raise ValueError(f"update: expected gradient with gradient index_propagation, got {self.update}")
        if self.propagates and self.sampling_temperature:
            got = self.sampling_temperature
            raise ValueError(f"sampling_temperature: expected 0 with gradient index_propagation, got {got}")
        if self.metric == "dot" and not self.propagates:
            raise ValueError(f"metric: expected dot only with gradient index_propagation, got it with {self.gradient}")

    @property
    def propagates(self) -> bool:
        """Whether the gradient goes through the softmax to all codes."""
        return self.gradient == "index_propagation"


@dataclass(eq=False)
class Subject:
    """Tokens and a codebook of one dtype on one device; the calls leave both as they are."""

    x: Tensor  # [N, D]
    codebook: Tensor  # [K, D]
    source: str  # where they come from, for the report
    options: StepOptions = StepOptions()

    def __post_init__(self) -> None:
        if self.x.dim() != 2 or self.codebook.dim() != 2 or self.x.shape[1] != self.codebook.shape[1]:
            shapes = f"{list(self.x.shape)} and {list(self.codebook.shape)}"
            raise ValueError(f"tokens, codebook: expected [N, D] and [K, D], got {shapes}")
        if 0 in self.x.shape or 0 in self.codebook.shape:
            raise ValueError("tokens, codebook: expected at least one token, one code and one dimension, got none")

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def batch(self) -> Tensor:  # [1, N, D]
        """The tokens as the kernels take them."""
        return self.x[None]

    @cached_property
    def codes(self) -> Tensor:  # int64 [N]
        return self.search()

    def search(self) -> Tensor:  # codes int64 [N]
        """The public call; for products, which it does not know, what ``index_propagation`` chooses by."""
        if self.options.metric == "dot":
            wide = accumulation_dtype(self.x.dtype)
            return softmax_choose(self.batch.to(wide), self.codebook.to(wide), "dot")[0]
        return nearest(self.x, self.codebook, metric=self.options.metric, precision=self.options.precision)[0]

    def gather(self) -> tuple[Tensor, Tensor]:  # quantized [1, N, D], error [1, N]
        """Lookup and squared errors, as the layer's forward runs them."""
        if self.options.propagates:
            found = index_propagation(self.x, self.codebook, metric=self.options.metric, codes=self.codes)
            return found.quantized[None], found.commitment_error[None]
        arguments = (self.batch, self.codebook, self.codes[None])
        return backends.select("gather", *arguments)(*arguments)

    def backend(self, op: str = "nearest") -> str:
        """Which backend runs an op on these tensors."""
        if op == "nearest" and self.options.metric == "dot":
            return "torch"
        arguments = self._arguments()[op]
        wanted = backends.requested_backend()
        able = [each.backend for each in backends.candidates(op, *arguments) if each.reason is None]
        return wanted or able[0]

    def _arguments(self) -> dict[str, tuple[Any, ...]]:
        """Arguments like those of each op, for the question which backend runs it; only dtypes and shapes matter."""
        x, codebook, codes = self.batch, self.codebook, self.x.new_zeros((1, len(self.x)), dtype=torch.int64)
        wide, options = accumulation_dtype(self.x.dtype), self.options
        rows, sizes = codebook.to(wide), codebook.new_zeros(len(codebook), dtype=wide)
        error, revive = codes.to(wide), sizes.bool()
        return {
            "nearest": (x, codebook, options.metric, options.precision),
            "gather": (x, codebook, codes),
            "quantize": (x, codebook, None, options.metric, options.precision),
            "codebook_gradient": (x, x, codes, error, len(codebook)),
            "codebook_stats": (x, codes, len(codebook)),
            "add_statistics_": (x, codes, sizes, rows),
            "ema_update_": (rows, sizes, rows, sizes, rows, revive, EMA_DECAY, 1e-5, 1.0, False),
            "quantize_backward": (x, x, codes, x, error, options.gradient == "rotation"),
            "softmax_forward": (x.to(wide), rows, None, 1.0),
            "softmax_code_sums": (x.to(wide), rows, None, 1.0, error, error),
            "softmax_backward": (x.to(wide), rows, None, 1.0, error, error, error, error, None, None, True),
            "softmax_sample": (x.to(wide), rows, None, 1.0, error, error),
        }

    def backends(self) -> dict[str, str]:
        """The backend of every op of the step."""
        return {op: self.backend(op) for op in self._ops()}

    def _ops(self) -> list[str]:
        options, plain = self.options, ["gather", "quantize", "quantize_backward"]
        averages = ["codebook_stats", "add_statistics_", "ema_update_"]
        learning = averages if options.update == "ema" else ["codebook_gradient"]
        ops = ["nearest", *([] if options.propagates else [*plain, *learning])]
        softmax = options.propagates or options.entropy is not None
        if softmax or options.sampling_temperature:
            ops.append("softmax_forward")
        if options.entropy is not None and options.entropy.batch_weight > 0:
            ops.append("softmax_code_sums")
        return ops + ["softmax_backward"] * softmax + ["softmax_sample"] * (options.sampling_temperature > 0)


def step_calls(subject: Subject) -> dict[str, Call]:
    """Everything after the search in one training step of the quantizer, each with inputs of its own made before.

    Drawn codes take the place of the search; they are the call "sampling".
    """
    options, calls = subject.options, dict[str, Call]()
    if options.sampling_temperature:
        calls["sampling"] = lambda: sample_codes(
            subject.x, subject.codebook, metric=options.metric, temperature=options.sampling_temperature
        )
    calls |= _propagating_calls(subject) if options.propagates else _plain_calls(subject)
    return calls | (_entropy_calls(subject, options.entropy) if options.entropy is not None else {})


def _plain_calls(subject: Subject) -> dict[str, Call]:
    x, codes, options = subject.batch, subject.codes, subject.options
    quantized, error = subject.gather()
    dquantized, derror = torch.ones_like(x), torch.ones_like(error)
    backward = (x, quantized, codes[None], dquantized, derror, options.gradient == "rotation")
    backward_kernel = backends.select("quantize_backward", *backward)
    learning = _averages(subject) if options.update == "ema" else _codebook_gradient(subject, quantized, derror)
    return {
        "gather": subject.gather,
        "losses": lambda: error.sum() / (error.numel() * x.shape[-1]),
        **learning,
        "backward": lambda: backward_kernel(*backward),
    }


def _averages(subject: Subject) -> dict[str, Call]:
    """The codebook as moving averages of its tokens."""
    codes, count = subject.codes, len(subject.codebook)
    counts, sums = codebook_stats(subject.x, codes, count)
    state = (subject.codebook.to(sums.dtype, copy=True), torch.ones_like(counts), sums.clone())
    return {
        "statistics": lambda: codebook_stats(subject.x, codes, count),
        "ema": lambda: ema_update_(*state, counts, sums, decay=EMA_DECAY),
    }


def _codebook_gradient(
    subject: Subject,
    quantized: Tensor,  # [1, N, D]
    derror: Tensor,  # [1, N]
) -> dict[str, Call]:
    """The codebook by the gradient of its loss."""
    arguments = (subject.batch, quantized, subject.codes[None], derror, len(subject.codebook))
    kernel = backends.select("codebook_gradient", *arguments)
    return {"codebook gradient": lambda: kernel(*arguments)}


def _propagating_calls(subject: Subject) -> dict[str, Call]:
    """IBQ: the losses of ``IndexPropagationQuantizer``, and the way back through the softmax."""
    x, leaves = subject.x, (subject.x.detach().requires_grad_(), subject.codebook.detach().requires_grad_())
    found = index_propagation(*leaves, metric=subject.options.metric, codes=subject.codes)
    outputs = (found.quantized, found.commitment_error, found.codebook_error)
    above = [torch.ones_like(each) for each in outputs]
    quantized, error = outputs[0].detach(), outputs[1].detach()
    return {
        "gather": subject.gather,
        "losses": lambda: (error.sum() + (quantized - x).square().sum()) / x.numel(),
        "propagation": lambda: torch.autograd.grad(outputs, leaves, above, retain_graph=True),
    }


def _entropy_calls(subject: Subject, entropy: EntropyOptions) -> dict[str, Call]:
    """The entropy loss; a codebook of moving averages gets no gradient of it."""
    learns = subject.options.update == "gradient"
    x, codebook = subject.x.detach().requires_grad_(), subject.codebook.detach().requires_grad_(learns)

    def forward() -> Tensor:  # []
        metric, numbers = subject.options.metric, entropy.of_loss()
        return entropy_loss(x, codebook, metric=metric, weight=None, **numbers).loss

    loss, leaves = forward(), [x, codebook] if learns else [x]
    return {
        "entropy forward": forward,
        "entropy backward": lambda: torch.autograd.grad(loss, leaves, retain_graph=True),
    }


def code_use(subject: Subject) -> dict[str, float | int]:
    """How the tokens spread over the codes: codes in use, their share, and the perplexity exp(entropy)."""
    counts, _ = codebook_stats(subject.x[:, :1].contiguous(), subject.codes, len(subject.codebook))
    frequency = counts.double() / counts.sum().clamp(min=1)
    used = int((counts > 0).sum())
    perplexity = float(torch.special.entr(frequency).sum().exp())
    return {"codes_used": used, "usage": used / len(counts), "perplexity": perplexity}
