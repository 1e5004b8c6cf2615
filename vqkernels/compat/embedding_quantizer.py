"""What taming-transformers' VectorQuantizer2 and diffusers' VectorQuantizer share: an nn.Embedding trained by gradient.

legacy          loss = mean (sg(q) - z)^2 + beta mean (q - sg(z))^2
not legacy      loss = beta mean (sg(q) - z)^2 + mean (q - sg(z))^2        (van den Oord et al. 2017, eq. 3)
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..nn.frozen import Freezable
from ..ops import quantize
from .peer import attribute_refusals, tampered

OPTIONS = frozenset({"n_e", "beta", "legacy", "remap", "re_embed", "sane_index_shape", "embedding"})
REMAPPED = frozenset({"used", "unknown_index"})
Result = tuple[Tensor, Tensor, tuple[None, None, Tensor]]  # z_q [B, D, H, W], loss [], (None, None, indices)


class EmbeddingQuantizer(Freezable):
    """Base of the two drop-ins; see there."""

    used: Tensor  # int64 [U] the codes that have a place in the remapped vocabulary

    def __init__(
        self,
        n_e: int,
        dim: int,
        beta: float,
        remap: str | None,
        unknown_index: str | int,
        sane_index_shape: bool,
        legacy: bool,
    ) -> None:
        super().__init__()
        self.n_e, self.beta, self.legacy = n_e, beta, legacy
        self.embedding = nn.Embedding(n_e, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.remap, self.sane_index_shape = remap, sane_index_shape
        self.re_embed = n_e
        if remap is not None:
            self.register_buffer("used", torch.tensor(numpy.load(remap)))
            extra = unknown_index == "extra"
            self.unknown_index = len(self.used) if extra else unknown_index
            self.re_embed = len(self.used) + int(extra)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, legacy={self.legacy}, sane_index_shape={self.sane_index_shape}"

    def _quantize(
        self,
        z: Tensor,  # [B, D, H, W]
    ) -> Result:
        weight = self.embedding.weight
        if z.dim() != 4 or z.shape[1] != weight.shape[1]:
            raise ValueError(f"z: expected [B, {weight.shape[1]}, H, W], got {list(z.shape)}")
        if self.training:
            self._refuse_frozen("training forward")
        wide = torch.promote_types(z.dtype, weight.dtype)  # under autocast z may be narrower than the codebook
        tokens = z.flatten(2).transpose(1, 2).to(wide)  # [B, H W, D], no copy
        frozen = self._snapshot()
        found = quantize(tokens, frozen if frozen is not None and frozen.dtype == wide else weight.to(wide))
        to_encoder, to_codebook = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        loss = to_encoder * found.commitment_error.sum() + to_codebook * found.codebook_error.sum()
        z_q = found.quantized.transpose(1, 2).reshape(z.shape).contiguous()
        return z_q, (loss / max(z.numel(), 1)).to(wide), (None, None, self._indices(found.codes, z))

    def _frozen_source(self) -> Tensor | None:
        return self.embedding.weight

    def _codes_to_freeze(self) -> tuple[Tensor, str]:
        return self.embedding.weight, "euclidean"

    def _indices(self, codes: Tensor, z: Tensor) -> Tensor:  # [B, H W] -> [B H W] | [B H W, 1] | [B, H, W]
        if self.remap is not None:
            codes = self.remap_to_used(codes).reshape(-1, 1)
        if self.sane_index_shape:
            return codes.reshape(z.shape[0], *z.shape[2:])
        return codes if self.remap is not None else codes.reshape(-1)

    def remap_to_used(
        self,
        inds: Tensor,  # int64 [B, ...]
    ) -> Tensor:  # int64 [B, ...]
        """Places of codes in ``used``; others get ``unknown_index`` (its "random" draws one number for every token,
        other ones than the peer's).

        A table of K places instead of a comparison of every token with every used code.
        """
        used = self.used.to(inds)
        unknown = used.shape[0]
        table = torch.full((self.n_e,), unknown, dtype=inds.dtype, device=inds.device)
        places = torch.arange(unknown, dtype=inds.dtype, device=inds.device)
        table = table.scatter_reduce(0, used, places, "amin")  # of a code named twice the first place
        new = table[inds.clamp(min=0)]
        if self.unknown_index == "random":
            other = torch.randint(0, self.re_embed, inds.shape, device=inds.device)
        else:
            other = torch.full_like(inds, int(self.unknown_index))
        return torch.where(inds < 0, inds, torch.where(new == unknown, other, new))

    def unmap_to_all(
        self,
        inds: Tensor,  # int64 [B, ...]
    ) -> Tensor:  # int64 [B, ...]
        """Codes of places in ``used``; the "extra" place stands for the first of them."""
        used = self.used.to(inds)
        if self.re_embed > used.shape[0]:
            inds = torch.where(inds >= used.shape[0], 0, inds)
        return used[inds]

    def get_codebook_entry(
        self,
        indices: Tensor,  # int64, as forward returns them
        shape: tuple[int, ...] | None,  # (B, H, W, D), or None
    ) -> Tensor:  # [B, D, H, W], or [n, D]
        """Codebook rows of indices; differentiable with respect to the codebook."""
        if self.remap is not None:
            if shape is None:
                raise ValueError("shape: expected (B, H, W, D) where indices are remapped, got None")
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        z_q = self.embedding(indices)
        return z_q if shape is None else z_q.view(shape).permute(0, 3, 1, 2).contiguous()


def refusals(module: Any, options: frozenset[str]) -> list[str]:
    """Why this module with an nn.Embedding cannot be swapped."""
    reasons = attribute_refusals(module, options, REMAPPED) + tampered(module)
    if type(module.embedding) is not nn.Embedding:
        reasons.append(f"its embedding is a {type(module.embedding).__name__}")
    elif module.embedding.max_norm is not None:
        reasons.append("embedding max_norm")
    if not isinstance(module.beta, float | int):
        reasons.append(f"beta is a {type(module.beta).__name__}")
    return reasons


def adopt(fresh: EmbeddingQuantizer, peer: Any) -> EmbeddingQuantizer:
    """Give ``fresh`` the peer's options and state, shared."""
    for name in OPTIONS - {"embedding"}:
        setattr(fresh, name, getattr(peer, name))
    fresh.embedding = peer.embedding
    if peer.remap is not None:
        fresh.unknown_index = peer.unknown_index
        fresh.register_buffer("used", peer.used)
    fresh.training = peer.training
    return fresh
