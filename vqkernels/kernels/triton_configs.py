"""Which tiles the Triton search runs with: a rule that serves any GPU, and what was measured on some.

Measured choices are JSON, {GPU name: {shape bucket: {field: value}}}: triton_configs.json beside this file, over it
search.json in the user's cache folder. ``tune`` measures one bucket and ``remember`` writes it there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .._extension import cache_folder

SHIPPED = Path(__file__).with_name("triton_configs.json")
GROUPS = 8  # as in triton_coarse
RESIDENT_DEPTH = 256  # a tile of tokens stays on the chip up to here, else is read for each tile of codes
STREAM_DEPTH = 64  # columns at once where they do not stay
FEW_TOKENS = 2048  # lower tiles up to here
SCORED_AGAIN = 48  # the largest dim at which a whole granule is scored again in float64


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on; the defaults are the least of what these kernels run on."""

    name: str = "unknown"
    capability: int = 80  # 90 for 9.0
    shared_memory: int = 101376  # bytes that a program may have


@dataclass(frozen=True)
class SearchConfig:
    """One way to run the coarse pass."""

    block_n: int  # tokens of a program
    granule: int  # codes whose best is kept: a tile has 8 granules
    num_warps: int
    num_stages: int
    terms: int  # of the fp16 split: 1, or 3 where the product is padded anyway
    pack: bool  # keep the best code's place; else whole granules are scored again, cheap where D is small


# for 9.0 alone: only wgmma leaves registers for them, by reading both operands from shared memory
HOPPER = (
    SearchConfig(block_n=128, granule=16, num_warps=8, num_stages=2, terms=1, pack=True),
    SearchConfig(block_n=256, granule=8, num_warps=16, num_stages=2, terms=1, pack=True),
)
# every configuration that choose_config and a measured choice may name; the compile test builds each
CONFIGS = (
    SearchConfig(block_n=64, granule=16, num_warps=4, num_stages=3, terms=3, pack=False),
    SearchConfig(block_n=128, granule=16, num_warps=8, num_stages=3, terms=3, pack=False),
    SearchConfig(block_n=64, granule=16, num_warps=4, num_stages=3, terms=1, pack=False),
    SearchConfig(block_n=128, granule=16, num_warps=8, num_stages=3, terms=1, pack=False),
    SearchConfig(block_n=64, granule=8, num_warps=4, num_stages=2, terms=1, pack=True),
    SearchConfig(block_n=128, granule=8, num_warps=8, num_stages=3, terms=1, pack=True),
    *HOPPER,
)


@dataclass(frozen=True)
class Operand:
    """The columns of the fp16 operands, for one dim."""

    terms: int
    bias: int  # 0 none (cosine), 1 as three columns, 2 as float32 in the epilogue
    depth: int  # columns with their padding
    block_d: int  # of one step of the product
    resident: bool


def operand_of(config: SearchConfig, dim: int, cosine: bool) -> Operand:
    """Powers of two from 16 up while a tile of tokens stays on the chip, whole steps of STREAM_DEPTH past that."""
    columns = config.terms * dim
    resident = columns <= RESIDENT_DEPTH
    depth = max(16, 1 << (columns - 1).bit_length()) if resident else -(-columns // STREAM_DEPTH) * STREAM_DEPTH
    if config.terms == 3 and not cosine and columns + 3 > depth and resident:
        depth *= 2  # the bias has to be as exact as the rest
    bias = 0 if cosine else 1 if columns + 3 <= depth else 2
    return Operand(config.terms, bias, depth, min(depth, RESIDENT_DEPTH) if resident else STREAM_DEPTH, resident)


def score_errors(config: SearchConfig, dim: int, cosine: bool) -> tuple[float, float]:
    """What arithmetic may do to a score, relative to |x| |c| and to |c|^2 / 2.

    Tensor cores add products a few at a time after aligning them to the largest and may truncate what sticks out: each
    of the s + 1 addends of a step loses at most one unit 2^-23 of the largest partial sum, so n columns lose at most
    n (1 + 1/s) 2^-23 of the sum of sizes; 2^-22 for each covers every s (measured models of the V100 to the H100:
    Fasi et al., PeerJ Computer Science 2021; Khattak and Mikaitis, arXiv 2512.07004). The rest is a handful of float32
    operations on the way to the bound, and the low bits that the place inside the granule takes.
    """
    few = 16 * 2.0**-22 + (config.granule * 2.0**-23 if config.pack else 0.0)
    shape = operand_of(config, dim, cosine)
    product = (config.terms * dim + 3) * 2.0**-22 + few
    return product, product if shape.bias == 1 else few


def shared_memory(config: SearchConfig, dim: int, cosine: bool) -> int:
    """Bytes of the tiles: tokens once, or in every stage where they are streamed; codes in every stage."""
    shape = operand_of(config, dim, cosine)
    tokens, codes = config.block_n * shape.block_d, GROUPS * config.granule * shape.block_d
    return 2 * (tokens * (1 if shape.resident else config.num_stages) + codes * config.num_stages)


def usable(dim: int, gpu: Gpu) -> list[SearchConfig]:
    """The configurations that serve ``dim`` on ``gpu``; never none."""
    return [
        config
        for config in CONFIGS
        if (config.pack or config.terms * dim <= SCORED_AGAIN)
        and shared_memory(config, dim, False) <= gpu.shared_memory
        and (config not in HOPPER or gpu.capability == 90)
    ]


def choose_config(n: int, k: int, dim: int, gpu: Gpu | None = None) -> SearchConfig:
    """The measured choice for this GPU and bucket, else the rule.

    The rule: three terms where they cost no more than twice the product (D <= 9); whole granules scored again where
    those 4 D bytes a code and token cost less than the three instructions a score that keep the best code's place;
    low tiles for few tokens, and where high ones do not fit.
    """
    gpu = gpu or Gpu()
    options = usable(dim, gpu)
    measured = _known().get(gpu.name, {}).get(bucket(n, k, dim))
    if measured in options:
        return measured
    pack = dim > SCORED_AGAIN or k < 128 * dim
    terms = 3 if 3 * dim + 3 <= 32 and not pack else 1
    options = [c for c in options if (c.pack, c.terms) == (pack, terms) and c.block_n <= 128]
    return options[0] if n <= FEW_TOKENS else options[-1]


SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def count_splits(row_tiles: int, code_tiles: int, slots: int, options: tuple[int, ...] = SPLITS) -> int:
    """Into how many parts the codes go: the fewest that end first, where ``slots`` programs run at once.

    A program costs its code tiles and, for its tokens, about as much as 6 of them.
    """
    possible = [s for s in options if s <= code_tiles]
    return min(possible, key=lambda s: (-(-row_tiles * s // slots) * (-(-code_tiles // s) + 6), s))


# ------------------------------------------------------------------------------------- measured choices


def bucket(n: int, k: int, dim: int) -> str:
    """Shapes that share a choice: N and K to the next power of two, D as it is."""
    return f"{1 << max(n - 1, 0).bit_length()},{1 << max(k - 1, 0).bit_length()},{dim}"


def user_file() -> Path:
    """Where this user's measured choices are kept."""
    return cache_folder() / "search.json"


def _read(path: Path) -> dict[str, dict[str, SearchConfig]]:
    """One file's choices; a configuration that is not among CONFIGS is refused, for it was never checked."""
    table: dict[str, dict[str, SearchConfig]] = {}
    if path.is_file():
        for gpu, rows in json.loads(path.read_text()).items():
            table[gpu] = {key: SearchConfig(**fields) for key, fields in rows.items()}
            if unknown := [config for config in table[gpu].values() if config not in CONFIGS]:
                raise ValueError(f"{path}: expected configurations among CONFIGS, got {unknown[0]}")
    return table


@cache
def _known() -> dict[str, dict[str, SearchConfig]]:
    known = _read(SHIPPED)
    for gpu, rows in _read(user_file()).items():
        known[gpu] = {**known.get(gpu, {}), **rows}
    return known


def tune(
    dim: int,
    gpu: Gpu,
    time: Callable[[SearchConfig], float],  # seconds of one search
) -> SearchConfig:
    """The quickest configuration that serves ``dim``."""
    return min(usable(dim, gpu), key=time)


def remember(gpu: str, n: int, k: int, dim: int, config: SearchConfig, path: Path | None = None) -> None:
    """Write one choice into the user's file (or ``path``), and use it from now on."""
    path = user_file() if path is None else path
    table: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    table.setdefault(gpu, {})[bucket(n, k, dim)] = asdict(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    partial.replace(path)
    _known.cache_clear()
