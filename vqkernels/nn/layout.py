"""Where a quantizer's tokens lie in its input: channels first or last, masks, and the way back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._dtypes import DTYPES
from ..ops._library import as_tokens, check_choice, check_mask

CHANNELS = ("last", "first")


@dataclass(frozen=True)
class Layout:
    """x is [..., dim] (channels last) or [B, dim, *spatial] (first); its tokens are [B, T, dim]."""

    dim: int
    channels: str

    def __post_init__(self) -> None:
        check_choice("channels", self.channels, CHANNELS)

    @property
    def first(self) -> bool:
        return self.channels == "first"

    def check(self, x: Tensor, mask: Tensor | None) -> None:
        """Raise with the argument's name, what was expected and what came."""
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a tensor of float32, float16, bfloat16 or float64, got {got}")
        axis, rank = (1, 3) if self.first else (-1, 2)
        if x.dim() < rank or x.shape[axis] != self.dim:
            shape = f"[B, {self.dim}, *spatial]" if self.first else f"[..., {self.dim}]"
            raise ValueError(f"x: expected {shape} for channels={self.channels!r}, got shape {list(x.shape)}")
        if mask is not None:
            check_mask(mask, self.codes_shape(x), x.device)

    def check_codes(self, codes: Tensor) -> None:
        """Raise unless they are integers in the shape of x without its channel axis."""
        if not isinstance(codes, Tensor) or codes.dtype.is_floating_point or codes.dtype == torch.bool:
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"codes: expected a tensor of integers, got {got}")
        if self.first and codes.dim() < 2:
            raise ValueError(f"codes: expected [B, *spatial] for channels='first', got shape {list(codes.shape)}")

    def codes_shape(self, x: Tensor) -> torch.Size:
        """x's shape without its channel axis."""
        return x.shape[:1] + x.shape[2:] if self.first else x.shape[:-1]

    def tokens(self, x: Tensor) -> Tensor:  # [B, T, dim]
        """x in other strides, without a copy."""
        return x.flatten(2).transpose(1, 2) if self.first else as_tokens(x)

    def token_mask(self, mask: Tensor) -> Tensor:  # bool, x's shape without its channel axis -> [B, T]
        return mask.flatten(1) if self.first else as_tokens(mask[..., None])[..., 0]

    def restored(
        self,
        tokens: Tensor,  # [B, T, dim]
        x: Tensor,
    ) -> Tensor:  # x's shape and dtype
        """The way back from ``tokens``."""
        tokens = tokens.to(x.dtype)
        return (tokens.transpose(1, 2) if self.first else tokens).reshape(x.shape)

    def rows(self, rows: Tensor) -> Tensor:  # [..., dim] -> [..., dim] or [B, dim, *spatial]
        """Looked-up rows with the channel axis in its place."""
        return rows.movedim(-1, 1) if self.first else rows


def projected(
    tokens: Tensor,  # [..., dim in]
    projection: nn.Module,
) -> Tensor:  # [..., dim out]
    """``projection`` in its own dtype; an Identity leaves the tokens as they are."""
    if isinstance(projection, nn.Identity):
        return tokens
    return projection(tokens.to(next(projection.parameters()).dtype))


def mean_error(
    error: Tensor,  # [B, T] 0 where masked
    mask: Tensor | None,  # bool [B, T]
    dim: int,
) -> Tensor:  # []
    """Mean over the entries of the real tokens; 0 where there are none."""
    if mask is None:
        return error.sum() / max(error.numel() * dim, 1)
    return error.sum() / (mask.sum() * dim).clamp(min=1)


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off, where it is on: it would round tokens and projections to half precision."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def led_back(
    quantized: Tensor,  # [B, T, D]
    mask: Tensor | None,  # bool [B, T]
    projection: nn.Module,
) -> Tensor:  # [B, T, dim]
    """``quantized`` out of the codebook's space; a masked token stays 0."""
    out = projected(quantized, projection)
    if mask is None or out is quantized:
        return out
    return torch.where(mask[..., None], out, 0)  # the bias is no part of padding
