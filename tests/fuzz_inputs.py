"""What the fuzz feeds a search: values by distribution, memory layouts, and ways to change a codebook in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from adversarial import DIMS, kmeans_codebook
from numpy.random import Generator
from torch import Tensor

Values = tuple[np.ndarray, np.ndarray]  # tokens [N, D], codebook [K, D], float64
TOKENS = (0, 1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 127, 129)
CODES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1023, 1025, 4096, 4097)
DTYPES = {  # of the tokens and of the codebook, with how often
    (torch.float32, torch.float32): 10,
    (torch.float16, torch.float16): 3,
    (torch.bfloat16, torch.bfloat16): 3,
    (torch.float64, torch.float64): 3,
    (torch.float16, torch.float32): 1,
    (torch.bfloat16, torch.float32): 1,
}
MOST_ELEMENTS = 2_000_000  # N K D of most cases; of one in twenty, thirty times that
MOST_TIED = 30_000  # where whole codebooks tie and each pair is decided by integers


def pick(rng: Generator, options: tuple[int, ...], most: int) -> int:
    """One of the edge values, or any size up to ``most`` with small ones as likely as large ones."""
    if rng.random() < 0.5:
        return int(rng.choice(options))
    return int(np.exp(rng.uniform(0, np.log(most))))


def scales(rng: Generator, rows: int, decades: float) -> np.ndarray:  # [rows, 1]
    """Factors that spread over so many powers of ten, either way."""
    return 10.0 ** rng.uniform(-decades, decades, (rows, 1))


# ------------------------------------------------------------------------------------ distributions


def gauss(rng: Generator, n: int, k: int, d: int) -> Values:
    return rng.standard_normal((n, d)), rng.standard_normal((k, d))


def kmeans(rng: Generator, n: int, k: int, d: int) -> Values:
    centers = rng.standard_normal((max(k // 3, 1), d))
    size = max(2 * k, n)
    tokens = centers[rng.integers(len(centers), size=size)] + 0.3 * rng.standard_normal((size, d))
    return tokens[:n], kmeans_codebook(torch.from_numpy(tokens), k).numpy()


def unit_norm(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    return tuple(rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, c))  # type: ignore[return-value]


def uniform_init(rng: Generator, n: int, k: int, d: int) -> Values:
    return rng.standard_normal((n, d)), rng.uniform(-1, 1, (k, d)) / rng.choice([k, 1024, 16384])


def offset(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    by = rng.standard_normal(d) * 10.0 ** rng.uniform(0, 5)
    return x + by, c + by


def near_duplicates(rng: Generator, n: int, k: int, d: int) -> Values:
    base = rng.standard_normal((max(k // 7, 1), d))
    step = 10.0 ** rng.uniform(-7, -3)
    c = base[rng.integers(len(base), size=k)] + step * rng.standard_normal((k, d))
    return base[rng.integers(len(base), size=n)] + rng.choice([step, 1.0]) * rng.standard_normal((n, d)), c


def near_ties(rng: Generator, n: int, k: int, d: int) -> Values:
    c = rng.standard_normal(d) * (1 + 2.0**-23 * rng.standard_normal((k, d)).round())
    return rng.standard_normal((n, d)), c


def sphere(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = unit_norm(rng, n, k, d)
    return x * 10.0 ** rng.uniform(-12, -4), c


def mixed_scales(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    decades = rng.choice([2.0, 8.0, 30.0])
    return x * scales(rng, n, decades), c * scales(rng, k, decades)


def mixed_columns(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    by = scales(rng, d, 10.0)[:, 0]
    return x * by, c * by


def one_huge_coordinate(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    column, by = rng.integers(d), 10.0 ** rng.uniform(2, 20)
    c[:, column] *= by
    if rng.random() < 0.5:
        x[:, column] *= by
    return x, c


def outlier_code(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    c[rng.integers(k)] *= rng.choice([1e3, 1e5, 1e10, 1e30])
    return x, c


def huge_tokens(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    return x * 10.0 ** rng.uniform(3, 25), c * 10.0 ** rng.uniform(-25, -3)


def huge_codes(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = huge_tokens(rng, n, k, d)
    return x[::-1] * 1e-25, c * 1e25


def one_scale(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    by = 10.0 ** rng.uniform(-38, 37)
    return x * by, c * by


def denormals(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    return x * rng.choice([1e-41, 1.0, 1e-20]), c * 1e-41


def cauchy(rng: Generator, n: int, k: int, d: int) -> Values:
    return rng.standard_cauchy((n, d)), rng.standard_cauchy((k, d))


def sparse(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    return x * (rng.random((n, d)) < 0.2), c * (rng.random((k, d)) < 0.2)


def tokens_are_codes(rng: Generator, n: int, k: int, d: int) -> Values:
    c = rng.standard_normal((k, d))
    return c[rng.integers(k, size=n)], c


def midpoints(rng: Generator, n: int, k: int, d: int) -> Values:
    c = rng.standard_normal((k, d)).astype(np.float16).astype(np.float64)  # so that a sum of two is exact in float32
    return (c[rng.integers(k, size=n)] + c[rng.integers(k, size=n)]) / 2, c


def grid(rng: Generator, n: int, k: int, d: int) -> Values:
    return rng.integers(-2, 3, (n, d)).astype(float), rng.integers(-2, 3, (k, d)).astype(float)


def duplicates(rng: Generator, n: int, k: int, d: int) -> Values:
    base = rng.standard_normal((max(k // 5, 1), d))
    return rng.standard_normal((n, d)), base[rng.integers(len(base), size=k)]


def all_equal(rng: Generator, n: int, k: int, d: int) -> Values:
    return rng.standard_normal((n, d)), np.tile(rng.standard_normal(d), (k, 1))


def all_zero(rng: Generator, n: int, k: int, d: int) -> Values:
    return rng.standard_normal((n, d)) * rng.integers(0, 2, (n, 1)), np.zeros((k, d))


def permutations(rng: Generator, n: int, k: int, d: int) -> Values:
    row = rng.standard_normal(d).astype(np.float16).astype(np.float64)
    return np.tile(rng.standard_normal((n, 1)), (1, d)), rng.permuted(np.tile(row, (k, 1)), axis=1)


def mirrored(rng: Generator, n: int, k: int, d: int) -> Values:
    x, c = gauss(rng, n, k, d)
    x[:, 0] = 0
    c[1::2] = c[: 2 * (k // 2) : 2]
    c[1::2, 0] *= -1
    return x, c


DISTRIBUTIONS: dict[str, Callable[[Generator, int, int, int], Values]] = {
    fn.__name__.replace("_", "-"): fn
    for fn in (
        *(gauss, kmeans, unit_norm, uniform_init, offset, near_duplicates, near_ties, sphere),
        *(mixed_scales, mixed_columns, one_huge_coordinate, outlier_code, huge_tokens, huge_codes, one_scale),
        *(denormals, cauchy, sparse, tokens_are_codes, midpoints, grid, duplicates, all_equal, all_zero),
        *(permutations, mirrored),
    )
}
TIED = {  # to float64 or over the real numbers, for many pairs
    *("near-ties", "sphere", "denormals", "grid", "all-equal", "all-zero", "permutations", "midpoints", "sparse"),
    *("huge-tokens", "one-huge-coordinate"),
}


def to_dtype(
    values: np.ndarray,  # [rows, D] float64
    dtype: torch.dtype,
) -> Tensor:  # [rows, D]
    """The nearest numbers of that type; what would overflow becomes the largest one."""
    largest = torch.finfo(dtype).max
    return torch.from_numpy(np.ascontiguousarray(values)).clamp(-largest, largest).to(dtype)


def draw_shape(rng: Generator, tied: bool, cosine: bool) -> tuple[int, int, int]:
    """N, K, D; whichever is largest is cut back until the work is small enough."""
    n, k, d = pick(rng, TOKENS, 500), pick(rng, CODES, 6000), pick(rng, DIMS, 300)
    tied = tied or (cosine and d == 1)  # there are only two directions
    limit = MOST_TIED if tied else MOST_ELEMENTS
    limit *= 30 if rng.random() < 0.05 and not tied else 1
    while n * k * d > limit:
        if n * d >= k:
            n, d = (n // 2, d) if n >= d else (n, d // 2)
        else:
            k //= 2
    return n, max(k, 1), max(d, 1)


# ------------------------------------------------------------------------------------------ layouts


def _poisoned(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype)


def contiguous(rows: Tensor) -> Tensor:
    return rows.clone()


def transposed(rows: Tensor) -> Tensor:
    return rows.T.contiguous().T


def sliced(rows: Tensor) -> Tensor:
    """Every second row and third column of a larger tensor that is NaN elsewhere."""
    n, d = rows.shape
    view = _poisoned((2 * n + 1, 3 * d + 2), rows)[1::2, 2::3]
    return view.copy_(rows)


def shifted(rows: Tensor) -> Tensor:
    """Rows with a gap between them, from an address that fits no vector register."""
    n, d = rows.shape
    return _poisoned((n * (d + 3) + 1,), rows).as_strided((n, d), (d + 3, 1), 1).copy_(rows)


def channels_first(rows: Tensor) -> Tensor:
    """[B, H, W, D] seen from [B, D, H, W]."""
    n, d = rows.shape
    height = next((h for h in (3, 2) if n % (2 * h) == 0), 1)
    batch = 2 if n % (2 * height) == 0 else 1
    view = rows.view(batch, height, n // (batch * height), d) if n else rows.view(1, 1, 0, d)
    return view.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def batched(rows: Tensor) -> Tensor:
    """[3, T, D] with room between the batches."""
    n, d = rows.shape
    if n % 3 or n == 0:
        return shifted(rows)[None]
    view = _poisoned((3, n // 3 + 2, d), rows)[:, 1:-1]
    return view.copy_(rows.view(3, n // 3, d))


def expanded(rows: Tensor) -> Tensor:
    """The first row over and over: stride 0."""
    return rows[:1].expand(rows.shape)


def constant_rows(rows: Tensor) -> Tensor:
    """Each row its first entry over and over: stride 0 along D."""
    return rows[:, :1].expand(rows.shape)


def sliding(rows: Tensor) -> Tensor:
    """Windows over one line of numbers: rows overlap in memory."""
    n, d = rows.shape
    return rows.flatten()[: n + d - 1].clone().as_strided((n, d), (1, 1)) if n else rows


TOKEN_LAYOUTS = (contiguous, contiguous, transposed, sliced, shifted, channels_first, channels_first, batched, expanded)
TOKEN_LAYOUTS += (constant_rows, sliding)
CODE_LAYOUTS = (contiguous, contiguous, contiguous, transposed, sliced, shifted)  # written to later: no overlap

# --------------------------------------------------------------------------------- changes in place


@dataclass(frozen=True)
class Change:
    """A way to write to a codebook, with what a cache of it might look at and miss."""

    name: str
    apply: Callable[[Generator, Tensor, Tensor], Tensor]  # (rng, codebook, token [D]) -> the codebook to search next


def _memory(codebook: Tensor) -> np.ndarray:  # [K, D]
    """The tensor's own memory as an array of integers or floats: torch's version counter does not see writes to it."""
    plain = codebook.detach().view(torch.int16) if codebook.dtype == torch.bfloat16 else codebook.detach()
    return plain.numpy()


def _by_index(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    codebook[int(rng.integers(len(codebook)))] = token
    return codebook


def _by_data(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    codebook.data[int(rng.integers(len(codebook)))] = token
    return codebook


def _negated_by_data(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    codebook.data.neg_()
    return codebook


def _by_numpy(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    _memory(codebook)[rng.integers(len(codebook))] = _memory(token[None])[0]
    return codebook


def _one_entry(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    row, column = rng.integers(len(codebook)), rng.integers(codebook.shape[1])
    _memory(codebook)[row, column] = _memory(token[None])[0, column]
    return codebook


def _swapped_rows(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    memory, pair = _memory(codebook), rng.integers(len(codebook), size=2)
    memory[pair] = memory[pair[::-1]]
    return codebook


def _swapped_columns(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    memory, pair = _memory(codebook), rng.integers(codebook.shape[1], size=2)
    memory[:, pair] = memory[:, pair[::-1]]
    return codebook


def _by_dlpack(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    torch.from_dlpack(codebook.detach())[int(rng.integers(len(codebook)))] = token
    return codebook


def _other_memory(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    codebook.data = codebook.data.flip(0).clone()
    return codebook


def _born_again(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    """A new tensor, where it can at the address of the old one."""
    copy = codebook.flip(0)
    del codebook
    return copy.clone()


def _fewer_rows(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    return codebook[: max(1, len(codebook) - 1)]


def _other_view(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    """The same memory in the other direction of columns and rows, where it is square; else without the first row."""
    return codebook.T if codebook.shape[0] == codebook.shape[1] else codebook[min(1, len(codebook) - 1) :]


def _filled(rng: Generator, codebook: Tensor, token: Tensor) -> Tensor:
    return codebook.copy_(token.expand(codebook.shape))


CHANGES = tuple(
    Change(fn.__name__.strip("_").replace("_", " "), fn)
    for fn in (
        *(_by_index, _by_data, _negated_by_data, _by_numpy, _one_entry, _swapped_rows, _swapped_columns, _by_dlpack),
        *(_other_memory, _born_again, _fewer_rows, _other_view, _filled),
    )
)
