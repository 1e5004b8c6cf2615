"""VectorQuantizer: the layer between an encoder and a decoder (van den Oord et al. 2017, "Neural Discrete
Representation Learning")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import EntropyLoss, Quantized, entropy_loss, lookup, nearest, quantize
from ..ops._library import check_choice
from ..ops.quantize import GRADIENTS
from .codebook import Codebook, CodebookOptions, check_options, check_positive
from .draws import SamplingOptions, draw_codes
from .entropy import EntropyOptions, EntropyQuantizerOutput, no_entropy
from .layout import Layout, led_back, mean_error, no_autocast, projected
from .normalize import l2_normalize
from .output import QuantizerOutput


class VectorQuantizer(Codebook):
    """Replaces every token by its nearest code.

        vq = VectorQuantizer(64, 1024, channels="first")
        quantized, codes, loss = vq(encoder(images))        # [B, 64, h, w], int64 [B, h, w], scalar
        (reconstruction_loss(decoder(quantized)) + loss).backward()

    Args:
        dim: channels of x.
        codebook_size: K.
        codebook_dim: D, channels of a code; where it differs from ``dim``, a Linear leads in and one out.
        metric: "euclidean", or "cosine": tokens and codes have length 1, and so has ``quantized``.
        channels: "last" for x [..., dim], "first" for x [B, dim, *spatial]; never guessed.
        update: how the codebook learns: "ema" of its tokens (no gradient, no optimiser), or "gradient" of
            ``codebook_loss`` (``codebook`` is a Parameter).
        ema_decay, eps: of the EMA and its Laplace smoothing (see ``vqkernels.ema_update_``).
        commitment_weight: beta. It weighs the term that trains the encoder, as in eq. 3 of the paper.
        codebook_weight: weight of the term that trains the codebook; without effect with update="ema".
        gradient: what ``quantized`` passes back to x: "straight_through" or "rotation" (Fifty et al. 2024).
        dead_code_threshold: a code whose ``cluster_size`` (decayed tokens per step, of all ranks together) falls
            below this restarts at a token of the batch. 0: never. Keep it well under N / K, the tokens per code
            and step, or healthy codes restart too. update="ema" only.
        dead_code_unit: of the threshold: "tokens", or "mean", the mean ``cluster_size`` of all codes, N / K once the
            EMA has settled (N: tokens of a step over all ranks). In (0, 1) then; it starts at a mean of 1 token.
        kmeans_init: k-means on the first training batch (never in eval: until then codes are the random start).
            ``init_codebook`` is the explicit way, over as many batches as you like.
        usage_window: training forwards that ``usage`` and ``perplexity`` look back on.
        precision: "exact" or "fast" search, see ``vqkernels.nearest``.
        smoothing: Laplace smoothing of the cluster sizes, "sum_preserving" or "plain" (see ``vqkernels.ema_update_``).
        entropy: an entropy loss over the codebook in training, see ``EntropyOptions``. It is part of ``loss``; forward
            then returns an ``EntropyQuantizerOutput``.
        sampling: in training, draw codes instead of taking the nearest, see ``SamplingOptions``. A recomputed forward
            (activation checkpointing) draws its codes again only if no other training forward came in between.

    **When the EMA codebook changes.** A training forward only collects statistics. They take effect at the start of
    the next training forward, on ``.eval()``, on ``state_dict()`` or by ``update_codebook()``. So the codes of a
    forward belong to the codebook that is in place until after its backward, and activation checkpointing, which
    runs the forward again, finds the same codes; that second run changes no state. For gradient accumulation see
    ``defer_codebook_update``; use it too where several forwards precede one backward.

    **Several processes.** Every training forward of every rank takes part in one all_reduce of the counts [K], which
    ``usage`` and ``perplexity`` need at once, and one of the sums [K, D], which runs behind the decoder's forward and
    is waited for where it is applied; also with no token or all of them masked; eval is local. The first one also
    takes rank 0's codebook, so that ranks may start from different seeds. From then on all ranks hold the same bits,
    and it makes no difference whether DistributedDataParallel broadcasts rank 0's buffers before every forward, which
    for a codebook that each rank updates alone loses the other ranks' tokens. ``state_dict()`` may be taken on one
    rank only.

    **Graphs.** No training step waits for the device, the first one with k-means neither, and nothing in it depends on
    Python state: it compiles with fullgraph=True and can be captured in a CUDA graph, after ``update_codebook()`` where
    there are several ranks. ``vqkernels.export`` writes it for inference.

    **Precision.** The codebook and its statistics stay float32 (float64 after ``.double()``), whatever autocast or
    ``.half()`` says; x may be float16 or bfloat16, and ``quantized`` then is too.

    The random start is gaussian N(0, 1/D), for cosine of length 1. ``cluster_size`` starts at 1, or at twice the dead
    code threshold where that is more; a revived code starts at twice the threshold.
    """

    draw: Tensor  # int64 [] training forwards that drew codes; with `sampling` alone

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_dim: int | None = None,
        metric: str = "euclidean",
        channels: str = "last",
        update: str = "ema",
        ema_decay: float = 0.99,
        eps: float = 1e-5,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        gradient: str = "straight_through",
        dead_code_threshold: float = 0.0,
        kmeans_init: bool = False,
        usage_window: int = 100,
        precision: str = "exact",
        smoothing: str = "sum_preserving",
        dead_code_unit: str = "tokens",
        entropy: EntropyOptions | None = None,
        sampling: SamplingOptions | None = None,
    ) -> None:
        check_positive("dim", dim)
        learning = (metric, update, ema_decay, eps, dead_code_threshold, kmeans_init)
        options = CodebookOptions(*learning, usage_window, precision, smoothing, dead_code_unit)
        super().__init__(codebook_size, dim if codebook_dim is None else codebook_dim, options)
        self.layout = Layout(dim, channels)
        check_choice("gradient", gradient, GRADIENTS)
        for name, weight in (("commitment_weight", commitment_weight), ("codebook_weight", codebook_weight)):
            if not weight >= 0:
                raise ValueError(f"{name}: expected >= 0, got {weight}")
        self.gradient = gradient
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        check_options("entropy", entropy, EntropyOptions)
        check_options("sampling", sampling, SamplingOptions)
        self.entropy = entropy
        self.sampling = sampling
        if sampling is not None:
            self.register_buffer("draw", torch.zeros((), dtype=torch.int64))
        linked = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if linked else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if linked else nn.Identity()

    @property
    def dim(self) -> int:
        """Channels of x."""
        return self.layout.dim

    @property
    def channels(self) -> str:
        """Which axis of x they are: "last" or "first"."""
        return self.layout.channels

    def extra_repr(self) -> str:
        names = (
            *("metric", "update", "ema_decay", "eps", "smoothing", "dead_code_threshold", "dead_code_unit"),
            *("kmeans_init", "usage_window", "precision"),
        )
        shape = f"dim={self.dim}, codebook_size={self.codebook_size}, codebook_dim={self.codebook_dim}"
        own = f"channels={self.channels!r}, gradient={self.gradient!r}, commitment_weight={self.commitment_weight}"
        learning = [f"{name}={getattr(self.options, name)!r}" for name in names]
        drawn = [f"{name}={value}" for name in ("entropy", "sampling") if (value := getattr(self, name)) is not None]
        return ", ".join([shape, own, *learning, *drawn])

    def forward(
        self,
        x: Tensor,  # [..., dim] or [B, dim, *spatial]
        mask: Tensor | None = None,  # bool, x's shape without its channel axis
    ) -> QuantizerOutput:
        """Quantize x; in training mode also collect what the codebook learns from.

        Args:
            x: float32, float16 or bfloat16 (float64 with a float64 module); any strides, none is copied just for
                being channels-first.
            mask: True where a token is real. Elsewhere: code -1, quantized 0, no gradient, in no loss and statistic.

        Returns:
            ``QuantizerOutput``. Losses are means over the real tokens' codebook_dim entries, 0 if there are none,
            and the same in eval. ``usage`` and ``perplexity`` are of the window and of all ranks in training, of
            this batch in eval. A token with NaN or Inf: code -1, quantized NaN, losses NaN, in no statistic,
            counted in ``non_finite``.

        Raises:
            TypeError, ValueError: a bad argument, named.
        """
        self._check(x, mask)
        with no_autocast(x):
            tokens, real = self._tokens(x, mask)
            if self.training:
                self._before_search(tokens, real)
            rows = self._rows()
            found = quantize(
                tokens,
                self._snapshot() or rows,
                metric=self.options.metric,
                precision=self.options.precision,
                gradient=self.gradient,
                mask=real,
                codes=self._drawn(tokens, rows),
            )
            if self.training:
                self._after_search(tokens.detach(), found.codes)
            out = self._output(x, tokens.detach(), real, found)
            return out if self.entropy is None else self._with_entropy(out, tokens, rows, real)

    def _drawn(self, tokens: Tensor, rows: Tensor) -> Tensor | None:  # [B, T, D], [K, D] -> int64 [B, T]
        if self.sampling is None or not self.training:
            return None
        return draw_codes(tokens, rows, self.options.metric, self.sampling.temperature, self.seed, self.draw)

    def _with_entropy(
        self,
        out: QuantizerOutput,
        tokens: Tensor,  # [B, T, D]
        rows: Tensor,  # [K, D]
        mask: Tensor | None,  # bool [B, T]
    ) -> EntropyQuantizerOutput:
        """``out`` with the entropy loss in it."""
        assert self.entropy is not None
        found, loss = no_entropy(out.loss), out.loss
        if self.training and self.entropy.weight > 0:
            rows = rows.clone() if self.options.update == "ema" else rows  # an update may come before the backward
            found = self.entropy_of(tokens, rows, mask)
            loss = loss + self.entropy.weight * found.loss
        return EntropyQuantizerOutput(
            quantized=out.quantized,
            codes=out.codes,
            loss=loss,
            commitment_loss=out.commitment_loss,
            codebook_loss=out.codebook_loss,
            perplexity=out.perplexity,
            usage=out.usage,
            non_finite=out.non_finite,
            entropy_loss=found.loss,
            token_entropy=found.token_entropy,
            batch_entropy=found.batch_entropy,
        )

    def entropy_of(
        self,
        tokens: Tensor,  # [B, T, D]
        rows: Tensor,  # [K, D]
        mask: Tensor | None,  # bool [B, T]
    ) -> EntropyLoss:
        """The unweighted entropy loss of a training forward; a method, so that it can be watched by itself."""
        assert self.entropy is not None
        return entropy_loss(tokens, rows, metric=self.options.metric, weight=mask, **self.entropy.of_loss())

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,  # [..., dim] or [B, dim, *spatial]
        mask: Tensor | None = None,  # bool, x's shape without its channel axis
    ) -> Tensor:  # int64, x's shape without its channel axis
        """The codes of ``forward`` alone, of the codebook as it stands; changes no state, in training mode neither.

        Raises:
            TypeError, ValueError: a bad argument, named.
        """
        self._check(x, mask)
        with no_autocast(x):
            tokens, real = self._tokens(x, mask)
            options = self.options
            codes, _ = nearest(tokens, self._searched(), metric=options.metric, precision=options.precision)
            codes = codes if real is None else torch.where(real, codes, -1)
        return codes.view(self.layout.codes_shape(x))

    def lookup(
        self,
        codes: Tensor,  # integer, x's shape without its channel axis
    ) -> Tensor:  # [..., dim] or [B, dim, *spatial]
        """What a decoder is given for ``codes``: ``forward``'s ``quantized``, in this module's layout and dtype.

        Raises:
            TypeError: codes are not integers.
            ValueError: channels="first" and codes are not [B, *spatial].
            IndexError: a code outside [0, codebook_size), -1 included.
        """
        if not isinstance(codes, Tensor):
            raise TypeError(f"codes: expected a tensor of integers, got {type(codes).__name__}")
        if self.layout.first and codes.dim() < 2:
            raise ValueError(f"codes: expected [B, *spatial] for channels='first', got shape {list(codes.shape)}")
        with no_autocast(codes):
            return self.layout.rows(projected(lookup(codes, self._rows()), self.project_out))

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        self.layout.check(x, mask)
        self._check_tokens(x)

    def _tokens(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:  # tokens [B, T, D], bool [B, T]
        """x as codebook-space tokens: the same memory in other strides, unless projected or normalised."""
        tokens, real = self.layout.tokens(x), None if mask is None else self.layout.token_mask(mask)
        if real is not None and (self.codebook_dim != self.dim or self.options.metric == "cosine"):
            tokens = torch.where(real[..., None], tokens, 0)  # else NaN in padding spoils these gradients
        tokens = projected(tokens, self.project_in)
        if self.codebook.dtype == torch.float64 or self.options.metric == "cosine":
            tokens = tokens.to(self.codebook.dtype)
        return l2_normalize(tokens) if self.options.metric == "cosine" else tokens, real

    def _tokens_of(self, batch: Tensor) -> Tensor:  # [B, T, D]
        self._check(batch, None)
        with no_autocast(batch):
            return self._tokens(batch, None)[0].to(self.codebook.dtype)

    def _output(self, x: Tensor, tokens: Tensor, mask: Tensor | None, found: Quantized) -> QuantizerOutput:
        invalid = found.codes < 0
        non_finite = invalid.sum() if mask is None else (invalid & mask).sum()
        commitment_loss = mean_error(found.commitment_error, mask, self.codebook_dim)
        loss = self.commitment_weight * commitment_loss
        if self.options.update == "gradient":
            codebook_loss = mean_error(found.codebook_error, mask, self.codebook_dim)
            loss = loss + self.codebook_weight * codebook_loss
        else:
            codebook_loss = torch.zeros_like(commitment_loss)
        usage, perplexity = self._health(tokens, found.codes)
        return QuantizerOutput(
            quantized=self.layout.restored(led_back(found.quantized, mask, self.project_out), x),
            codes=found.codes.view(self.layout.codes_shape(x)),
            loss=loss,
            commitment_loss=commitment_loss,
            codebook_loss=codebook_loss,
            perplexity=perplexity,
            usage=usage,
            non_finite=non_finite,
        )
