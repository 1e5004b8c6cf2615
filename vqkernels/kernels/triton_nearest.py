"""Nearest-code search in Triton: exact, at the speed of one fp16 product, in three launches.

    operands   tokens and codes as fp16, with the norms of what rounding took from them (triton_operands)
    coarse     their product on the tensor cores; the best granules of codes of each token (triton_coarse)
    finish     which granules rounding leaves possible, scored in float64; ties exactly (triton_finish, triton_exact)

Nothing of size N x K is stored and nothing waits for the device. "fast" takes the same road: what proves a code costs
next to nothing beside the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_configs
from .in_steps import both_details, both_in_steps
from .prepared import PreparedCodebook
from .registry import register
from .triton_coarse import coarse_kernel
from .triton_common import MAX_CODES, MAX_DIM, on_device, readable, unsupported
from .triton_configs import GROUPS, RESIDENT_DEPTH, Gpu, Operand, SearchConfig, operand_of, score_errors
from .triton_finish import finish_kernel
from .triton_operands import operands_kernel

OPERANDS_TILE, OPERANDS_WARPS = 8192, 8  # numbers of one step: whole rows of D up to 256
FINISH_WARPS, FINISH_SLOTS = 4, 16
EXACT_BLOCK_K, EXACT_BLOCK_D = 64, 32
FINISH_TILES = {True: (256, 32), False: (128, 16)}  # by pack: tokens times GRANULE, and dims of one step


@dataclass(frozen=True)
class Codes:
    """The codebook as the product reads it, all on the device."""

    codes: Tensor  # [codes, depth] float16, whole tiles
    bias: Tensor  # [codes] float32; where it is no part of the product
    limits: Tensor  # [granules, 4] float32: p, q, r and the scale of its scores
    unit: Tensor  # [K] float64, 1 / |c|; cosine only


@dataclass(frozen=True)
class Operands(Codes):
    """The tokens as well."""

    tokens: Tensor  # [tokens, depth] float16, whole tiles
    stats: Tensor  # [N, 4] float32: of each token a, b, m and its largest |x|


@dataclass(frozen=True)
class State:
    """What the coarse pass keeps of each token."""

    upper: Tensor  # [N, splits, 2, GROUPS] float32
    code: Tensor  # [N, splits, 2, GROUPS] int32
    inner: Tensor  # [N, splits, 2, GROUPS] float32; with config.pack only
    third: Tensor  # [N, splits, GROUPS] float32
    tiles_per_split: int


def prepare(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    cosine: bool,
    config: SearchConfig,
    kept: Codes | None = None,
) -> Operands:
    """One launch; O((N + K) D) work and memory, O(N D) where the codes are kept from an earlier one."""
    n, device = x.shape[0] * x.shape[1], x.device
    depth = operand_of(config, codebook.shape[1], cosine).depth
    codes = kept or _empty_codes(codebook, cosine, config)
    out = Operands(
        codes.codes,
        codes.bias,
        codes.limits,
        codes.unit,
        tokens=torch.empty(triton.cdiv(n, config.block_n) * config.block_n, depth, dtype=torch.float16, device=device),
        stats=torch.empty(n, 4, dtype=torch.float32, device=device),
    )
    _launch_operands(x, codebook, out, cosine, config, of_codes=kept is None)
    return out


def prepare_codes(
    codebook: Tensor,  # [K, D]
    cosine: bool,
    config: SearchConfig,
) -> Codes:
    """What ``prepare`` makes of the codes, the same bits; one launch. It serves every config with the same tiles of
    codes, see ``codes_key``."""
    codes, x = _empty_codes(codebook, cosine, config), codebook[None]
    none = torch.empty(0, codes.codes.shape[1], dtype=torch.float16, device=codebook.device)
    stats = torch.empty(0, 4, dtype=torch.float32, device=codebook.device)
    operands = Operands(codes.codes, codes.bias, codes.limits, codes.unit, none, stats)
    _launch_operands(x, codebook, operands, cosine, config, of_codes=True)
    return codes


def codes_key(config: SearchConfig) -> tuple[int, int, bool]:
    """What the operand of the codes depends on."""
    return config.granule, config.terms, config.pack


def _empty_codes(codebook: Tensor, cosine: bool, config: SearchConfig) -> Codes:  # [K, D]
    (k, dim), device = codebook.shape, codebook.device
    shape = operand_of(config, dim, cosine)
    granules = triton.cdiv(k, GROUPS * config.granule) * GROUPS
    codes = granules * config.granule
    return Codes(
        codes=torch.empty(codes, shape.depth, dtype=torch.float16, device=device),
        bias=torch.empty(codes if shape.bias == 2 else 1, dtype=torch.float32, device=device),
        limits=torch.empty(granules, 4, dtype=torch.float32, device=device),
        unit=torch.empty(k if cosine else 1, dtype=torch.float64, device=device),
    )


def _launch_operands(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    out: Operands,  # written: what there is of tokens, and the codes if asked for
    cosine: bool,
    config: SearchConfig,
    of_codes: bool,
) -> None:
    (k, dim), tokens, n = codebook.shape, out.tokens.shape[0], out.stats.shape[0]
    shape = operand_of(config, dim, cosine)
    block_d = min(RESIDENT_DEPTH, triton.next_power_of_2(shape.depth))
    block_t = min(64, OPERANDS_TILE // block_d)  # every config.block_n is a multiple of 64
    block_g = max(1, min(GROUPS, OPERANDS_TILE // 2 // block_d // config.granule))  # float64: half as many numbers
    code_programs = out.limits.shape[0] // block_g if of_codes else 0
    operands_kernel[(code_programs + tokens // block_t,)](
        x, codebook, out.tokens, out.stats, out.codes, out.bias, out.limits, out.unit,
        x.shape[1], *x.stride(), n, k, dim, shape.depth, code_programs, *score_errors(config, dim, cosine),
        COSINE=cosine, TERMS=shape.terms, BIAS=shape.bias, GRANULE=config.granule,
        BLOCK_G=block_g, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=OPERANDS_WARPS,
    )  # fmt: skip


def coarse(
    operands: Operands,
    shape: Operand,
    config: SearchConfig,
    slots: int,  # programs that run at once
    least_splits: int = 1,  # or one for each tile of codes, where there are fewer
) -> State:
    """One launch; programs over tiles of tokens and, where there are few of those, over parts of the codes."""
    n, device = operands.stats.shape[0], operands.stats.device
    rows, tiles = triton.cdiv(n, config.block_n), operands.limits.shape[0] // GROUPS
    per_split = triton.cdiv(tiles, triton_configs.count_splits(rows, tiles, slots))
    per_split = min(per_split, max(1, tiles // least_splits))
    splits = triton.cdiv(tiles, per_split)
    state = State(
        upper=torch.empty(n, splits, 2, GROUPS, dtype=torch.float32, device=device),
        code=torch.empty(n, splits, 2, GROUPS, dtype=torch.int32, device=device),
        inner=torch.empty(n if config.pack else 1, splits, 2, GROUPS, dtype=torch.float32, device=device),
        third=torch.empty(n, splits, GROUPS, dtype=torch.float32, device=device),
        tiles_per_split=per_split,
    )
    coarse_kernel[(rows, splits)](
        operands.tokens, operands.stats, operands.codes, operands.bias, operands.limits,
        state.upper, state.code, state.inner, state.third, n, shape.depth, tiles, per_split,
        BIAS=shape.bias, PACK=config.pack, GRANULE=config.granule, RESIDENT=shape.resident,
        BLOCK_N=config.block_n, BLOCK_D=shape.block_d, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return state


def finish(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    operands: Operands,
    state: State,
    codes: Tensor,  # [B, T] written
    distance: Tensor,  # [B, T] written
    cosine: bool,
    config: SearchConfig,
) -> None:
    """One launch."""
    n, (k, dim) = codes.numel(), codebook.shape
    pairs, block_d = FINISH_TILES[config.pack]
    block_n = pairs // config.granule
    finish_kernel[(triton.cdiv(n, block_n),)](
        x, codebook, operands.unit, operands.limits, operands.stats, state.upper, state.code, state.inner, state.third,
        codes, distance, x.shape[1], *x.stride(), n, k, dim, state.upper.shape[1], state.tiles_per_split,
        COSINE=cosine, PACK=config.pack, GRANULE=config.granule, BLOCK_N=block_n, BLOCK_S=FINISH_SLOTS,
        BLOCK_D=block_d, EXACT_K=EXACT_BLOCK_K, EXACT_D=EXACT_BLOCK_D, num_warps=FINISH_WARPS,
    )  # fmt: skip


def _supports(x: Tensor, codebook: Tensor | PreparedCodebook, *_rest: object) -> str | None:
    if codebook.shape[0] > MAX_CODES or codebook.shape[1] > MAX_DIM:
        return f"takes up to {MAX_CODES} codes of up to {MAX_DIM} dims, not {list(codebook.shape)}"
    return unsupported(x)


def _supports_both(x: Tensor, codebook: Tensor, *_rest: object) -> str | None:
    return _supports(x, codebook) or _supports(x, x.reshape(-1, x.shape[-1]))


def nearest(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    """See ``vqkernels.nearest``."""
    _check_finite(codebook)
    return search(x, codebook, metric == "cosine", config_for(x, *codebook.shape))


def _check_finite(codebook: Tensor) -> None:  # [K, D]
    """Where looking does not wait for a device."""
    if not codebook.is_cuda and not torch.isfinite(codebook).all():
        raise ValueError("codebook: expected finite values, got NaN or Inf")


def nearest_prepared(
    x: Tensor,  # [B, T, D]
    prepared: PreparedCodebook,  # [K, D]
    precision: str,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    """See ``vqkernels.nearest``. The tokens' half of the first launch, and the other two."""
    config = config_for(x, *prepared.shape)
    return search(x, prepared.rows, prepared.metric == "cosine", config, kept_codes(prepared, config))


def kept_codes(prepared: PreparedCodebook, config: SearchConfig) -> Codes:  # [K, D]
    """What ``prepare`` needs of the codes: made by the first search with these tiles, then kept."""

    def make(rows: Tensor) -> Codes:  # [K, D]
        _check_finite(rows)
        with on_device(rows):
            return prepare_codes(readable(rows), prepared.metric == "cosine", config)

    return prepared.form(("triton", *codes_key(config)), make)


def search(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    cosine: bool,
    config: SearchConfig,
    kept: Codes | None = None,
) -> tuple[Tensor, Tensor]:  # codes int64 [B, T], distance float32 [B, T]
    """Three launches; the first one does nothing for the codes where they are kept.

    It stays a launch for the tokens alone: made in the coarse pass, a tile of D = 256 would take 128 registers of every
    thread in float32, which is what the product's sums already hold.
    """
    codes = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    distance = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    if codes.numel() > 0:
        with on_device(x):
            tokens, rows = readable(x), readable(codebook).contiguous()
            operands = prepare(tokens, rows, cosine, config, kept)
            state = coarse(operands, operand_of(config, rows.shape[1], cosine), config, program_slots(x, config))
            finish(tokens, rows, operands, state, codes, distance, cosine, config)
    return codes, distance


def config_for(
    x: Tensor,  # [B, T, D]
    k: int,
    dim: int,
) -> SearchConfig:
    """What this device runs; the interpreter what a small one would."""
    return triton_configs.choose_config(x.shape[0] * x.shape[1], k, dim, device_of(x))


def device_of(x: Tensor) -> Gpu:
    """The GPU that ``x`` is on; the interpreter does what the least of them would."""
    if not x.is_cuda:
        return Gpu()
    device: Any = torch.cuda.get_device_properties(x.device)
    return Gpu(device.name, 10 * device.major + device.minor, device.shared_memory_per_block_optin)


def program_slots(x: Tensor, config: SearchConfig) -> int:
    """How many programs of the coarse pass run at once: registers hold three low tiles on a multiprocessor."""
    if not x.is_cuda:
        return 1
    return torch.cuda.get_device_properties(x.device).multi_processor_count * max(1, 192 // config.block_n)


def tune(
    x: Tensor,  # [B, T, D]
    codebook: Tensor,  # [K, D]
    time: Callable[[Callable[[], object]], float] | None = None,  # of one call, in any unit; default: Triton's do_bench
) -> SearchConfig:
    """Measure every configuration on these tensors' device and keep the quickest in the user's cache folder."""
    measure = time or triton.testing.do_bench
    k, dim = codebook.shape
    gpu = device_of(x)
    best = triton_configs.tune(dim, gpu, lambda config: measure(lambda: search(x, codebook, False, config)))
    triton_configs.remember(gpu.name, x.shape[0] * x.shape[1], k, dim, best)
    return best


def prepared_details(*_args: object) -> str:
    """What a search of kept operands says of itself."""
    return (
        "prepared codebook: its fp16 operand, biases and bounds are kept, no launch works on codes before the product"
    )


register("nearest", "triton", nearest, supports=_supports)
register("nearest_both", "triton", both_in_steps(nearest), supports=_supports_both, details=both_details)
register("nearest_prepared", "triton", nearest_prepared, supports=_supports, details=prepared_details)
