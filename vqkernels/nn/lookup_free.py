"""LookupFreeQuantizer: the codes are the signs (LFQ: Yu et al. 2024, "Language Model Beats Diffusion"; BSQ: Zhao et al.
2024, "Image and Video Tokenization with Binary Spherical Quantization")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._dtypes import accumulation_dtype
from ..ops import sign_codes, sign_entropy_loss, sign_rows
from ..ops.sign_assignment import MAX_GROUP_BITS
from ..ops.sign_codes import MAX_BITS, group_bits
from .codebook import check_options, check_positive, own_state, undo_half
from .entropy import EntropyOptions, EntropyQuantizerOutput, no_entropy
from .layout import Layout, mean_error, no_autocast, projected
from .normalize import l2_normalize
from .statistics import NEVER, count_codes, observe_, usage_and_perplexity


class LookupFreeQuantizer(nn.Module):
    """Replaces every channel by its sign: 2^D codes without a codebook, a search or anything to learn.

        lfq = LookupFreeQuantizer(18, channels="first")                # LFQ, 262144 codes
        bsq = LookupFreeQuantizer(36, spherical=True, group_size=9)    # BSQ, 2^36 codes
        quantized, codes, loss = lfq(encoder(images))                  # [B, 18, h, w], int64 [B, h, w], scalar

    Args:
        dim: channels of x.
        codebook_dim: D, bits of a code, at most 62; where it differs from ``dim``, a Linear leads in and one out.
        channels: "last" for x [..., dim], "first" for x [B, dim, *spatial]; never guessed.
        spherical: bring tokens to length 1 first, and codes too: entries +-1/sqrt(D) instead of +-1 (BSQ).
        code_scale: factor of the codes (not of the spherical tokens).
        group_size: a divisor of D, at most 24: the batch entropy, ``usage`` and ``perplexity`` are of groups of that
            many bits, not of whole codes. None: of the whole code, D <= 24.
        commitment_weight: of the mean of (sg(code) - token)^2.
        entropy: the entropy loss; see ``EntropyOptions`` and ``vqkernels.sign_entropy_loss``, which computes it over
            all 2^D codes in closed form.
        usage_window: training forwards that ``usage`` and ``perplexity`` look back on.

    The gradient of ``quantized`` passes straight through to the tokens. A channel that is exactly 0 counts as negative.
    The entropy loss is of this rank's batch; counts for usage and perplexity are summed over ranks, in training.
    """

    window_counts: Tensor  # [G 2^C] exponentially windowed counts of the codes of each group
    last_used: Tensor  # int64 [G 2^C] step of the last token
    step: Tensor  # int64 [] training forwards so far

    def __init__(
        self,
        dim: int,
        *,
        codebook_dim: int | None = None,
        channels: str = "last",
        spherical: bool = False,
        code_scale: float = 1.0,
        group_size: int | None = None,
        commitment_weight: float = 0.25,
        entropy: EntropyOptions | None = None,
        usage_window: int = 100,
    ) -> None:
        super().__init__()
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        for name, value in (("dim", dim), ("codebook_dim", self.codebook_dim), ("usage_window", usage_window)):
            check_positive(name, value)
        for name, size in (("code_scale", code_scale), ("commitment_weight", commitment_weight)):
            if not size >= 0 or (name == "code_scale" and size == 0):
                raise ValueError(f"{name}: expected {'> 0' if name == 'code_scale' else '>= 0'}, got {size}")
        if self.codebook_dim > MAX_BITS:
            raise ValueError(f"codebook_dim: expected at most {MAX_BITS} bits, got {self.codebook_dim}")
        self.layout = Layout(dim, channels)
        self.spherical = spherical
        self.code_scale = code_scale * (self.codebook_dim**-0.5 if spherical else 1.0)
        self.group_size = group_bits(self.codebook_dim, group_size, MAX_GROUP_BITS)
        self.commitment_weight = commitment_weight
        check_options("entropy", entropy, EntropyOptions)
        self.entropy = EntropyOptions() if entropy is None else entropy
        self.usage_window = usage_window
        linked = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if linked else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if linked else nn.Identity()
        counted = self.codebook_dim // self.group_size << self.group_size
        self.register_buffer("window_counts", torch.zeros(counted))
        self.register_buffer("last_used", torch.full((counted,), NEVER))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def codebook_size(self) -> int:
        """K = 2^D."""
        return 1 << self.codebook_dim

    def extra_repr(self) -> str:
        shape = f"dim={self.layout.dim}, codebook_size=2^{self.codebook_dim}, channels={self.layout.channels!r}"
        form = f"spherical={self.spherical}, code_scale={self.code_scale:.4g}, group_size={self.group_size}"
        return f"{shape}, {form}, commitment_weight={self.commitment_weight}, entropy={self.entropy}"

    def forward(
        self,
        x: Tensor,  # [..., dim] or [B, dim, *spatial]
        mask: Tensor | None = None,  # bool, x's shape without its channel axis
    ) -> EntropyQuantizerOutput:
        """Quantize x; in training mode also count the codes and compute the entropy loss.

        Args:
            x: float32, float16, bfloat16 or float64; any strides. Arithmetic is float32 at least.
            mask: True where a token is real. Elsewhere: code -1, quantized 0, no gradient, in no loss and statistic.

        Returns:
            ``EntropyQuantizerOutput``; ``codebook_loss`` is 0. Losses are means over the real tokens, the commitment
            loss over their entries, 0 if there are none. A token with NaN or Inf: code -1, quantized NaN, losses NaN,
            in no statistic, counted in ``non_finite``.

        Raises:
            TypeError, ValueError: a bad argument, named.
        """
        self.layout.check(x, mask)
        with no_autocast(x):
            tokens, real = self._tokens(x, mask)
            codes = sign_codes(tokens)  # [B, T]
            rows = torch.where(tokens.detach() > 0, self.code_scale, -self.code_scale).to(tokens.dtype)
            rows = torch.where((codes < 0)[..., None], torch.nan, rows)
            if real is not None:
                codes = torch.where(real, codes, -1)
            through = rows + (tokens - tokens.detach())  # the second term is 0: rows come through bit for bit
            error = (tokens - rows).square().sum(-1)
            if real is not None:
                through = torch.where(real[..., None], through, 0)
                error = torch.where(real, error, 0)
            return self._output(x, tokens, real, codes, through, error)

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
        self.layout.check(x, mask)
        with no_autocast(x):
            tokens, real = self._tokens(x, mask)
            codes = sign_codes(tokens)  # [B, T]
        if real is not None:
            codes = torch.where(real, codes, -1)
        return codes.reshape(self.layout.codes_shape(x))

    def lookup(
        self,
        codes: Tensor,  # integer, x's shape without its channel axis
    ) -> Tensor:  # [..., dim] or [B, dim, *spatial]
        """What a decoder is given for ``codes``: ``forward``'s ``quantized``, in this module's layout.

        Raises:
            TypeError: codes are not integers.
            ValueError: channels="first" and codes are not [B, *spatial].
            IndexError: a code outside [0, codebook_size), -1 included (looked at on CPU only).
        """
        self.layout.check_codes(codes)
        with no_autocast(codes):
            dtype = self.window_counts.dtype
            rows = sign_rows(codes, self.codebook_dim, code_scale=self.code_scale, dtype=dtype)
            return self.layout.rows(projected(rows, self.project_out))

    def _tokens(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:  # [B, T, D], bool [B, T]
        tokens, real = self.layout.tokens(x), None if mask is None else self.layout.token_mask(mask)
        if real is not None:
            tokens = torch.where(real[..., None], tokens, 0)  # else NaN in padding spoils gradients
        tokens = projected(tokens, self.project_in)
        tokens = tokens.to(accumulation_dtype(tokens.dtype))
        return l2_normalize(tokens) if self.spherical else tokens, real

    def _output(
        self,
        x: Tensor,
        tokens: Tensor,  # [B, T, D]
        mask: Tensor | None,  # bool [B, T]
        codes: Tensor,  # [B, T]
        quantized: Tensor,  # [B, T, D]
        error: Tensor,  # [B, T]
    ) -> EntropyQuantizerOutput:
        commitment_loss = mean_error(error, mask, self.codebook_dim)
        if self.training and self.entropy.weight > 0:
            found = sign_entropy_loss(
                tokens,
                code_scale=self.code_scale,
                group_size=self.group_size,
                weight=mask,
                **self.entropy.of_loss(),
            )
        else:
            found = no_entropy(commitment_loss)
        usage, perplexity = self._health(codes)
        out = projected(quantized, self.project_out)
        if mask is not None and out is not quantized:
            out = torch.where(mask[..., None], out, 0)  # the bias is no part of padding
        invalid = codes < 0
        return EntropyQuantizerOutput(
            quantized=self.layout.restored(out, x),
            codes=codes.reshape(self.layout.codes_shape(x)),
            loss=self.commitment_weight * commitment_loss + self.entropy.weight * found.loss,
            commitment_loss=commitment_loss,
            codebook_loss=torch.zeros_like(commitment_loss),
            perplexity=perplexity,
            usage=usage,
            non_finite=invalid.sum() if mask is None else (invalid & mask).sum(),
            entropy_loss=found.loss,
            token_entropy=found.token_entropy,
            batch_entropy=found.batch_entropy,
        )

    def _health(self, codes: Tensor) -> tuple[Tensor, Tensor]:  # [B, T] -> usage [], perplexity []
        """Over the window in training, of this batch alone in eval; of the groups' codes, the mean over groups."""
        groups = self.codebook_dim // self.group_size
        shift = self.group_size * torch.arange(groups - 1, -1, -1, device=codes.device)
        place = torch.arange(groups, device=codes.device) << self.group_size
        parts = ((codes[..., None] >> shift) & ((1 << self.group_size) - 1)) + place  # [B, T, G]
        parts = torch.where((codes < 0)[..., None], -1, parts).flatten(1)  # [B, T G]
        dtype = accumulation_dtype(self.window_counts.dtype)
        carrier = torch.zeros((*parts.shape, 1), dtype=dtype, device=codes.device)  # what is counted has no channels
        if self.training:
            observe_(carrier, parts, self.window_counts, self.last_used, self.step, self.usage_window)
            used, counts = self.last_used > self.step - self.usage_window, self.window_counts
        else:
            counts = count_codes(carrier, parts, self.window_counts.shape[0])
            used = counts > 0
        each = [usage_and_perplexity(*group) for group in zip(used.chunk(groups), counts.chunk(groups), strict=True)]
        usage, perplexity = (torch.stack(values).mean() for values in zip(*each, strict=True))
        return usage, perplexity

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LookupFreeQuantizer:
        """Moves and casts as asked, except that the counts stay wide."""
        own = own_state(self)
        super()._apply(fn, recurse)
        undo_half(self, own)
        return self
