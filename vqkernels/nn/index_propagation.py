"""IndexPropagationQuantizer: every code learns from every token (Shi et al. 2024, "Scalable Image Tokenization with
Index Backpropagation Quantization": IBQ)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import EntropyLoss, Quantized, entropy_loss, index_propagation, lookup, nearest
from ..ops._library import check_choice
from ..ops._logits import METRICS, check_temperature
from .codebook import Codebook, CodebookOptions, check_options, check_positive
from .entropy import EntropyOptions, EntropyQuantizerOutput, no_entropy
from .layout import Layout, led_back, mean_error, no_autocast, projected
from .normalize import l2_normalize


class IndexPropagationQuantizer(Codebook):
    """Replaces every token by its likeliest code; gradients go through the softmax to all codes.

        ibq = IndexPropagationQuantizer(256, 262144, channels="first")
        quantized, codes, loss = ibq(encoder(images))        # [B, 256, h, w], int64 [B, h, w], scalar

    Args:
        dim: channels of x.
        codebook_size: K.
        codebook_dim: D, channels of a code; where it differs from ``dim``, a Linear leads in and one out.
        metric, temperature: of the softmax, see ``vqkernels.index_propagation``. The paper's are "dot" and 1.
        channels: "last" for x [..., dim], "first" for x [B, dim, *spatial]; never guessed.
        propagation_weight: of the mean of (quantized - token)^2, whose gradient reaches the codes and, besides
            directly, the tokens through the softmax.
        commitment_weight: of the mean of (sg(code) - token)^2.
        codebook_weight: of the mean of (code - sg(token))^2, the paper's beta. The three defaults are IBQ's.
        entropy: an entropy loss over the codebook (IBQ: ``EntropyOptions(weight=..., temperature=0.01, eps=1e-5)``);
            None for none.
        usage_window: training forwards that ``usage`` and ``perplexity`` look back on.

    ``codebook`` is a Parameter. The first training forward of several processes takes rank 0's, and
    DistributedDataParallel averages its gradient as any other. The entropy loss is of this rank's batch; ``usage`` and
    ``perplexity`` are of all ranks in training. It stays float32 (float64 after ``.double()``), whatever autocast or
    ``.half()`` says.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_dim: int | None = None,
        metric: str = "dot",
        temperature: float = 1.0,
        channels: str = "last",
        propagation_weight: float = 1.0,
        commitment_weight: float = 1.0,
        codebook_weight: float = 0.25,
        entropy: EntropyOptions | None = None,
        usage_window: int = 100,
    ) -> None:
        check_positive("dim", dim)
        check_choice("metric", metric, METRICS)
        check_temperature(temperature)
        rows = "cosine" if metric == "cosine" else "euclidean"  # how k-means makes codes and how they start
        options = CodebookOptions(rows, "gradient", usage_window=usage_window)
        super().__init__(codebook_size, dim if codebook_dim is None else codebook_dim, options)
        weights = (propagation_weight, commitment_weight, codebook_weight)
        for name, weight in zip(("propagation_weight", "commitment_weight", "codebook_weight"), weights, strict=True):
            if not weight >= 0:
                raise ValueError(f"{name}: expected >= 0, got {weight}")
        self.metric = metric
        self.temperature = temperature
        self.layout = Layout(dim, channels)
        self.propagation_weight, self.commitment_weight, self.codebook_weight = weights
        check_options("entropy", entropy, EntropyOptions)
        self.entropy = EntropyOptions(weight=0.0) if entropy is None else entropy
        linked = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if linked else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if linked else nn.Identity()

    def extra_repr(self) -> str:
        shape = f"dim={self.layout.dim}, codebook_size={self.codebook_size}, codebook_dim={self.codebook_dim}"
        form = f"metric={self.metric!r}, temperature={self.temperature}, channels={self.layout.channels!r}"
        weights = f"{self.propagation_weight}, {self.commitment_weight}, {self.codebook_weight}"
        return f"{shape}, {form}, propagation/commitment/codebook_weight={weights}, entropy={self.entropy}"

    def forward(
        self,
        x: Tensor,  # [..., dim] or [B, dim, *spatial]
        mask: Tensor | None = None,  # bool, x's shape without its channel axis
    ) -> EntropyQuantizerOutput:
        """Quantize x; in training mode also count the codes and compute the entropy loss.

        Args:
            x: float32, float16 or bfloat16 (float64 with a float64 module); any strides.
            mask: True where a token is real. Elsewhere: code -1, quantized 0, no gradient, in no loss and statistic.

        Returns:
            ``EntropyQuantizerOutput``. Losses are means over the real tokens (the first three over their entries), 0
            if there are none. A token with NaN or Inf: code -1, quantized NaN, losses NaN, in no statistic, counted in
            ``non_finite``.

        Raises:
            TypeError, ValueError: a bad argument, named.
        """
        self._check(x, mask)
        with no_autocast(x):
            tokens, real = self._tokens(x, mask)
            if self.training:
                self._before_search(tokens, real)
            found = self._propagated(tokens, real)
            if self.training:
                self._after_search(tokens.detach(), found.codes)
            return self._output(x, tokens, real, found)

    def entropy_of(
        self,
        tokens: Tensor,  # [B, T, D]
        rows: Tensor,  # [K, D]
        mask: Tensor | None,  # bool [B, T]
    ) -> EntropyLoss:
        """The unweighted entropy loss of a training forward; a method, so that it can be watched by itself."""
        return entropy_loss(tokens, rows, metric=self.metric, weight=mask, **self.entropy.of_loss())

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,  # [..., dim] or [B, dim, *spatial]
        mask: Tensor | None = None,  # bool, x's shape without its channel axis
    ) -> Tensor:  # int64, x's shape without its channel axis
        """The codes of ``forward`` alone; changes no state, in training mode neither.

        Raises:
            TypeError, ValueError: a bad argument, named.
        """
        self._check(x, mask)
        with no_autocast(x):
            tokens, real = self._tokens(x, mask)
            found = self._propagated(tokens, real)
        return found.codes.reshape(self.layout.codes_shape(x))

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
        self.layout.check_codes(codes)
        with no_autocast(codes):
            return self.layout.rows(projected(lookup(codes, self._rows()), self.project_out))

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        self.layout.check(x, mask)
        self._check_tokens(x)

    def _tokens(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:  # [B, T, D], bool [B, T]
        tokens, real = self.layout.tokens(x), None if mask is None else self.layout.token_mask(mask)
        if real is not None:
            tokens = torch.where(real[..., None], tokens, 0)  # else NaN in padding spoils gradients
        tokens = projected(tokens, self.project_in).to(self.codebook.dtype)
        return l2_normalize(tokens) if self.metric == "cosine" else tokens, real

    def _propagated(self, tokens: Tensor, mask: Tensor | None) -> Quantized:  # [B, T, D], bool [B, T]
        frozen, codes = self._snapshot(), None
        if frozen is not None:
            codes, _ = nearest(l2_normalize(tokens) if self.metric == "cosine" else tokens, frozen)
        return index_propagation(
            tokens, self.codebook, metric=self.metric, temperature=self.temperature, mask=mask, codes=codes
        )

    def _frozen_source(self) -> Tensor | None:
        return None if self.metric == "dot" else self.codebook

    def _tokens_of(self, batch: Tensor) -> Tensor:  # [B, T, D]
        self._check(batch, None)
        with no_autocast(batch):
            return self._tokens(batch, None)[0]

    def _output(
        self,
        x: Tensor,
        tokens: Tensor,  # [B, T, D]
        mask: Tensor | None,  # bool [B, T]
        found: Quantized,
    ) -> EntropyQuantizerOutput:
        commitment_loss = mean_error(found.commitment_error, mask, self.codebook_dim)
        codebook_loss = mean_error(found.codebook_error, mask, self.codebook_dim)
        loss = self.commitment_weight * commitment_loss + self.codebook_weight * codebook_loss
        if self.propagation_weight > 0:
            error = (found.quantized - tokens).square().sum(-1)
            if mask is not None:
                error = torch.where(mask, error, 0)
            loss = loss + self.propagation_weight * mean_error(error, mask, self.codebook_dim)
        entropies = no_entropy(loss)
        if self.training and self.entropy.weight > 0:
            entropies = self.entropy_of(tokens, self.codebook, mask)
            loss = loss + self.entropy.weight * entropies.loss
        usage, perplexity = self._health(tokens.detach(), found.codes)
        invalid = found.codes < 0
        return EntropyQuantizerOutput(
            quantized=self.layout.restored(led_back(found.quantized, mask, self.project_out), x),
            codes=found.codes.reshape(self.layout.codes_shape(x)),
            loss=loss,
            commitment_loss=commitment_loss,
            codebook_loss=codebook_loss,
            perplexity=perplexity,
            usage=usage,
            non_finite=invalid.sum() if mask is None else (invalid & mask).sum(),
            entropy_loss=entropies.loss,
            token_entropy=entropies.token_entropy,
            batch_entropy=entropies.batch_entropy,
        )
