"""A codebook and how it learns: the state that every quantizer module keeps, apart from layout and losses.

EMA in two halves, so that the codes of a forward belong to the codebook that its backward still sees:

    training forward   adds the batch's counts and sums, summed over ranks, to the pending statistics
    later, locally     applies them: at the start of the next training forward, when the module is switched to eval,
                       when its state_dict is taken, or at update_codebook()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._dtypes import HALF
from ..ops import PreparedCodebook
from ..ops._library import check_choice
from ..ops.ema import SMOOTHINGS
from ..ops.nearest import METRICS, PRECISIONS
from .distributed import all_reduce_packed, finish_all_reduce, rank_and_world
from .frozen import Freezable
from .health import CodebookHealth, mean_length
from .kmeans import ITERATIONS, initialize_, kmeans_
from .normalize import l2_normalize
from .passes import enter, finish_first_forward_
from .statistics import (
    NEVER,
    apply_pending,
    apply_pending_,
    collect_,
    count_codes,
    dead_codes,
    observe_,
    synchronize_,
    usage_and_perplexity,
)

UPDATES = ("ema", "gradient")
DEAD_CODE_UNITS = ("tokens", "mean")
_PENDING = ("pending_counts", "pending_sums", "pending_revive")
_GRACE = 2.0  # a revived code starts at this many thresholds: 69 steps without a token at ema_decay=0.99


@dataclass(frozen=True)
class CodebookOptions:
    """How a codebook measures and learns. To change one while training, assign ``dataclasses.replace(...)``."""

    metric: str = "euclidean"
    update: str = "ema"
    ema_decay: float = 0.99
    eps: float = 1e-5
    dead_code_threshold: float = 0.0
    kmeans_init: bool = False
    usage_window: int = 100
    precision: str = "exact"
    smoothing: str = "sum_preserving"
    dead_code_unit: str = "tokens"

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        check_choice("update", self.update, UPDATES)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("smoothing", self.smoothing, SMOOTHINGS)
        check_choice("dead_code_unit", self.dead_code_unit, DEAD_CODE_UNITS)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected in [0, 1), got {self.ema_decay}")
        if not self.eps > 0:
            raise ValueError(f"eps: expected > 0, got {self.eps}")
        if not self.dead_code_threshold >= 0:
            raise ValueError(f"dead_code_threshold: expected >= 0, got {self.dead_code_threshold}")
        if self.dead_code_threshold > 0 and self.update == "gradient":
            got = f"{self.dead_code_threshold} with update='gradient'"
            raise ValueError(f"dead_code_threshold: expected 0 unless update='ema' (revival needs EMA), got {got}")
        if self.relative and self.dead_code_threshold >= 1:
            got = f"{self.dead_code_threshold} with dead_code_unit='mean' (half of all codes may be below the mean)"
            raise ValueError(f"dead_code_threshold: expected in [0, 1), got {got}")
        check_positive("usage_window", self.usage_window)

    @property
    def relative(self) -> bool:
        """Whether the threshold and what follows from it are in mean cluster sizes."""
        return self.dead_code_unit == "mean"

    @property
    def revived_size(self) -> float:
        """Cluster size that a revived code starts with, in ``dead_code_unit``."""
        return _GRACE * self.dead_code_threshold if self.dead_code_threshold else 1.0


def check_options(name: str, value: object, kind: type) -> None:
    """Raise TypeError unless ``value`` is None or an instance of ``kind``."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__} or None, got {type(value).__name__}")


def check_positive(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")


def own_state(module: nn.Module) -> dict[str, Tensor | None]:
    """What a module holds itself, before a cast."""
    return {**module._buffers, **{k: v.data for k, v in module._parameters.items() if v is not None}}


def undo_half(module: nn.Module, own: dict[str, Tensor | None]) -> None:
    """Put back, on the new device, what a cast made half precision of: counts and codes are wrong in it."""
    for name, old in own.items():
        new = getattr(module, name)
        if old is not None and new.dtype in HALF and old.dtype not in HALF:
            new.data = old.to(new.device)


class Codebook(Freezable):
    """Base of the quantizer modules: holds the codebook and its statistics.

    ``codebook`` is a buffer with update="ema" and a Parameter with update="gradient". Floating point state stays
    float32 under ``.half()`` and ``.bfloat16()`` (``.double()`` widens it).
    """

    codebook: Tensor  # [K, D]
    cluster_size: Tensor  # [K] decayed tokens per step and code
    embed_sum: Tensor  # [K, D] decayed sums of tokens
    pending_counts: Tensor  # [K] collected, not yet applied; not in the state_dict, which applies them first
    pending_sums: Tensor  # [K, D]
    pending_revive: Tensor  # bool [K] codes whose pending sum is one token to restart from
    window_counts: Tensor  # [K] exponentially windowed counts
    last_used: Tensor  # int64 [K] step of the last token
    owner: Tensor  # int64 [] never written, not in the state_dict: its memory names the sums that are on their way
    step: Tensor  # int64 [] training forwards so far
    seed: Tensor  # int64 [] of the draws for revival and k-means
    initialized: Tensor  # bool [] whether k-means has run
    start_length: Tensor  # [] mean length of the codes at the start; not in the state_dict

    def __init__(self, codebook_size: int, codebook_dim: int, options: CodebookOptions) -> None:
        super().__init__()
        check_positive("codebook_size", codebook_size)
        check_positive("codebook_dim", codebook_dim)
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.options = options
        self._deferring = 0  # how many defer_codebook_update blocks are open
        self._first_done = False  # whether the first training forward has done what only it does
        self._started = False  # whether later ones may know; both are set by ops, see passes.py
        self._number = enter(self)
        rows = self._random_rows()
        if options.update == "gradient":
            self.codebook = nn.Parameter(rows)
        else:
            self.register_buffer("codebook", rows)
            self._register_ema(rows)
        self.register_buffer("window_counts", torch.zeros(codebook_size))
        self.register_buffer("last_used", torch.full((codebook_size,), NEVER))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.register_buffer("start_length", mean_length(rows), persistent=False)

    def _random_rows(self) -> Tensor:  # [K, D]
        # of length about 1: of U(-1/K, 1/K), N(0, 0.01), N(0, 1/D) and N(0, 1), this one used the most codes after
        # 250 steps of a small autoencoder at D=8, and was among the equals at D=64 (k-means and revival beat them all)
        rows = torch.randn(self.codebook_size, self.codebook_dim)
        return l2_normalize(rows) if self.options.metric == "cosine" else rows * self.codebook_dim**-0.5

    def _register_ema(self, rows: Tensor) -> None:
        size = self._first_size()
        self.register_buffer("cluster_size", torch.full((self.codebook_size,), size))
        self.register_buffer("embed_sum", rows * size)
        self.register_buffer("pending_counts", torch.zeros(self.codebook_size), persistent=False)
        self.register_buffer("pending_sums", torch.zeros_like(rows), persistent=False)
        revive = torch.zeros(self.codebook_size, dtype=torch.bool)
        self.register_buffer("pending_revive", revive, persistent=False)
        self.register_buffer("owner", torch.zeros((), dtype=torch.int64), persistent=False)

    def _first_size(self) -> float:
        """No code is dead before it had a chance."""
        return 1.0 if self.options.relative else max(1.0, self.options.revived_size)

    def _check_tokens(self, x: Tensor) -> None:
        """Raise unless the codebook can take tokens of x's dtype and device."""
        codebook = self.codebook
        if codebook.dtype in HALF:
            raise ValueError(f"codebook: expected float32 or float64 (.half() keeps it so), got {codebook.dtype}")
        if x.dtype == torch.float64 and codebook.dtype != torch.float64:
            raise ValueError(f"x: expected {codebook.dtype} or half precision like the codebook, got {x.dtype}")
        if x.device != codebook.device:
            raise ValueError(f"codebook: expected on {x.device} like x, got {codebook.device}")

    def _rows(self) -> Tensor:  # [K, D]
        """The codes as they are searched and returned."""
        frozen = self._snapshot()
        return self._current_rows() if frozen is None else frozen.rows

    def _searched(self) -> Tensor | PreparedCodebook:  # [K, D]
        """``_rows`` as a search takes them."""
        return self._snapshot() or self._current_rows()

    def _frozen_source(self) -> Tensor | None:
        return self.codebook

    def _codes_to_freeze(self) -> tuple[Tensor, str]:
        return self._current_rows(), self.options.metric

    def _before_freezing(self) -> None:
        if not self._deferring:
            self.update_codebook()

    def _current_rows(self) -> Tensor:  # [K, D]
        normalize = self.options.metric == "cosine" and self.options.update == "gradient"
        return l2_normalize(self.codebook) if normalize else self.codebook

    # ---- the training step ----

    def _before_search(self, tokens: Tensor, mask: Tensor | None) -> None:  # [B, T, D], bool [B, T]
        """First training forward: rank 0's state, and k-means where asked for. Every one: apply what is pending."""
        self._refuse_frozen("training forward")
        if not self._started and (self.options.kmeans_init or rank_and_world()[1] > 1):
            synchronize_([tensor.detach() for tensor in self._own_tensors()], self._number)
            if self.options.kmeans_init:
                self._initialize(tokens, mask)
            finish_first_forward_(self.initialized, self._number)
        if self.options.update == "ema" and not self._deferring:
            apply_pending_(*self._ema_state(), *self._update_arguments())

    def _after_search(self, tokens: Tensor, codes: Tensor) -> None:  # [B, T, D], [B, T]
        """Collect the batch's statistics, over all ranks."""
        usage = (self.window_counts, self.last_used, self.step)
        window = self.options.usage_window
        if self.options.update == "gradient":
            observe_(tokens, codes, *usage, window)
            return
        pending = (self.pending_counts, self.pending_sums, self.pending_revive)
        threshold, relative = float(self.options.dead_code_threshold), self.options.relative
        collect_(tokens, codes, self.cluster_size, self.seed, self.owner, *pending, *usage, threshold, relative, window)

    def _health(self, tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:  # usage [], perplexity []
        """Over the window in training, of this batch alone in eval."""
        if self.training:
            recent = self.last_used > self.step - self.options.usage_window
            return usage_and_perplexity(recent, self.window_counts)
        counts = count_codes(tokens, codes, self.codebook_size)
        return usage_and_perplexity(counts > 0, counts)

    @torch.no_grad()
    def health(self) -> CodebookHealth:
        """Usage, perplexity, dead share and norm drift as tensors on the codebook's device; local, nothing is changed.

        Of all ranks, as the statistics are. See ``vqkernels.nn.margin_histogram`` for how clearly tokens choose.
        """
        recent = self.last_used > self.step - self.options.usage_window
        usage, perplexity = usage_and_perplexity(recent, self.window_counts)
        dead = ~recent
        if self.options.dead_code_threshold > 0:
            dead = dead_codes(self.cluster_size, float(self.options.dead_code_threshold), self.options.relative)
        drift = mean_length(self._rows().detach()) / self.start_length - 1
        return CodebookHealth(usage, perplexity, dead.to(usage.dtype).mean(), drift)

    def _mark_start(self) -> None:
        """From here on ``norm_drift`` counts."""
        if self.codebook.is_meta:
            return
        self.start_length.copy_(mean_length(self._rows().detach()))

    def _own_tensors(self) -> list[Tensor]:
        """What rank 0 shares at the start."""
        named = {**self._parameters, **self._buffers}
        return [tensor for name, tensor in named.items() if tensor is not None and name != "owner"]

    def _ema_state(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        pending = self.pending_counts, self.pending_sums, self.pending_revive
        return self.codebook, self.cluster_size, self.embed_sum, *pending, self.owner

    def _update_arguments(self) -> tuple[float, float, float, bool, bool, bool]:
        options = self.options
        numbers = float(options.ema_decay), float(options.eps), options.revived_size
        return *numbers, options.relative, options.metric == "cosine", options.smoothing == "plain"

    @torch.no_grad()
    def update_codebook(self) -> None:
        """Apply the pending EMA statistics now. Local, no communication; nothing happens where there are none, nor
        inside ``frozen_codebook``: they stay pending."""
        if self.options.update == "ema" and not self.codebook.is_meta and self._frozen is None:
            apply_pending(*self._ema_state(), *self._update_arguments())

    @torch.no_grad()
    def discard_update(self) -> None:
        """Forget the EMA statistics that training forwards have collected since the last update, instead of applying
        them: for a step that is left out. Local, no communication; usage and perplexity still count its tokens."""
        if self.options.update == "ema" and not self.codebook.is_meta:
            self._drop_pending()

    # ---- initialisation ----

    @torch.no_grad()
    def _initialize(self, tokens: Tensor, mask: Tensor | None) -> None:
        before = self.initialized.clone()
        arguments = (self.seed, self.options.metric, self.options.precision, self._number)
        initialize_(tokens.detach(), mask, self.codebook.detach(), self.initialized, *arguments)
        if self.options.update == "ema":  # a resumed codebook keeps its statistics
            size = self._first_size()
            self.cluster_size.copy_(torch.where(before, self.cluster_size, size))
            self.embed_sum.copy_(torch.where(before, self.embed_sum, self.codebook * size))
        self.start_length.copy_(torch.where(before, self.start_length, mean_length(self._rows().detach())))

    @torch.no_grad()
    def _fit(self, tokens: Tensor, iterations: int) -> None:  # [1, N, D]
        """k-means on ``tokens`` (all ranks'), and fresh statistics."""
        finite = tokens.isfinite().all(-1).sum()
        total = int(all_reduce_packed(finite.reshape(1))[0])
        if total == 0:
            raise ValueError("batches: expected at least one finite token, got none")
        if total < self.codebook_size:
            message = f"init_codebook: {total} tokens for {self.codebook_size} codes; the others keep their random rows"
            warnings.warn(message, stacklevel=3)
        options = self.options
        kmeans_(self.codebook, tokens, None, self.seed, options.metric, options.precision, iterations)
        self.initialized.fill_(True)
        self._mark_start()
        if options.update == "ema":
            self.cluster_size.fill_(self._first_size())
            self.embed_sum.copy_(self.codebook * self._first_size())
            self._drop_pending()

    def _tokens_of(self, batch: Tensor) -> Tensor:  # [B, T, D]
        raise NotImplementedError

    @torch.no_grad()
    def init_codebook(self, batches: Tensor | Iterable[Tensor], *, iterations: int = ITERATIONS) -> None:
        """Set the codebook to the k-means centroids of ``batches``, and forget all statistics collected before.

        Args:
            batches: one tensor, or an iterable of them, as the module's forward takes them. Their tokens are held
                in memory at once: N * codebook_dim numbers.
            iterations: Lloyd steps, >= 0 (0: k-means++ alone).

        It is ``vqkernels.kmeans`` with the module's own seed: k-means++, then Lloyd's algorithm. The same module and
        batches give the same codebook. Over several ranks every rank must call it, with its own batches
        (a rank may have none), and all get the same codebook. Tokens with NaN or Inf are left out.

        Raises:
            ValueError: no finite token at all, or a batch that forward would refuse.
            RuntimeError: inside ``frozen_codebook``.
        """
        if iterations < 0:
            raise ValueError(f"iterations: expected >= 0, got {iterations}")
        self._refuse_frozen("init_codebook")
        each = [batches] if isinstance(batches, Tensor) else batches
        tokens = [self._tokens_of(batch).reshape(1, -1, self.codebook_dim) for batch in each]
        none = self.codebook.new_zeros((1, 0, self.codebook_dim))
        self._fit(torch.cat([none, *tokens], dim=1), iterations)

    # ---- what torch calls ----

    def __setstate__(self, state: dict[str, Any]) -> None:  # of copy.deepcopy and pickle
        super().__setstate__(state)
        self._number = enter(self)

    def train(self, mode: bool = True) -> Codebook:
        """As for any module; switching to eval applies the pending statistics."""
        if self.training and not mode and not self._deferring:
            self.update_codebook()
        super().train(mode)
        return self

    def _has_pending(self) -> bool:
        """Waits for the device, as saving does anyway."""
        return not self.pending_counts.is_meta and bool(self.pending_counts.any())

    def _land(self) -> None:
        """Wait for sums that are still on their way from other ranks."""
        if self.options.update == "ema" and not self.owner.is_meta:
            finish_all_reduce(self.owner, self.pending_sums)

    def _drop_pending(self) -> None:
        self._land()
        for name in _PENDING:
            getattr(self, name).zero_()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # while deferring, what is accumulated is not saved, like the gradients so far
        if self.options.update == "ema" and not self._deferring and self._has_pending():
            self.update_codebook()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @torch.no_grad()
    def _load_from_state_dict(self, *args: Any) -> None:
        self._refuse_frozen("load_state_dict")
        super()._load_from_state_dict(*args)
        if self.options.update == "ema":
            self._drop_pending()
        self._mark_start()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        self._land()
        return super().__getstate__()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        """Moves and casts as asked, except that half precision is no place for a codebook."""
        self._land()
        own = own_state(self)
        super()._apply(fn, recurse)
        undo_half(self, own)
        return self


@contextmanager
def defer_codebook_update(module: nn.Module) -> Iterator[None]:
    """Gradient accumulation: open it once per optimiser step, around all of that step's micro-batches.

        for micro_batches in loader:
            with defer_codebook_update(model):
                for micro in micro_batches:
                    loss_of(model(micro)).backward()
            optimizer.step()

    Opening it applies what is pending. Every forward inside then sees the same codebook, and their statistics are
    summed into one EMA step, applied after the block as usual. A code revived inside restarts at a token of the first
    micro-batch that has one for it. Without it, every training forward is an EMA step of its own.

    Args:
        module: a quantizer or any module (DistributedDataParallel and compiled ones too) that holds some.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    codebooks = [each for each in module.modules() if isinstance(each, Codebook)]
    for each in codebooks:
        if not each._deferring:
            each.update_codebook()
        each._deferring += 1
    try:
        yield
    finally:
        for each in codebooks:
            each._deferring -= 1
