"""k-means: of tokens, of batches of them, of several processes' tokens, and as the start of a codebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from .._dtypes import DTYPES, accumulation_dtype
from ..ops import nearest
from ..ops._library import check_choice, define
from ..ops.nearest import METRICS
from .distributed import all_reduce_packed
from .lloyd import Batches, Measure, Totals, assigned_totals, lloyd_, mini_batches_, plus, total_of, unit, zeros
from .normalize import l2_normalize
from .passes import first_forward
from .seeding import START_TOKENS, Ranks, first_rows, random_words

ITERATIONS = 10
INITS = ("k-means++", "random")
NO_BATCH = "x: expected at least one batch (an empty one, [0, D], on a rank without tokens), got none"
_SAMPLES = 1 << 24  # draws of random_words from here on


@dataclass(frozen=True, eq=False)
class KMeansResult:
    """What ``kmeans`` found; the same on every rank, but for ``codes``."""

    centroids: Tensor  # [K, D] float32 (float64 for float64 tokens)
    codes: Tensor | None  # int64, x's shape without its last axis; -1 for NaN or Inf. None for batches
    counts: Tensor  # float64 [K] tokens of each centroid, of all ranks
    inertia: Tensor  # float64 [] sum over all tokens of the distance to their centroid
    iterations: int  # that were run


@torch.no_grad()
def kmeans(
    x: Tensor | Iterable[Tensor],  # [..., D], or batches of it
    codebook_size: int,
    *,
    init: str | Tensor = "k-means++",  # or [K, D]
    iterations: int = ITERATIONS,
    metric: str = "euclidean",
    seed: int = 0,
    tolerance: float | None = None,
    mini_batch: bool = False,
    max_tokens: int | None = None,
    assign: bool = True,
) -> KMeansResult:
    """Centroids of tokens by Lloyd's algorithm, every token assigned to its true nearest one.

        vq.kmeans(x, 1024)                                    # one tensor
        vq.kmeans(loader, 1024)                               # batches, gone over once an iteration
        vq.kmeans(x.split(4096), 1024, mini_batch=True)       # a step a batch

    Args:
        x: tokens [..., D], float32, float16, bfloat16 or float64; or batches of them, which need not fit into memory
            together: a list, a DataLoader. Tokens with NaN or Inf are left out.
        codebook_size: K. Where there are no more than K tokens each is a centroid, and those left over repeat one.
        init: "k-means++" (in the form of k-means||, Bahmani et al. 2012, see nn/seeding.py; of at most 64 K tokens of
            each rank), "random" tokens, or the first centroids [K, D], the same on every rank.
        iterations: Lloyd steps, or passes over the batches with ``mini_batch``; >= 0.
        metric: "euclidean", or "cosine": tokens are taken at length 1, and so are centroids (spherical k-means).
        seed: of what is drawn. The same tokens, batches, ranks and seed give the same centroids, bit for bit on any
            number of threads; from a given ``init``, other batches or ranks change no more than the rounding of sums.
        tolerance: end when an iteration lowers the inertia by no more than this share of it. Every iteration then
            waits for the device.
        mini_batch: move the centroids after every batch (Sculley 2010) instead of once an iteration. With several
            ranks every batch then waits for the device, to learn whether the others have more.
        max_tokens: work on a uniform sample of this many tokens, of all ranks together, held in memory. With it, or
            with ``mini_batch`` and one iteration, x may be an iterator, which can be gone over only once.
        assign: one more pass, for codes, counts and inertia at the returned centroids, over all of x where it can be
            gone over again. False: no codes; counts and inertia as they were before the last iteration's move.

    Over several ranks every rank must call it with its own tokens; one without any gives an empty tensor [0, D]. All
    get the same centroids. A centroid left without tokens restarts beside the one with the largest inertia.

    Returns:
        ``KMeansResult``; nothing is differentiable.

    Raises:
        TypeError, ValueError: a bad argument, named; no finite token at all.
    """
    _check_options(codebook_size, init, iterations, metric, tolerance, max_tokens)
    measure, codes = Measure(metric), None
    batches, again = _opened(x, measure, mini_batch, max_tokens, iterations)
    work = batches if max_tokens is None else _held([_sampled(batches(), max_tokens, seed)])
    if isinstance(init, Tensor):
        rows = _given(init, codebook_size)
    else:
        start, work = _start_tokens(work, isinstance(x, Tensor) or max_tokens is not None, again, codebook_size, seed)
        rows = first_centroids(init, start, codebook_size, seed, metric)
    run = mini_batches_ if mini_batch else lloyd_
    totals, made = run(rows, work, measure, torch.tensor(seed, device=rows.device), iterations, tolerance)
    if assign and isinstance(x, Tensor):
        codes, totals = _assigned(next(iter(batches())), rows, measure)
        codes = codes.view(x.shape[:-1])
    elif totals is None or (assign and (again or max_tokens is not None)):
        totals = assigned_totals(batches() if again else work(), rows, measure)
    if float(totals.counts.sum()) == 0:
        raise ValueError("x: expected at least one finite token, got none")
    return KMeansResult(rows, codes, totals.counts, total_of(totals.inertia), made)


def _check_options(
    codebook_size: int,
    init: str | Tensor,  # or [K, D]
    iterations: int,
    metric: str,
    tolerance: float | None,
    max_tokens: int | None,
) -> None:
    for name, value, least in (("codebook_size", codebook_size, 1), ("iterations", iterations, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens: expected an integer >= 1, got {max_tokens!r}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance: expected >= 0, got {tolerance!r}")
    check_choice("metric", metric, METRICS)
    if not isinstance(init, Tensor):
        check_choice("init", init, INITS)


def _opened(
    x: Tensor | Iterable[Tensor], measure: Measure, mini_batch: bool, max_tokens: int | None, iterations: int
) -> tuple[Batches, bool]:
    """The batches as the kernels take them, and whether they can be gone over again."""
    if mini_batch and (isinstance(x, Tensor) or max_tokens is not None):
        got = "one tensor" if isinstance(x, Tensor) else f"max_tokens={max_tokens}"
        raise ValueError(f"mini_batch: expected batches, as x.split(4096), and all of them; got {got}")
    if isinstance(x, Tensor):
        return _held([prepared(x, measure)]), True
    if not isinstance(x, Iterable):
        raise TypeError(f"x: expected a tensor or an iterable of them, got {type(x).__name__}")
    again = not isinstance(x, Iterator)
    if not again and max_tokens is None and not (mini_batch and iterations <= 1):
        expected = "a list or a DataLoader, or max_tokens, or mini_batch with iterations=1"
        raise ValueError(f"x: expected batches that can be gone over again ({expected}), got {type(x).__name__}")
    return lambda: (prepared(batch, measure) for batch in x), again


def _held(batches: list[Tensor]) -> Batches:
    return lambda: batches


def prepared(
    batch: Tensor,  # [..., D]
    measure: Measure,
) -> Tensor:  # [n, D]
    """A batch as the kernels take it: of length 1 for the cosine."""
    if not isinstance(batch, Tensor) or batch.dtype not in DTYPES:
        got = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"x: expected tensors of float32, float16, bfloat16 or float64, got {got}")
    if batch.dim() < 1 or batch.shape[-1] == 0:
        raise ValueError(f"x: expected [..., D] with D >= 1, got shape {list(batch.shape)}")
    tokens = batch.detach().reshape(-1, batch.shape[-1])
    return l2_normalize(tokens.to(accumulation_dtype(tokens.dtype))) if measure.metric == "cosine" else tokens


def _given(
    init: Tensor,  # [K, D]
    codebook_size: int,
) -> Tensor:  # [K, D]
    if init.dim() != 2 or init.shape[0] != codebook_size:
        raise ValueError(f"init: expected [{codebook_size}, D] like codebook_size, got shape {list(init.shape)}")
    return init.detach().to(accumulation_dtype(init.dtype), copy=True).contiguous()


def _start_tokens(
    work: Batches, whole: bool, again: bool, codebook_size: int, seed: int
) -> tuple[Tensor, Batches]:  # [n, D]
    """Tokens of this rank to choose the start from, and the batches, of which some may have been taken."""
    most = START_TOKENS * codebook_size
    if whole:
        return next(iter(work())), work
    if again:
        return _reservoir(work(), most, seed)[0], work
    remaining, head = iter(work()), list[Tensor]()
    while sum(len(batch) for batch in head) < most and (batch := next(remaining, None)) is not None:
        head.append(batch)
    if not head:
        raise ValueError(NO_BATCH)
    return torch.cat(head), lambda: chain(head, remaining)


def first_centroids(
    init: str,
    tokens: Tensor,  # [n, D] of this rank
    codebook_size: int,
    seed: int,
    metric: str,
) -> Tensor:  # [K, D]
    """Where the iterations start; codes that find no token repeat one."""
    none = tokens.new_full((codebook_size, tokens.shape[1]), torch.nan, dtype=accumulation_dtype(tokens.dtype))
    rows = first_rows(init, tokens, none, torch.tensor(seed, device=tokens.device), metric)
    found = rows.isfinite().all(1)  # [K]
    if not found.any():
        raise ValueError("x: expected at least one finite token, got none")
    return torch.where(found[:, None], rows, rows[found.long().argmax()]).contiguous()


def _reservoir(batches: Iterable[Tensor], count: int, seed: int) -> tuple[Tensor, int]:  # [<= count, D], tokens seen
    """A uniform sample of this rank's finite tokens, in random order: those with the least random numbers."""
    kept, seen = None, 0
    for i, tokens in enumerate(batches):
        words = random_words(torch.tensor(seed, device=tokens.device), _SAMPLES + i, tokens.shape[0])
        keys = torch.where(tokens.abs().amax(1) < torch.inf, words, 2**62)
        if kept is not None:
            tokens, keys = torch.cat([kept[0], tokens]), torch.cat([kept[1], keys])
        seen += tokens.shape[0] - (0 if kept is None else kept[0].shape[0])
        least = keys.topk(min(count, keys.shape[0]), largest=False, sorted=True)
        kept = tokens[least.indices], least.values
    if kept is None:
        raise ValueError(NO_BATCH)
    return kept[0], seen


def _sampled(batches: Iterable[Tensor], count: int, seed: int) -> Tensor:  # [n, D]
    """This rank's share of ``count`` tokens."""
    tokens, seen = _reservoir(batches, count, seed)
    ranks = Ranks.all()
    numbers = ranks.gathered(torch.tensor(seen, device=tokens.device)).tolist()
    total, before = sum(numbers), sum(numbers[: ranks.rank])
    if total <= count:
        return tokens
    return tokens[: (before + seen) * count // total - before * count // total]


def _assigned(
    tokens: Tensor,  # [n, D]
    rows: Tensor,  # [K, D]
    measure: Measure,
) -> tuple[Tensor, Totals]:  # codes int64 [n]
    codes, distance = nearest(tokens, rows, metric=measure.metric, precision=measure.precision)
    return codes, Totals(*all_reduce_packed(*plus(zeros(rows), tokens, codes, distance)))


# ---- for modules ----


@torch.no_grad()
def kmeans_(
    codebook: Tensor,  # [K, D]
    tokens: Tensor,  # [B, T, D]
    mask: Tensor | None,  # bool [B, T]
    seed: Tensor,  # int64 []
    metric: str,
    precision: str,
    iterations: int,
) -> None:
    """Overwrite ``codebook`` with centroids of the finite, unmasked tokens; the same on every rank.

    Starts from k-means++. With fewer tokens than codes the codes left over keep their rows. All ranks must call it; a
    rank may have no tokens.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])  # [N, D]
    if mask is not None:
        flat = torch.where(mask.reshape(-1, 1), flat, torch.nan)
    rows = unit(first_rows("k-means++", flat, codebook, seed, metric), metric).contiguous()
    lloyd_(rows, lambda: [flat], Measure(metric, precision), seed, iterations)
    codebook.copy_(rows)


def _initialize(
    tokens: Tensor,  # [B, T, D]
    mask: Tensor | None,  # bool [B, T]
    codebook: Tensor,  # [K, D]
    initialized: Tensor,  # bool []
    seed: Tensor,  # int64 []
    metric: str,
    precision: str,
    number: int,
) -> None:
    if not first_forward(number):
        return
    rows = codebook.clone()
    kmeans_(rows, tokens, mask, seed, metric, precision, ITERATIONS)
    # a codebook that was loaded stays: k-means ran in vain, once, but the host need not wait to know it
    codebook.copy_(torch.where(initialized, codebook, rows))
    initialized.fill_(True)


initialize_ = define(
    "codebook_initialize_(Tensor tokens, Tensor? mask, Tensor(a!) codebook, Tensor(b!) initialized, Tensor seed,"
    " str metric, str precision, int number) -> ()",
    _initialize,
)
