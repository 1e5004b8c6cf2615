"""Drawing tokens for codes that need a new place.

The draw is a function of (seed, step, code) and of the batch: no generator state to save, to synchronise over
ranks or to rewind on resume, and no number that the host would have to wait for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..ops._random import mix
from .distributed import rank_and_world


def sample_tokens(
    tokens: Tensor,  # [B, T, D]
    valid: Tensor,  # bool [B, T]
    wanted: Tensor,  # bool [K], the same on every rank
    seed: Tensor,  # int64 []
    step: Tensor,  # int64 []
    *,
    ranks: tuple[int, int] | None = None,  # (rank, how many); None: the process group's
) -> tuple[Tensor, Tensor]:  # hits [K] (0 or 1), rows [K, D]; both in the accumulation dtype
    """For every wanted code one valid token of this rank, no token twice; summed over ranks, one token per code.

    Each wanted code has one owner among the ranks, and the m codes of an owner split its valid tokens into m equal
    runs and take one of each. Where there are fewer tokens than codes, the codes without a token get no hit.
    """
    size, dtype = wanted.shape[0], accumulation_dtype(tokens.dtype)
    if tokens.shape[0] * tokens.shape[1] == 0:
        return tokens.new_zeros(size, dtype=dtype), tokens.new_zeros((size, tokens.shape[2]), dtype=dtype)
    rank, world = ranks or rank_and_world()
    chance = mix(mix(mix(seed) + step) + torch.arange(size, device=tokens.device))  # [K]
    mine = wanted & (chance % world == rank)
    hit, pick = _one_of_each_run(mine, valid.sum(), chance // world)
    seen = valid.flatten().cumsum(0)  # [N] valid tokens up to here
    position = torch.searchsorted(seen, pick + 1).clamp_(max=seen.shape[0] - 1)  # [K]
    rows = tokens[position // tokens.shape[1], position % tokens.shape[1]].to(dtype)
    return hit.to(dtype), torch.where(hit[:, None], rows, 0)


def _one_of_each_run(
    mine: Tensor,  # bool [K]
    tokens: Tensor,  # int64 [] how many
    chance: Tensor,  # int64 [K] random, >= 0
) -> tuple[Tensor, Tensor]:  # hit bool [K], pick int64 [K] in [0, tokens)
    place = mine.cumsum(0) - 1  # [K] this code's turn among mine
    codes = mine.sum().clamp(min=1)
    low = place.clamp(min=0) * tokens // codes
    width = (place + 1) * tokens // codes - low
    return mine & (width > 0), low + chance % width.clamp(min=1)
