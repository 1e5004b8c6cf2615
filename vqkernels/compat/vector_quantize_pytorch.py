"""vector-quantize-pytorch's VectorQuantize with one head: an EMA codebook (euclidean, cosine) or a learnable one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Quantized, quantize
from ..ops._library import check_mask
from .ema_codebook import NORM_EPS, EmaCodebook, EmaOptions
from .peer import Peer, refuse
from .vector_quantize_pytorch_options import recognises, refusals, settings


class LossBreakdown(NamedTuple):
    """The unweighted terms under the peer's names; the last three are of options that are not swapped, and so 0."""

    commitment: Tensor  # []
    codebook_diversity: Tensor  # []
    orthogonal_reg: Tensor  # []
    inplace_optimize: Tensor  # []


class VectorQuantize(nn.Module):
    """Drop-in for vector-quantize-pytorch's class of this name, heads=1: same arguments, results and state_dict.

        quantized, indices, loss = VectorQuantize(dim=256, codebook_size=512)(x)      # x [B, N, 256]

    The codebook follows its tokens inside the training forward, whose own result is from the codebook before.
    Where it differs from the peer on purpose:

    * Codes are the true nearest ones, ties go to the lowest index, and ``quantized`` is the code row itself.
    * k-means and dead codes draw other random tokens; a code that k-means leaves empty keeps its place, where the
      peer's goes to 0. k-means is over all ranks of the process group, whatever ``sync_codebook`` says.
    * Activation checkpointing's second forward is no second EMA step. A batch without tokens changes nothing.
    * A token with NaN or Inf has index -1 and is in no statistic; with a mask and a projection, where the peer
      raises, the commitment loss is that of the unmasked tokens in codebook space; with all masked it is 0, not NaN.
    * ``_codebook.initted`` is read in the first forward, if k-means was asked for, and by ``load_state_dict``, not in
      every forward.
    * With ``indices`` the gradient is of the codebook before its update; the peer's backward reads some of it after.
    * ``lens`` counts tokens where channels come first, too; the peer counts channels there.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool = False,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        super().__init__()
        rotation_trick = dim > 1 and not straight_through if rotation_trick is None else rotation_trick
        ema_update = not learnable_codebook if ema_update is None else ema_update
        if straight_through and rotation_trick:
            raise ValueError("rotation_trick: expected False with straight_through=True, got True")
        if learnable_codebook and (ema_update or use_cosine_sim):
            got = f"ema_update={ema_update}, use_cosine_sim={use_cosine_sim}"
            raise ValueError(f"learnable_codebook: expected ema_update=False and no use_cosine_sim, got {got}")
        inner = dim if codebook_dim is None else codebook_dim
        self.dim, self.codebook_size, self.heads, self.separate_codebook_per_head = dim, codebook_size, 1, False
        self.has_projections = inner != dim
        self.project_in, self.project_out = _projections(dim, inner, layernorm_after_project_in)
        threshold = float(threshold_ema_dead_code)
        options = EmaOptions(
            decay, eps, ema_update, manual_ema_update, threshold, threshold, use_cosine_sim, kmeans_iters, sync_codebook
        )
        self._codebook = EmaCodebook(
            inner, codebook_size, options, kmeans_init=kmeans_init, learnable_codebook=learnable_codebook
        )
        self.freeze_codebook = freeze_codebook
        self.channel_last, self.accept_image_fmap, self.accept_3d_fmap = channel_last, accept_image_fmap, accept_3d_fmap
        self.commitment_weight, self.rotation_trick = commitment_weight, rotation_trick
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input

    @classmethod
    def from_peer(cls, peer: nn.Module) -> VectorQuantize:
        """The drop-in for one instance of the peer's class; it shares the peer's parameters, buffers, projections.

        Raises:
            ValueError: an instance that ``replace_quantizers`` would leave as it is.
        """
        refuse(refusals(peer))
        return _convert(peer)

    def extra_repr(self) -> str:
        options = self._codebook.options
        own = f"dim={self.dim}, codebook_size={self.codebook_size}, rotation_trick={self.rotation_trick}"
        return f"{own}, commitment_weight={self.commitment_weight}, {options}"

    # ---- the peer's other attributes ----

    @property
    def ema_update(self) -> bool:
        """Whether the codebook follows its tokens."""
        return self._codebook.ema_update

    @property
    def use_cosine_sim(self) -> bool:
        """Whether codes are chosen by angle."""
        return self._codebook.options.use_cosine_sim

    @property
    def learnable_codebook(self) -> bool:
        """Whether the codebook is a Parameter that the commitment loss trains."""
        return self._codebook.learnable_codebook

    @property
    def codebook(self) -> Tensor:  # [K, D]
        """The codes; assigning copies into them."""
        return self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:  # [K, D]
        with torch.no_grad():
            self._codebook.embed.copy_(codes[None])

    def get_codes_from_indices(
        self,
        indices: Tensor,  # int64 [B, ...]
    ) -> Tensor:  # [B, ..., D], or [B, D, ...] where x has its channels first
        """Codebook rows of indices."""
        return self._channels_first(self.codebook[indices])

    def get_output_from_indices(
        self,
        indices: Tensor,  # int64 [B, ...]
    ) -> Tensor:  # [B, ..., dim], or [B, dim, ...]
        """What forward's ``quantized`` is for these indices."""
        return self._channels_first(self.project_out(self.codebook[indices]))

    def update_indices(
        self,
        x: Tensor,  # as forward takes it
        indices: Tensor,  # int64, as forward returns them
        mask: Tensor | None = None,  # bool [B, N]
    ) -> None:
        """One EMA step with codes that were chosen elsewhere."""
        tokens = self._codebook_tokens(self._tokens(x))
        codes = indices.reshape(tokens.shape[:2])
        codes = codes if mask is None else codes.masked_fill(~mask, -1)
        self._codebook.update_codebook(tokens, codes)

    update_ema_indices = update_indices

    def expire_codes_(
        self,
        x: Tensor,  # [B, N, D] tokens in codebook space
    ) -> None:
        """Restart dead codes at these tokens, in training mode with a threshold."""
        x = F.normalize(x, dim=-1, eps=NORM_EPS) if self.use_cosine_sim else x
        self._codebook.expire_codes_(x.detach().reshape(1, -1, x.shape[-1]))

    # ---- forward ----

    def forward(
        self,
        x: Tensor,  # [B, N, dim], [B, dim], [B, dim, N], [B, dim, H, W] or [B, dim, T, H, W], as the options have it
        indices: Tensor | None = None,  # int64 [B, N]
        mask: Tensor | None = None,  # bool [B, N]
        lens: Tensor | None = None,  # int [B]
        topk: None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: None = None,
        ema_update_weight: None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize x; in training mode the codebook also learns.

        Args:
            indices: instead of all else, return (quantized, cross entropy of these codes over the negative
                distances, or the cosines); -1 is left out. Holds N x K numbers, as the peer does.
            mask, lens: which tokens are real, for x of three axes. Elsewhere index -1 and 0 (or the input).
            sample_codebook_temp: without effect, as in the peer unless it samples codes.
            freeze_codebook, ema_update: override the module's for this call.
            return_loss_breakdown: return a fourth value, ``LossBreakdown``.

        Returns:
            quantized like x, indices int64 in x's shape without its channels, loss [] (0 in eval).

        Raises:
            NotImplementedError: topk, codebook_transform_fn, ema_update_weight or accum_ema_update, named.
            TypeError, ValueError: a bad argument, named.
        """
        _refuse(topk, codebook_transform_fn, ema_update_weight, accum_ema_update)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        mask = self._mask(x, mask, lens)
        original = self._tokens(x)
        tokens = self._codebook_tokens(original)
        self._codebook.init_embed_(tokens.detach(), mask)
        rows = self._codebook.rows()
        found = quantize(
            tokens,
            self._codebook.searched(rows),
            metric="cosine" if self.use_cosine_sim else "euclidean",
            gradient="rotation" if self.rotation_trick else "straight_through",
            mask=mask,
        )
        quantized = self._routed(x, found, rows).to(x.dtype)
        entropy = None if indices is None else self._cross_entropy(tokens, rows, indices)
        commitment = self._commitment(found, original, mask, frozen)
        if self.training and not frozen:
            self._codebook.update_codebook(tokens, found.codes, ema_update)
        if entropy is not None:
            return quantized, entropy
        loss = (commitment * self.commitment_weight).to(torch.promote_types(x.dtype, self._codebook.embed.dtype))
        if self.training and not (loss.requires_grad or torch.compiler.is_compiling()):
            loss.requires_grad_()  # so that backward() can be called on it, as on the peer's
        output = self._restored(x, self._unmasked(self.project_out(quantized), original, mask))
        zero = torch.zeros_like(commitment)
        breakdown = (LossBreakdown(commitment, zero, zero, zero),) if return_loss_breakdown else ()
        return output, self._indices(x, found.codes), loss, *breakdown

    def _mask(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:  # bool [B, N]
        if mask is None and lens is None:
            return None
        if mask is not None and lens is not None:
            raise ValueError("mask, lens: expected one of them, got both")
        if x.dim() != 3 or self._is_map():
            raise ValueError(f"mask, lens: expected with x of three axes that is no map, got x {list(x.shape)}")
        length = x.shape[1] if self.channel_last else x.shape[2]
        if mask is None:
            assert lens is not None
            mask = torch.arange(length, device=x.device) < lens[:, None]
        check_mask(mask, torch.Size((x.shape[0], length)), x.device)
        return mask

    def _is_map(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap

    def _is_channels_first(self) -> bool:
        return not self.channel_last or self._is_map()

    def _tokens(self, x: Tensor) -> Tensor:  # [B, N, dim]
        """x as tokens: the same memory in other strides."""
        if x.dim() == 2 and not self._is_map():
            tokens = x[:, None]
        elif self._is_channels_first():
            rank = 5 if self.accept_3d_fmap else 4 if self.accept_image_fmap else 3
            tokens = x.flatten(2).transpose(1, 2) if x.dim() == rank else x
        else:
            tokens = x
        if tokens.dim() != 3 or tokens.shape[-1] != self.dim:
            raise ValueError(f"x: expected {self._layout()}, got {list(x.shape)}")
        return tokens

    def _layout(self) -> str:
        if self.accept_3d_fmap:
            return f"[B, {self.dim}, T, H, W]"
        if self.accept_image_fmap:
            return f"[B, {self.dim}, H, W]"
        return f"[B, N, {self.dim}] or [B, {self.dim}]" if self.channel_last else f"[B, {self.dim}, N]"

    def _codebook_tokens(self, tokens: Tensor) -> Tensor:  # [B, N, dim] -> [B, N, D]
        tokens = self.project_in(tokens)
        if self.use_cosine_sim:
            tokens = F.normalize(tokens, dim=-1, eps=NORM_EPS)
        wide = torch.float64 if self._codebook.embed.dtype == torch.float64 else torch.float32
        return tokens.to(wide)

    def _routed(self, x: Tensor, found: Quantized, rows: Tensor) -> Tensor:  # [B, N, D]
        """Quantized tokens with their gradient: to x in training, else to nothing but a learnable codebook."""
        if self.training and x.requires_grad and self.route_gradients_to_input:
            return found.quantized
        if self.learnable_codebook:
            return F.embedding(found.codes.clamp(min=0), rows)
        return found.quantized.detach()

    def _commitment(
        self, found: Quantized, original: Tensor, mask: Tensor | None, frozen: bool
    ) -> Tensor:  # [] mean over the real tokens and the channels of the codebook
        error = found.commitment_error
        if not self.training or not self.commitment_weight > 0:
            return error.new_zeros(())
        if mask is not None and self.use_cosine_sim and not self.has_projections:
            # as the peer has it: with a mask, the distance from the input before it was brought to length 1
            apart = (found.quantized.detach() - original).square().sum(-1)
            error = torch.where(mask, apart, 0)
        count = max(error.numel(), 1) if mask is None else mask.sum().clamp(min=1)
        loss = error.sum() / (count * found.quantized.shape[-1])
        if self.learnable_codebook and not frozen:  # the same value: only its gradient is wanted
            pull = found.codebook_error.sum() / (count * found.quantized.shape[-1])
            loss = loss + (pull - pull.detach())
        return loss

    def _cross_entropy(self, tokens: Tensor, rows: Tensor, indices: Tensor) -> Tensor:  # []
        rows = rows.clone()  # the backward needs them as they are now, before the codebook learns
        if self.use_cosine_sim:
            logits = tokens @ rows.T
        else:
            square = tokens.square().sum(-1, keepdim=True) + rows.square().sum(-1) - 2 * tokens @ rows.T
            logits = -square.clamp(min=1e-8).sqrt()
        return F.cross_entropy(logits.flatten(0, 1), indices.flatten(), ignore_index=-1)

    def _unmasked(self, projected: Tensor, original: Tensor, mask: Tensor | None) -> Tensor:  # [B, N, dim]
        if mask is None:
            return projected
        other = projected.new_zeros(()) if self.return_zeros_for_masked_padding else original
        return torch.where(mask[..., None], projected, other)

    def _channels_first(self, rows: Tensor) -> Tensor:  # [B, ..., D] -> [B, D, ...]
        return rows.movedim(-1, 1) if self._is_channels_first() else rows

    def _restored(self, x: Tensor, tokens: Tensor) -> Tensor:  # [B, N, dim] -> x's shape
        if x.dim() == 2:
            return tokens[:, 0]
        return tokens.transpose(1, 2).reshape(x.shape) if self._is_channels_first() else tokens

    def _indices(self, x: Tensor, codes: Tensor) -> Tensor:  # [B, N] -> x's shape without its channels
        if x.dim() == 2:
            return codes[:, 0]
        return codes.reshape(x.shape[0], *x.shape[2:]) if self._is_map() else codes


def _projections(dim: int, inner: int, layernorm: bool) -> tuple[nn.Module, nn.Module]:
    if inner == dim:
        return nn.Identity(), nn.Identity()
    into = nn.Linear(dim, inner)
    return nn.Sequential(into, nn.LayerNorm(inner)) if layernorm else into, nn.Linear(inner, dim)


def _refuse(topk: object, transform: object, weight: object, accumulate: bool) -> None:
    options = {
        "topk": topk is not None,
        "codebook_transform_fn": transform is not None,
        "ema_update_weight": weight is not None,
        "accum_ema_update": accumulate,
    }
    if asked := [name for name, given in options.items() if given]:
        raise NotImplementedError(
            f"{', '.join(asked)}: not in vqkernels' VectorQuantize; keep the peer's for this call"
        )


def _convert(peer: nn.Module) -> VectorQuantize:
    with torch.device("meta"):
        fresh = VectorQuantize(**settings(peer))
    ours, theirs = fresh._codebook, peer.get_submodule("_codebook")
    ours._buffers.update({name: theirs._buffers[name] for name in ours._buffers})
    ours._parameters.update({name: theirs._parameters[name] for name in ours._parameters})
    ours.look_at_initted()
    fresh.project_in, fresh.project_out = peer.get_submodule("project_in"), peer.get_submodule("project_out")
    fresh.training, ours.training = peer.training, theirs.training
    return fresh


PEER = Peer("vector-quantize-pytorch VectorQuantize", recognises, refusals, _convert)
