"""diffusers' VectorQuantizer, the quantizer of its VQModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .embedding_quantizer import OPTIONS, EmbeddingQuantizer, Result, adopt, refusals
from .peer import Peer, comes_from, is_subclass, refuse


class VectorQuantizer(EmbeddingQuantizer):
    """Drop-in for diffusers' class of this name: same arguments, results and state_dict (``embedding.weight``).

    ``z_q`` is the code row itself, where diffusers' is z + (row - z), rounded twice; the gradients are the same.
    A token with NaN or Inf gets index -1 and a row of NaN.
    """

    def __init__(
        self,
        n_e: int,
        vq_embed_dim: int,
        beta: float,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, vq_embed_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.vq_embed_dim = vq_embed_dim

    def forward(
        self,
        z: Tensor,  # [B, D, H, W]
    ) -> Result:
        """z_q [B, D, H, W], loss [], (None, None, indices int64: [B H W], with remap [B H W, 1], or sane [B, H, W])."""
        return self._quantize(z)

    @classmethod
    def from_peer(cls, peer: Any) -> VectorQuantizer:
        """The drop-in for one instance of the peer's class; it shares the peer's parameters.

        Raises:
            ValueError: an instance that ``replace_quantizers`` would leave as it is.
        """
        refuse(_refusals(peer))
        return _convert(peer)


def _recognises(module: nn.Module) -> bool:
    own = type(module).__name__ == "VectorQuantizer" and comes_from(module, "diffusers")
    return own or is_subclass(module, "diffusers", "VectorQuantizer")


def _refusals(module: nn.Module, _around: Sequence[nn.Module] = ()) -> list[str]:
    if is_subclass(module, "diffusers", "VectorQuantizer"):
        return [f"{type(module).__name__} is a subclass of it"]
    return refusals(module, OPTIONS | {"vq_embed_dim"})


def _convert(peer: Any) -> VectorQuantizer:
    with torch.device("meta"):
        fresh = VectorQuantizer(peer.n_e, peer.vq_embed_dim, peer.beta)
    adopt(fresh, peer)
    return fresh


PEER = Peer("diffusers VectorQuantizer", _recognises, _refusals, _convert)
