"""The codebook inside vector-quantize-pytorch's VectorQuantize: state under its names, updates in its order.

    a training forward   search and lookup in the codebook as it stands; then, unless frozen,
                         N_k <- d N_k + (1 - d) counts_k      M_k <- d M_k + (1 - d) sums_k
                         c_k <- M_k / ((N_k + eps) / (n + K eps) n),  n = sum_k N_k     (cosine: then to length 1)
                         codes with N_k below the threshold restart at tokens of the batch

The two updates are ops, so that torch.compile sees one node each, and the process group and activation checkpointing,
whose second forward must not count the tokens again, are looked at when they run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._dtypes import accumulation_dtype
from ..nn.distributed import all_reduce_packed, rank_and_world
from ..nn.frozen import Freezable
from ..nn.kmeans import kmeans_
from ..nn.sampling import sample_tokens
from ..nn.statistics import recomputing
from ..ops import PreparedCodebook, codebook_stats, ema_update_, nearest
from ..ops._library import define
from ..ops.ema import ema_step_

NORM_EPS = 1e-6  # below this length the peer's normalisation no longer divides by it


@dataclass(frozen=True)
class EmaOptions:
    """How the codebook learns; names are the peer's."""

    decay: float = 0.8
    eps: float = 1e-5
    ema_update: bool = True
    manual_ema_update: bool = False
    threshold_ema_dead_code: float = 0.0
    reset_cluster_size: float = 0.0
    use_cosine_sim: bool = False
    kmeans_iters: int = 10
    use_ddp: bool | None = None  # None: over the ranks of the process group, whenever there is one


class EmaCodebook(Freezable):
    """State and keys as the peer's ``_codebook``: ``initted``, ``cluster_size``, ``embed_avg``, ``embed``."""

    initted: Tensor  # bool [] whether k-means has run, or was not asked for
    cluster_size: Tensor  # [1, K]
    embed_avg: Tensor  # [1, K, D]
    embed: Tensor  # [1, K, D] a Parameter where learnable

    def __init__(
        self, dim: int, codebook_size: int, options: EmaOptions, *, kmeans_init: bool, learnable_codebook: bool
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.options = options
        self.learnable_codebook = learnable_codebook
        rows = torch.zeros(1, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(rows)
            rows = nn.functional.normalize(rows, dim=-1, eps=NORM_EPS) if options.use_cosine_sim else rows
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(1, codebook_size))
        self.register_buffer("embed_avg", rows.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(rows)
        else:
            self.register_buffer("embed", rows)
        self._surely_initted = not kmeans_init  # so that `initted` is not read, and waited for, in every forward

    @property
    def ema_update(self) -> bool:
        """Whether the codebook follows its tokens."""
        return self.options.ema_update

    def rows(self) -> Tensor:  # [K, D]
        """The codes as they are searched, in float32 or float64."""
        embed = self.embed if self.learnable_codebook else self.embed.detach()
        return embed[0].to(accumulation_dtype(embed.dtype))

    def searched(self, rows: Tensor) -> Tensor | PreparedCodebook:  # [K, D] of ``rows()``
        """``rows``, or inside ``frozen_codebook`` their snapshot."""
        if self.training:
            self._refuse_frozen("training forward")
        return self._snapshot() or rows

    def _frozen_source(self) -> Tensor | None:
        return self.embed

    def _codes_to_freeze(self) -> tuple[Tensor, str]:
        return self.rows(), "cosine" if self.options.use_cosine_sim else "euclidean"

    @torch.no_grad()
    def init_embed_(
        self,
        tokens: Tensor,  # [B, T, D]
        mask: Tensor | None = None,  # bool [B, T]
    ) -> None:
        """k-means on the tokens of all ranks, if it was asked for and has not run."""
        if self._surely_initted:
            return
        state = self._state()
        _initialize_(tokens, mask, self.initted, *state, *self._smoothing(), self.options.kmeans_iters)
        self._surely_initted = True

    @torch.no_grad()
    def update_codebook(
        self,
        tokens: Tensor,  # [B, T, D]
        codes: Tensor,  # int64 [B, T], -1 where a token does not count
        ema_update: bool | None = None,
    ) -> None:
        """One step of the codebook, as its options have it."""
        options = self.options
        ema_update = options.ema_update if ema_update is None else ema_update
        threshold = float(options.threshold_ema_dead_code)
        if not ema_update and threshold == 0:
            return
        writes = ema_update and not options.manual_ema_update
        expiry = threshold if self.training else 0.0, float(options.reset_cluster_size)
        arguments = *self._smoothing(), float(options.decay), writes, *expiry, self._synchronizes()
        _update_(tokens.detach(), codes, *self._state(), *arguments)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Write the codebook from ``embed_avg`` and ``cluster_size``: by hand, with ``manual_ema_update``."""
        _write(*self._state(), *self._smoothing())

    @torch.no_grad()
    def expire_codes_(
        self,
        tokens: Tensor,  # [B, T, D]
    ) -> None:
        """Codes below the threshold restart at different tokens, drawn at random; in training mode alone."""
        options = self.options
        if self.training and options.threshold_ema_dead_code > 0:
            codes = torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
            size = float(options.threshold_ema_dead_code), float(options.reset_cluster_size)
            _expire(tokens, codes, *self._state(), options.use_cosine_sim, *size, self._synchronizes())

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.embed.detach(), self.cluster_size, self.embed_avg

    def _smoothing(self) -> tuple[float, bool]:
        return float(self.options.eps), self.options.use_cosine_sim

    def _synchronizes(self) -> bool:
        return self.options.use_ddp is not False

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[arg-type]
        self.look_at_initted()

    def look_at_initted(self) -> None:
        """Learn whether k-means is still to run, from the device."""
        self._surely_initted = not self.initted.is_meta and bool(self.initted)


def _write(
    embed: Tensor,  # [1, K, D]
    cluster_size: Tensor,  # [1, K]
    embed_avg: Tensor,  # [1, K, D]
    eps: float,
    normalize: bool,
) -> None:
    wide = accumulation_dtype(embed.dtype)
    size, total = cluster_size.to(wide), cluster_size.to(wide).sum()
    smoothed = (size + eps) / (total + size.numel() * eps) * total
    rows = embed_avg.to(wide) / smoothed[..., None]
    embed.copy_(nn.functional.normalize(rows, dim=-1, eps=NORM_EPS) if normalize else rows)


def _expire(
    tokens: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    embed: Tensor,  # [1, K, D]
    cluster_size: Tensor,  # [1, K]
    embed_avg: Tensor,  # [1, K, D]
    normalize: bool,
    threshold: float,
    reset_size: float,
    synchronize: bool,
) -> None:
    """Different tokens of the batch for the codes below the threshold, as far as the tokens go.

    Drawn by a hash of ``cluster_size``: new numbers every step, the same on every rank, nothing to save.
    """
    dead = cluster_size[0] < threshold
    seed = cluster_size.float().view(torch.int32).sum()
    ranks = None if synchronize else (0, 1)
    drawn = sample_tokens(tokens, codes >= 0, dead, seed, torch.zeros_like(seed), ranks=ranks)
    hits, rows = all_reduce_packed(*drawn) if synchronize else drawn
    hit = hits > 0
    if normalize:
        rows = nn.functional.normalize(rows, dim=-1, eps=NORM_EPS)
    embed.copy_(torch.where(hit[:, None], rows.to(embed.dtype), embed))
    embed_avg.copy_(torch.where(hit[:, None], (rows * reset_size).to(embed_avg.dtype), embed_avg))
    cluster_size.masked_fill_(hit, reset_size)


def _update_with_sums(
    tokens: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    rows: Tensor,  # [K, D]
    size: Tensor,  # [K]
    average: Tensor,  # [K, D]
    eps: float,
    normalize: bool,
    decay: float,
    writes: bool,
    synchronize: bool,
) -> None:
    """Where sums go over ranks first, or the codebook is written later."""
    counts, sums = codebook_stats(tokens, codes, rows.shape[0])
    if synchronize:
        counts, sums = all_reduce_packed(counts, sums)
    counts, sums = counts.to(rows.dtype), sums.to(rows.dtype)
    if writes:
        ema_update_(rows, size, average, counts, sums, decay=decay, eps=eps, normalize=normalize)
    else:
        size.lerp_(counts, 1 - decay)
        average.lerp_(sums, 1 - decay)


@torch.no_grad()
def _update(
    tokens: Tensor,  # [B, T, D]
    codes: Tensor,  # [B, T]
    embed: Tensor,  # [1, K, D]
    cluster_size: Tensor,  # [1, K]
    embed_avg: Tensor,  # [1, K, D]
    eps: float,
    normalize: bool,
    decay: float,
    writes: bool,
    threshold: float,
    reset_size: float,
    synchronize: bool,
) -> None:
    if recomputing():
        return
    stored = embed, cluster_size, embed_avg
    wide = accumulation_dtype(embed.dtype)
    # the very same tensors unless they are of half precision
    rows, size, average = state = embed.to(wide), cluster_size.to(wide), embed_avg.to(wide)
    alone = not synchronize or rank_and_world()[1] == 1
    if alone and writes and wide == accumulation_dtype(tokens.dtype):
        ema_step_(tokens, codes, rows[0], size[0], average[0], decay, eps, normalize)
    else:
        _update_with_sums(tokens, codes, rows[0], size[0], average[0], eps, normalize, decay, writes, synchronize)
    if threshold > 0:
        _expire(tokens, codes, rows, size, average, normalize, threshold, reset_size, synchronize)
    for old, new in zip(stored, state, strict=True):
        if old is not new:
            old.copy_(new)


@torch.no_grad()
def _initialize(
    tokens: Tensor,  # [B, T, D]
    mask: Tensor | None,  # bool [B, T]
    initted: Tensor,  # bool []
    embed: Tensor,  # [1, K, D]
    cluster_size: Tensor,  # [1, K]
    embed_avg: Tensor,  # [1, K, D]
    eps: float,
    normalize: bool,
    iterations: int,
) -> None:
    if initted.item():  # waits for the device, once
        return
    metric = "cosine" if normalize else "euclidean"
    rows = embed[0].to(tokens.dtype)
    kmeans_(rows, tokens, mask, torch.zeros_like(initted, dtype=torch.int64), metric, "exact", iterations)
    codes = nearest(tokens, rows, metric=metric)[0]
    codes = codes if mask is None else codes.masked_fill(~mask, -1)
    counts = all_reduce_packed(codebook_stats(tokens[..., :1], codes, rows.shape[0])[0])[0]
    cluster_size.copy_(counts.clamp(min=1))  # a code without tokens counts as having one: it keeps its place
    embed_avg.copy_(rows * cluster_size[0, :, None])
    _write(embed, cluster_size, embed_avg, eps, normalize)
    initted.fill_(True)


_STATE = "Tensor(a!) embed, Tensor(b!) cluster_size, Tensor(c!) embed_avg, float eps, bool normalize"
_update_ = define(
    f"compat_ema_update_(Tensor tokens, Tensor codes, {_STATE}, float decay, bool writes, float threshold,"
    " float reset_size, bool synchronize) -> ()",
    _update,
)
_initialize_ = define(
    f"compat_ema_initialize_(Tensor tokens, Tensor? mask, Tensor(d!) initted, {_STATE}, int iterations) -> ()",
    _initialize,
)
