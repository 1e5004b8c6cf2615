"""sign_codes: the codebook of all sign vectors, without the codebook.

    codes_n = sum_d [x_nd > 0] 2^(D-1-d)        rows_nd = +s where that bit is 1, -s where it is 0

Yu et al. 2024, "Language Model Beats Diffusion", sec. 3.1 (lookup-free quantization, s = 1); Zhao et al. 2024, "Image
and Video Tokenization with Binary Spherical Quantization" (s = 1 / sqrt D, x of length 1). The codes are those of
``nearest`` in the [2^D, D] codebook ``sign_rows(arange(2**D), D)``, where a zero falls to the lower index too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import DTYPES
from .lookup import check_range

MAX_BITS = 62  # of an int64 code


def group_bits(dim: int, group_size: int | None, most: int) -> int:
    """Bits of one code: all of them, or a group of a size that divides ``dim``.

    Raises:
        ValueError: neither, or more than ``most``.
    """
    bits = dim if group_size is None else group_size
    if bits < 1 or dim % bits:
        raise ValueError(f"group_size: expected a divisor of x's {dim} channels, got {group_size}")
    if bits > most:
        raise ValueError(f"group_size: expected at most {most}, got {bits}")
    return bits


def check_signs(x: Tensor) -> None:
    """Raise with the argument's name unless ``x`` is floating point with a channel axis."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected [..., D] with D >= 1, got shape {list(x.shape)}")


def sign_codes(
    x: Tensor,  # [..., D]
    *,
    group_size: int | None = None,
) -> Tensor:  # int64 [...], with groups [..., D / group_size]
    """The code of each token's signs, its first channel the most significant bit.

    Args:
        x: tokens [..., D]; float32, float16, bfloat16 or float64; any strides. Only a number > 0 gives a 1.
        group_size: channels of one code; all D when None. D / group_size codes a token otherwise.

    Returns:
        int64 in [0, 2^group_size); -1 (each group's) where the token holds NaN or Inf. Not differentiable.

    Raises:
        TypeError, ValueError: a bad argument, named.
    """
    check_signs(x)
    bits = group_bits(x.shape[-1], group_size, MAX_BITS)
    place = 1 << torch.arange(bits - 1, -1, -1, device=x.device)  # [bits]
    codes = ((x.detach() > 0).unflatten(-1, (-1, bits)) * place).sum(-1)  # [..., G]
    codes = torch.where(x.detach().isfinite().all(-1, keepdim=True), codes, -1)
    return codes[..., 0] if group_size is None else codes


def sign_rows(
    codes: Tensor,  # integer [...], with groups [..., G]
    dim: int,
    *,
    group_size: int | None = None,
    code_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [..., dim]
    """The sign vectors of codes, ``code_scale`` times +-1: the inverse of ``sign_codes``.

    Args:
        codes: integers in [0, 2^group_size).
        dim: D, channels of a row.
        group_size: channels of one code, as given to ``sign_codes``; codes then have a last axis of D / group_size.
        code_scale: s, the size of each entry.
        dtype: of the rows.

    Raises:
        TypeError, ValueError: a bad argument, named.
        IndexError: a code out of range, -1 included (looked at on CPU only: on CUDA the look would wait for the
            device, and a code's low bits are taken).
    """
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes: expected a tensor of integers, got {type(codes).__name__}")
    bits = group_bits(dim, group_size, MAX_BITS)
    grouped = codes[..., None] if group_size is None else codes
    if grouped.shape[-1:] != (dim // bits,):
        raise ValueError(f"codes: expected [..., {dim // bits}] for group_size {bits}, got {list(codes.shape)}")
    check_range(codes, 1 << bits)
    grouped = grouped.long()
    shift = torch.arange(bits - 1, -1, -1, device=codes.device)  # [bits]
    positive = ((grouped[..., None] >> shift) & 1).bool().flatten(-2)  # [..., dim]
    size = torch.full((), code_scale, dtype=dtype, device=codes.device)
    return torch.where(positive, size, -size)
