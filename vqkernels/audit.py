"""How many codes the usual ways to search get wrong on your own latents and codebook, and what that costs.

    audit(latents, codebook)  ->  Audit: per form the wrong codes, the rise of the mean squared error, usage, perplexity

A code is wrong when it is farther than the nearest one over the real numbers; of tied codes none is. What cannot be had
on a CPU is simulated and says so: TF32 as operands of 10 mantissa bits with float32 sums, cut off (tensor cores ignore
the low bits of what they are given) and rounded to nearest even (as cuBLAS converts).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .nn.normalize import l2_normalize
from .ops import nearest
from .testing import wrong_codes

BLOCK_ENTRIES = 1 << 21  # entries of a block of tokens: 16 MB where they are float64
BLOCK_SCORES = 1 << 23  # scores held at once: 32 MB of float32, of which a form holds up to four
SURE = 1e-9  # far above what float64 loses in a distance: such an excess is no tie
TF32_LOST = 13  # mantissa bits of float32 that TF32 has not

Search = Callable[[Tensor, Tensor], Tensor]  # x [n, D], codebook [K, D], both float32 -> codes int64 [n]


@dataclass(frozen=True)
class Form:
    """One way to write the search."""

    name: str
    formula: str
    search: Search
    half: bool = False  # its product x.c is of 16 bits or of TF32, not of float32


@dataclass(frozen=True)
class FormResult:
    """What a form does to one set of tokens."""

    name: str
    formula: str
    wrong: int  # tokens with a code that is not the nearest
    mse_increase: float  # of the mean over tokens and dimensions of (x - c)^2
    worst_excess: float  # largest |x - c|^2 - |x - nearest|^2 of a token
    worst_token: int | None  # its number among the tokens audited
    used: int  # codes with at least one token
    perplexity: float  # exp of the entropy of the codes
    half: bool


@dataclass(frozen=True)
class Audit:
    """The true codes' figures, and each form's beside them."""

    tokens: int
    codes: int
    dim: int
    metric: str
    non_finite: int  # tokens left out because they hold NaN or Inf
    mse: float
    used: int
    perplexity: float
    forms: tuple[FormResult, ...]


# --------------------------------------------------------------------------------------------- forms


def expanded(x: Tensor, codebook: Tensor) -> Tensor:  # x [n, D], codebook [K, D] -> [n, K]
    """|x|^2 + |c|^2 - 2 x.c, the product in whatever type autocast says."""
    return x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * (x @ codebook.T)


def _tf32_cut(values: Tensor) -> Tensor:  # float32, any shape
    return (values.contiguous().view(torch.int32) >> TF32_LOST << TF32_LOST).view(torch.float32)


def _tf32_rounded(values: Tensor) -> Tensor:  # float32, any shape
    bits = values.contiguous().view(torch.int32)
    to_even = (bits >> TF32_LOST & 1) + (1 << TF32_LOST - 1) - 1
    return ((bits + to_even) >> TF32_LOST << TF32_LOST).view(torch.float32)


def _expanded_tf32(convert: Callable[[Tensor], Tensor]) -> Search:
    def search(x: Tensor, codebook: Tensor) -> Tensor:
        squares = x.square().sum(1, keepdim=True) + codebook.square().sum(1)
        return (squares - 2 * (convert(x) @ convert(codebook).T)).argmin(1)

    return search


def _dot_tf32(convert: Callable[[Tensor], Tensor]) -> Search:
    return lambda x, codebook: (convert(x) @ convert(codebook).T).argmax(1)


def _under_autocast(dtype: torch.dtype, search: Search) -> Search:
    def half(x: Tensor, codebook: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype):
            return search(x, codebook)

    return half


def _expanded(x: Tensor, codebook: Tensor) -> Tensor:
    return expanded(x, codebook).argmin(1)


def _dot(x: Tensor, codebook: Tensor) -> Tensor:
    return (x @ codebook.T).argmax(1)


def _cdist(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x, codebook).argmin(1)


def _square_root(x: Tensor, codebook: Tensor) -> Tensor:
    return expanded(x, codebook).clamp(min=0).sqrt().argmin(1)


def _half_square(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(codebook.square().sum(1) / 2, x, codebook.T, alpha=-1).argmin(1)


EUCLIDEAN_FORMS = (
    Form("fp32, expanded", "x^2 + c^2 - 2 x.c, as VQGAN and most layers", _expanded),
    Form("fp32, torch.cdist", "torch.cdist(x, c)", _cdist),
    Form("fp32, clamp and sqrt", "sqrt(max(x^2 + c^2 - 2 x.c, 0)), as vector-quantize-pytorch", _square_root),
    Form("fp32, without x^2", "c^2 / 2 - x.c", _half_square),
    Form("TF32, rounded", "x^2 + c^2 - 2 x.c; x, c of x.c to 10 bits; simulated", _expanded_tf32(_tf32_rounded), True),
    Form("TF32, cut off", "the same, low bits ignored; simulated", _expanded_tf32(_tf32_cut), True),
    Form("fp16 autocast", "x^2 + c^2 - 2 x.c, x.c in fp16", _under_autocast(torch.float16, _expanded), True),
    Form("bf16 autocast", "x^2 + c^2 - 2 x.c, x.c in bf16", _under_autocast(torch.bfloat16, _expanded), True),
)
COSINE_FORMS = (
    Form("fp32, product", "x.c of unit vectors", _dot),
    Form("fp32, expanded", "x^2 + c^2 - 2 x.c of unit vectors", _expanded),
    Form("fp32, torch.cdist", "torch.cdist(x, c) of unit vectors", _cdist),
    Form("TF32, rounded", "x.c; x, c to 10 bits; simulated", _dot_tf32(_tf32_rounded), True),
    Form("TF32, cut off", "the same, low bits ignored; simulated", _dot_tf32(_tf32_cut), True),
    Form("fp16 autocast", "x.c in fp16", _under_autocast(torch.float16, _dot), True),
    Form("bf16 autocast", "x.c in bf16", _under_autocast(torch.bfloat16, _dot), True),
)
FORMS = {"euclidean": EUCLIDEAN_FORMS, "cosine": COSINE_FORMS}


# ------------------------------------------------------------------------------------------ measuring


@contextlib.contextmanager
def _plain_float32() -> Iterator[None]:
    """float32 products in float32, and no autocast of the caller's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _squared_distance(
    x: Tensor,  # [n, D]
    rows: Tensor,  # [n, D], the code of each token
    metric: str,
) -> Tensor:  # [n] float64; for cosine that of the unit vectors, 2 - 2 cos
    x, rows = x.double(), rows.double()
    if metric == "cosine":
        x, rows = l2_normalize(x), l2_normalize(rows)
    return (x - rows).square().sum(1)


def _is_wrong(
    codes: Tensor,  # int64 [n]
    truth: Tensor,  # int64 [n]
    x: Tensor,  # [n, D]
    codebook: Tensor,  # [K, D]
    excess: Tensor,  # [n] float64
    best: Tensor,  # [n] float64
    metric: str,
) -> Tensor:  # bool [n]
    """Float64 where it can tell, exact arithmetic for the few tokens where it cannot."""
    differs = (codes != truth) & (codebook[codes] != codebook[truth]).any(1)
    wrong = differs & (excess > SURE * (1.0 if metric == "cosine" else best))
    open_rows = (differs & ~wrong).nonzero()[:, 0]
    if len(open_rows):
        wrong[open_rows] = wrong_codes(codes[open_rows], x[open_rows], codebook, metric)
    return wrong


def _perplexity(counts: Tensor) -> float:  # [K]
    share = counts[counts > 0].double() / counts.sum()
    return math.exp(-float((share * share.log()).sum())) if len(share) else 0.0


class _Tally:
    """What is added up for one form over all blocks of tokens."""

    def __init__(self, form: Form, size: int) -> None:
        self.form, self.counts = form, torch.zeros(size, dtype=torch.int64)
        self.wrong, self.excess, self.worst, self.worst_token = 0, 0.0, 0.0, -1

    def add(self, codes: Tensor, wrong: Tensor, excess: Tensor, numbers: Tensor) -> None:  # each [n]
        self.counts += torch.bincount(codes.cpu(), minlength=len(self.counts))
        self.wrong += int(wrong.sum())
        excess = torch.where(wrong, excess, 0.0)
        self.excess += float(excess.sum())
        if float(excess.max()) > self.worst:
            self.worst, self.worst_token = float(excess.max()), int(numbers[excess.argmax()])

    def result(self, entries: int) -> FormResult:
        return FormResult(
            name=self.form.name,
            formula=self.form.formula,
            wrong=self.wrong,
            mse_increase=self.excess / max(entries, 1),
            worst_excess=self.worst,
            worst_token=self.worst_token if self.worst_token >= 0 else None,
            used=int((self.counts > 0).sum()),
            perplexity=_perplexity(self.counts),
            half=self.form.half,
        )


def _searched(form: Form, x: Tensor, codebook: Tensor) -> Tensor:  # x [n, D], codebook [K, D] -> [n]
    """In pieces whose scores fit into memory, whatever K."""
    rows = max(1, BLOCK_SCORES // len(codebook))
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat([form.search(piece, codebook) for piece in x.split(rows)])


def _prepared(rows: Tensor, like: Tensor, metric: str) -> Tensor:  # [n, D] -> float32 [n, D]
    rows = rows.to(like.device).float()
    return l2_normalize(rows) if metric == "cosine" else rows


def audit(
    x: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    *,
    metric: str = "euclidean",
    forms: tuple[Form, ...] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Audit:
    """Searches the codes of x in every form and compares them with the true nearest ones.

    Args:
        x: tokens, any float type; they are compared as float32, on the codebook's device. May be a memory map.
        codebook: codes, any float type, taken as float32.
        metric: "euclidean"; or "cosine", where tokens and codes are first brought to length 1 in float32.
        forms: what to compare; all of ``FORMS[metric]`` when left out.
        progress: told the fraction that is done after every block of tokens.

    Returns:
        ``Audit``. Memory beyond the inputs does not grow with N.

    Raises:
        ValueError: shapes that do not fit, no finite token, or a codebook with NaN or Inf.
    """
    if codebook.dim() != 2 or x.dim() != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(f"x: expected [N, D] to match codebook [K, D], got {list(x.shape)} and {list(codebook.shape)}")
    forms = FORMS[metric] if forms is None else forms
    book = _prepared(codebook.detach(), codebook, metric)
    tallies = [_Tally(form, len(book)) for form in forms]
    truth = _Tally(Form("exact", "nearest", lambda x, c: nearest(x, c, metric=metric)[0]), len(book))
    total, seen = 0.0, 0
    step = max(1, BLOCK_ENTRIES // book.shape[1])
    with _plain_float32():
        for start in range(0, len(x), step):
            error, tokens = _audit_block(x[start : start + step].detach(), start, book, metric, tallies, truth)
            total, seen = total + error, seen + tokens
            if progress is not None:
                progress(min(1.0, (start + step) / len(x)))
    if not seen:
        raise ValueError(f"x: expected tokens without NaN and Inf, got none among {len(x)}")
    entries, exact = seen * book.shape[1], truth.result(seen)
    results = tuple(tally.result(entries) for tally in tallies)
    shape = {"tokens": seen, "codes": len(book), "dim": book.shape[1]}
    return Audit(
        **shape, metric=metric, non_finite=len(x) - seen, mse=total / entries, used=exact.used,
        perplexity=exact.perplexity, forms=results,
    )  # fmt: skip


def _audit_block(
    block: Tensor,  # [n, D]
    start: int,
    book: Tensor,  # [K, D] float32
    metric: str,
    tallies: list[_Tally],
    exact: _Tally,
) -> tuple[float, int]:  # summed squared error of the true codes, tokens that count
    numbers = torch.isfinite(block).all(1).nonzero()[:, 0]
    tokens = _prepared(block[numbers], book, metric)
    numbers = numbers.to(book.device) + start
    if not len(numbers):
        return 0.0, 0
    truth = exact.form.search(tokens, book)
    best = _squared_distance(tokens, book[truth], metric)  # [n]
    none = torch.zeros_like(truth, dtype=torch.bool)
    exact.add(truth, none, best, numbers)
    for tally in tallies:
        codes = _searched(tally.form, tokens, book)
        excess = _squared_distance(tokens, book[codes], metric) - best
        wrong = _is_wrong(codes, truth, tokens, book, excess, best, metric)
        tally.add(codes, wrong, excess.clamp(min=0), numbers)
    return float(best.sum()), len(numbers)


def _worst(result: Audit, half: bool) -> FormResult | None:
    """The form with the most wrong codes; of several, the last, which has the fewest bits."""
    forms = [form for form in reversed(result.forms) if form.half == half]
    return max(forms, key=lambda form: form.wrong, default=None)


def verdict(result: Audit) -> str:
    """The audit in one sentence or two."""
    plain, half = _worst(result, half=False), _worst(result, half=True)
    if not any(form.wrong for form in result.forms):
        return f"Every form finds a nearest code of all {result.tokens} tokens: here precision costs nothing."
    parts = [_clause(form, result) for form in (half, plain) if form is not None and form.wrong]
    if plain is not None and not plain.wrong:
        parts.append("fp32 gets none wrong here")
    return "; ".join(parts) + "."


def _clause(form: FormResult, result: Audit) -> str:
    share = f"{form.wrong} of {result.tokens} codes wrong ({form.wrong / result.tokens:.2%})"
    cost = f" and the squared error {100 * form.mse_increase / result.mse:+.2g}%" if result.mse > 0 else ""
    return f"{form.name} gets {share}{cost}"
