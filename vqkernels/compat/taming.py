"""taming-transformers' VectorQuantizer2, which people copy into their repositories: known by its form, not its home."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .embedding_quantizer import OPTIONS, EmbeddingQuantizer, Result, adopt, refusals
from .peer import Peer, refuse

_CALL = ["z", "temp", "rescale_logits", "return_logits"]


class VectorQuantizer2(EmbeddingQuantizer):
    """Drop-in for taming-transformers' class of this name: same arguments, results and state_dict.

    ``legacy=True``, the default there and here, puts beta on the codebook's term, as published checkpoints were
    trained. ``z_q`` is the code row itself, where the peer's is z + (row - z), rounded twice; the gradients are the
    same. A token with NaN or Inf gets index -1 and a row of NaN.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.e_dim = e_dim

    def forward(
        self,
        z: Tensor,  # [B, D, H, W]
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
    ) -> Result:
        """z_q [B, D, H, W], loss [], (None, None, indices int64: [B H W], with remap [B H W, 1], or sane [B, H, W]).

        Raises:
            ValueError: temp, rescale_logits or return_logits is not neutral; they belong to the Gumbel variant.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            got = f"temp={temp}, rescale_logits={rescale_logits}, return_logits={return_logits}"
            raise ValueError(f"expected temp None or 1.0, rescale_logits and return_logits False, got {got}")
        return self._quantize(z)

    @classmethod
    def from_peer(cls, peer: Any) -> VectorQuantizer2:
        """The drop-in for one instance of the peer's class; it shares the peer's parameters.

        Raises:
            ValueError: an instance that ``replace_quantizers`` would leave as it is.
        """
        refuse(_refusals(peer))
        return _convert(peer)


def _recognises(module: nn.Module) -> bool:
    """The call and the options of the class, under any name; not LlamaGen's, IBQ's or taming's own others."""
    if isinstance(module, EmbeddingQuantizer) or not isinstance(getattr(module, "embedding", None), nn.Module):
        return False
    wanted = ("n_e", "e_dim", "beta", "legacy", "remap", "sane_index_shape", "get_codebook_entry")
    call = list(inspect.signature(type(module).forward).parameters)[1:]
    return call == _CALL and all(hasattr(module, name) for name in wanted)


def _refusals(module: nn.Module, _around: Sequence[nn.Module] = ()) -> list[str]:
    reasons = refusals(module, OPTIONS | {"e_dim"})
    return reasons if reasons or next(module.parameters()).is_meta else _answers_differ(module)


def _answers_differ(peer: Any) -> list[str]:
    """A copy may have been changed inside: a trial shows whether results, loss and gradients are the published ones.

    On a codebook of its own, row k = (k, ..., k), and two tokens that no rounding can take to another code.
    """
    weight = peer.embedding.weight
    column = torch.arange(peer.n_e, dtype=torch.float32, device=weight.device)
    trial = {"embedding.weight": column[:, None].repeat(1, peer.e_dim)}
    z = torch.tensor([0.25, 1.25 if peer.n_e > 1 else 0.25], device=weight.device).expand(1, peer.e_dim, 1, 2)
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            answers = [_answer(each, trial, z) for each in (peer, _convert(peer))]
    except Exception as error:
        return [f"a copy of the class that fails on a trial: {error}"]
    for name, theirs, ours in zip(("z_q", "loss", "indices", "dz", "dcodebook"), *answers, strict=True):
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return [f"a changed copy of the class: its {name} is {theirs.dtype} {list(theirs.shape)}"]
        random = name == "indices" and getattr(peer, "unknown_index", None) == "random"
        if not random and not torch.allclose(theirs, ours):
            return [f"a changed copy of the class: its {name} differs on a trial"]
    return []


def _answer(module: Any, state: dict[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
    weight, z = state["embedding.weight"].clone().requires_grad_(), z.clone().requires_grad_()
    result = torch.func.functional_call(module, {"embedding.weight": weight}, (z,))
    z_q, loss, (perplexity, encodings, indices) = result
    if perplexity is not None or encodings is not None:
        raise TypeError("it returns a perplexity or one-hot encodings")
    return z_q.detach(), loss.detach(), indices, *torch.autograd.grad(loss, (z, weight))


def _convert(peer: Any) -> VectorQuantizer2:
    with torch.device("meta"):
        fresh = VectorQuantizer2(peer.n_e, peer.e_dim, peer.beta)
    adopt(fresh, peer)
    return fresh


PEER = Peer("taming-transformers VectorQuantizer2", _recognises, _refusals, _convert)
