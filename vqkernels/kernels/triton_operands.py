"""What the coarse pass multiplies: tokens and codes as fp16, with norms of everything that rounding took from them.

Operands are scaled by powers of two, a row of tokens by its own, a granule of codes by its own: an outlier spoils
nothing but its neighbours. Residual norms are measured, whatever the cause: rounding, saturation, subnormals. Where the
padding of the product has room it holds two more terms (``TERMS`` = 3: hi hi lo x hi lo hi) and |c|^2 / 2 as three fp16
columns (``BIAS`` = 1); else that is a float32 vector, subtracted in the epilogue (``BIAS`` = 2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import load_tile, row_offsets

GROUPS = tl.constexpr(8)  # columns that one row of an MMA accumulator spreads over threads: a group's maximum is local
SAMPLES = tl.constexpr(8)  # codes whose mean is the centre
TOP = tl.constexpr(10)  # operands are scaled to at most 2^(TOP + 1): products of what is 2^24 smaller still count
TOP_BIAS = tl.constexpr(14)  # and fp16 halves of norms to 2^(TOP_BIAS + 1)
HALF_MAX = tl.constexpr(65504.0)
SLACK = tl.constexpr(2.0**-60)  # what underflow can take from a score, which is of the size of 2^20
UNKNOWN = tl.constexpr(2.0**100)  # in place of a bound: no code of the token is ruled out
UNIT32 = tl.constexpr(2.0**-24)


@triton.jit
def exponent_of(
    value,  # float32, not negative
):
    """floor(log2(value)) as int32; -127 for zero and subnormals."""
    return (value.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def exponent_of_double(
    value,  # float64, not negative
):
    """floor(log2(value)) as int32, from -200 up."""
    return tl.maximum((value.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1023, -200)


@triton.jit
def power_of_two(
    exponent,  # int32, -126 .. 127
):
    """2^exponent in float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two_double(
    exponent,  # int32, -1022 .. 1023
):
    """2^exponent in float64."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def sampled_center(
    codebook_ptr,  # [K, D]
    centered,  # float32 scalar, 1 or 0
    dims,  # [BLOCK_D] int32
    K,
    D,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_D] float32: the mean of SAMPLES codes from all over the codebook, or zeros.

    The same bits wherever it is computed: added one by one, and no subnormal, which a fused multiply-add never rounds.
    A loop: Triton's passes look at each load with everything that it is connected to, LLVM unrolls it in the end.
    """
    total = tl.zeros([BLOCK_D], tl.float32)
    for sample in range(SAMPLES):
        row = tl.full([], sample, tl.int64) * K // SAMPLES
        total += tl.load(codebook_ptr + row * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    usual = (tl.abs(total) > 2.0**-100) & (tl.abs(total) < float("inf"))
    return tl.where(usual, total * (1.0 / SAMPLES), 0.0) * centered


@triton.jit
def reference_scale(
    codebook_ptr,  # [K, D]
    K,
    D,
    COSINE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The codebook's exponent, and whether it is worth centring: a mean of 8 is noisy."""
    center_square = tl.full([], 0.0, tl.float64)
    square = tl.full([], 0.0, tl.float64)
    top = tl.full([], 0.0, tl.float32)
    spread = tl.full([], 0.0, tl.float32)
    if not COSINE:
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            center = sampled_center(codebook_ptr, 1.0, dims, K, D, BLOCK_D)
            center_square += tl.sum(center.to(tl.float64) * center.to(tl.float64), 0)
            rows = tl.arange(0, SAMPLES).to(tl.int64) * K // SAMPLES
            codes = load_tile(codebook_ptr, rows * D, rows < K, dims, D, 1)
            square += tl.sum(tl.sum(codes.to(tl.float64) * codes.to(tl.float64), 1), 0) / SAMPLES
            top = tl.maximum(top, tl.max(tl.max(tl.abs(codes), 1), 0))
            spread = tl.maximum(spread, tl.max(tl.max(tl.abs(codes - center[None, :]), 1), 0))
    # scalars as numbers: the interpreter joins no scalar conditions
    centered = (center_square * 4.0 > square).to(tl.float32) * (spread < float("inf")).to(tl.float32)
    size = tl.where(centered > 0, tl.maximum(spread, top * 2.0**-16), top)
    reference = tl.minimum(exponent_of(size), 126)
    return (tl.full([], 0, tl.int32) if COSINE else reference), centered


@triton.jit
def bias_exponent(
    reference,  # int32 scalar
    D,
    COSINE: tl.constexpr,
):
    """Halves of squared norms are stored times 2^-this, tokens multiply them by as much again; D 4^reference fits."""
    return (
        tl.full([], -160, tl.int32)
        if COSINE
        else reference + exponent_of(tl.full([], D, tl.float32)) + 1 + TOP - TOP_BIAS + 1
    )


@triton.jit
def code_tile(
    codebook_ptr,  # [K, D]
    codes,  # [BLOCK_C] int32
    unit,  # [BLOCK_C] float64, 1 / |c| for cosine
    centered,  # float32 scalar, 1 or 0
    dims,  # [BLOCK_D] int32
    K,
    D,
    COSINE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_C, BLOCK_D] float64: the codes as the search sees them, before any rounding to fp16."""
    value = load_tile(codebook_ptr, codes.to(tl.int64) * D, codes < K, dims, D, 1).to(tl.float64)
    if COSINE:
        value = value * unit[:, None]
    else:
        value = value - sampled_center(codebook_ptr, centered, dims, K, D, BLOCK_D).to(tl.float64)[None, :]
    return value


@triton.jit
def to_half(
    value,  # float64, any shape
):
    """Rounded to fp16 and saturated, in float64."""
    clamped = tl.minimum(tl.maximum(value, -HALF_MAX), HALF_MAX)
    return clamped.to(tl.float32).to(tl.float16).to(tl.float64)


@triton.jit
def column_of(
    columns,  # [BLOCK] int32
    D,
    TERMS: tl.constexpr,
):
    """Which term of the split a column belongs to, and which dim; columns of the bias come after the last term."""
    part = (columns >= D).to(tl.int32)
    if TERMS == 3:
        part += (columns >= 2 * D).to(tl.int32) + (columns >= 3 * D).to(tl.int32)
    return part, columns - part * D


@triton.jit
def granule_max(
    value,  # [BLOCK_G * GRANULE] float64 or int32, of codes
    BLOCK_G: tl.constexpr,
    GRANULE: tl.constexpr,
):
    """[BLOCK_G]: the largest of each granule."""
    return tl.max(tl.reshape(value, [BLOCK_G, GRANULE]), 1)


@triton.jit
def code_operands(
    program,  # int32 scalar
    reference,  # int32 scalar
    centered,  # float32 scalar, 1 or 0
    codebook_ptr,  # [K, D]
    operand_ptr,  # [codes, DEPTH] float16, codes of a tile in the order of the MMA's columns
    bias_ptr,  # [codes] float32
    limits_ptr,  # [granules, 4] float32: p, q, r and the scale of the granule's scores
    unit_ptr,  # [K] float64, 1 / |c| for cosine
    K,
    D,
    depth,
    product_error,
    bias_error,
    COSINE: tl.constexpr,
    TERMS: tl.constexpr,
    BIAS: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_G granules: their codes centred (or of unit length), scaled, rounded, and what that took from them.

    Codes past the last one repeat it; a granule of nothing else gets r = -inf, one with NaN or Inf gets p = inf.
    """
    BLOCK_C: tl.constexpr = BLOCK_G * GRANULE
    own = program * BLOCK_C + tl.arange(0, BLOCK_C)
    granule = program * BLOCK_G + tl.arange(0, BLOCK_G)
    codes = tl.minimum(own, K - 1)
    unit = tl.full([BLOCK_C], 1.0, tl.float64)
    if COSINE:
        square = tl.zeros([BLOCK_C], tl.float64)
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            value = code_tile(codebook_ptr, codes, unit, centered, dims, K, D, COSINE, BLOCK_D)
            square += tl.sum(value * value, 1)
        unit = tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
        tl.store(unit_ptr + own, unit, mask=own < K)
    square = tl.zeros([BLOCK_C], tl.float64)
    top = tl.zeros([BLOCK_C], tl.float64)
    wrong = tl.zeros([BLOCK_C], tl.int32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        value = code_tile(codebook_ptr, codes, unit, centered, dims, K, D, COSINE, BLOCK_D)
        square += tl.sum(value * value, 1)
        top = tl.maximum(top, tl.max(tl.abs(value), 1))
        wrong = tl.maximum(wrong, tl.max((tl.abs(value) < float("inf")).to(tl.int32) ^ 1, 1))
    finite = granule_max(wrong, BLOCK_G, GRANULE) == 0
    readable = tl.reshape(finite[:, None] & (tl.arange(0, GRANULE) >= 0)[None, :], [BLOCK_C])
    half = 0.0 * square if COSINE else 0.5 * square
    shared = bias_exponent(reference, D, COSINE)
    scale = -exponent_of_double(granule_max(top, BLOCK_G, GRANULE)) + TOP
    if not COSINE:
        scale = tl.minimum(scale, shared - exponent_of_double(granule_max(half, BLOCK_G, GRANULE)) + TOP_BIAS)
    common = -reference + TOP  # scores are compared times 2^this: a granule 2^60 larger saturates, and is measured so
    scale = tl.minimum(tl.maximum(scale, common - 60), common + 100)
    of_code = tl.reshape(scale[:, None] + tl.zeros([BLOCK_G, GRANULE], tl.int32), [BLOCK_C])
    factor = power_of_two_double(of_code)[:, None]
    bias = half * power_of_two_double(of_code - shared)
    first = to_half(bias)
    middle = to_half(bias - first)
    last = to_half(bias - first - middle)
    tile, group = own // (GRANULE * GROUPS), own // GRANULE % GROUPS
    place = (tile.to(tl.int64) * GRANULE + own % GRANULE) * GROUPS + group
    lost = tl.zeros([BLOCK_C], tl.float64)
    low = tl.zeros([BLOCK_C], tl.float64)
    high = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, depth, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        part, dims = column_of(columns, D, TERMS)
        dims = tl.where(part < TERMS, dims, D)
        c = code_tile(codebook_ptr, codes, unit, centered, dims, K, D, COSINE, BLOCK_D) * factor
        value = to_half(c)
        rest = c - value
        high += tl.sum(tl.where((part == 0)[None, :], value * value, 0.0), 1)
        if TERMS == 3:
            second = to_half(rest)
            low += tl.sum(tl.where((part == 0)[None, :], second * second, 0.0), 1)
            rest = rest - second
            value = tl.where((part == 1)[None, :], second, value)
        lost += tl.sum(tl.where((part == 0)[None, :], rest * rest, 0.0), 1)
        value = tl.where((part < TERMS)[None, :], value, 0.0)
        if BIAS == 1:
            which = (columns - TERMS * D)[None, :]
            value = tl.where(which == 0, -first[:, None], value)
            value = tl.where(which == 1, -middle[:, None], value)
            value = tl.where(which == 2, -last[:, None], value)
        value = tl.where(readable[:, None], value, 0.0)
        where = operand_ptr + place[:, None] * depth + columns[None, :]
        tl.store(where, value.to(tl.float32).to(tl.float16), mask=(columns < depth)[None, :] & (place >= 0)[:, None])
    bias_lost = tl.abs(bias - first - middle - last)
    if BIAS == 2:
        stored = tl.where(readable, bias, 0.0).to(tl.float32)
        bias_lost = tl.abs(bias - stored.to(tl.float64))
        tl.store(bias_ptr + place, stored)
    # tokens are at most 2^-11 of |x| away from their first half: what lo x lo would add; 2^-9 for all roundings here
    q = tl.sqrt(lost) + tl.sqrt(low) * 2.0**-11 + (tl.sqrt(high) + tl.sqrt(low)) * product_error
    units = power_of_two_double(common - scale) * (1.0 + 2.0**-9)
    q = tl.minimum(granule_max(q, BLOCK_G, GRANULE) * units, 3e38)
    p = granule_max(tl.sqrt(square), BLOCK_G, GRANULE) * power_of_two_double(common) * (1.0 + 2.0**-9)
    r = granule_max(bias_lost + bias * bias_error, BLOCK_G, GRANULE) * units
    p = tl.where(finite, tl.minimum(p, 3e38) + SLACK, float("inf"))
    r = tl.where(granule * GRANULE < K, tl.minimum(r, 3e38), float("-inf"))
    out = limits_ptr + granule.to(tl.int64) * 4
    tl.store(out, p.to(tl.float32))
    tl.store(out + 1, tl.where(finite, q, 0.0).to(tl.float32))
    tl.store(out + 2, tl.where(finite, r, 0.0).to(tl.float32))
    tl.store(out + 3, power_of_two(common - scale))


@triton.jit
def token_scale(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    centered,  # float32 scalar, 1 or 0
    offsets,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    stride_d,
    K,
    D,
    highest,  # int32 scalar: the largest exponent that the bias can follow
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_N] int32 exponents of the rows' scales; largest |x|; 1 where x is finite; 1 where x - mu is."""
    top = tl.zeros([BLOCK_N], tl.float32)
    size = tl.zeros([BLOCK_N], tl.float32)
    wrong = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, offsets, live, dims, D, stride_d)
        center = sampled_center(codebook_ptr, centered, dims, K, D, BLOCK_D)[None, :]
        top = tl.maximum(top, tl.max(tl.abs(x - center), 1))
        size = tl.maximum(size, tl.max(tl.abs(x), 1))
        wrong = tl.maximum(wrong, tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1))
    return tl.minimum(-exponent_of(top) + TOP, highest), size, wrong == 0, top < float("inf")


@triton.jit
def scaled_tile(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    centered,  # float32 scalar, 1 or 0
    offsets,  # [BLOCK_N] int64
    live,  # [BLOCK_N] bool
    dims,  # [BLOCK_D] int32
    scale,  # [BLOCK_N] int32
    stride_d,
    K,
    D,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D] float32 centred tokens times 2^scale, in two steps: one factor would overflow."""
    center = sampled_center(codebook_ptr, centered, dims, K, D, BLOCK_D)[None, :]
    x = load_tile(x_ptr, offsets, live, dims, D, stride_d) - center
    return x * power_of_two(scale >> 1)[:, None] * power_of_two(scale - (scale >> 1))[:, None]


@triton.jit
def token_operands(
    tile,  # int32 scalar
    reference,  # int32 scalar
    centered,  # float32 scalar, 1 or 0
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    tokens_ptr,  # [tokens, depth] float16
    stats_ptr,  # [N, 4] float32: a (NaN: not finite), b, m, largest |x|
    tokens_per_batch,
    stride_b,
    stride_t,
    stride_d,
    N,
    K,
    D,
    depth,
    COSINE: tl.constexpr,
    TERMS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of tokens: halves hi hi lo and the weights of the bias; rows past the last one, and those with NaN or Inf,
    are zero.

    a >= the norm of what rounding took, b >= the norm of what the product sees. Subtracting its half from a number is
    exact in float32; the sums of squares are off by less than D 2^-23 of themselves.
    """
    rows = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < N
    offsets = row_offsets(rows, tokens_per_batch, stride_b, stride_t)
    shared = bias_exponent(reference, D, COSINE)
    highest = -shared + (TOP_BIAS + 1)
    scale, size, finite, bounded = token_scale(
        x_ptr, codebook_ptr, centered, offsets, live, stride_d, K, D, highest, BLOCK_T, BLOCK_D
    )
    lowest: tl.constexpr = -24 if BIAS == 1 else -100  # below it the weight is no fp16, or no float32
    followed = (scale + shared >= lowest) | COSINE
    weight = power_of_two(tl.maximum(scale + shared, -100))
    readable = live & finite & bounded
    kept = tl.zeros([BLOCK_T], tl.float32)
    lost = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, depth, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        part, dims = column_of(columns, D, TERMS)
        dims = tl.where(part < TERMS, dims, D)
        value = scaled_tile(x_ptr, codebook_ptr, centered, offsets, readable, dims, scale, stride_d, K, D, BLOCK_D)
        rounded = value.to(tl.float16).to(tl.float32)
        rest = value - rounded
        if TERMS == 3:
            low = rest.to(tl.float16).to(tl.float32)
            rest = rest - low
            value = tl.where((part == 2)[None, :], low, rounded)
        else:
            value = rounded
        kept += tl.sum(tl.where((part == 0)[None, :], rounded * rounded, 0.0), 1)
        lost += tl.sum(tl.where((part == 0)[None, :], rest * rest, 0.0), 1)
        value = tl.where((part < TERMS)[None, :] & readable[:, None], value, 0.0)
        if BIAS == 1:
            which = columns - TERMS * D
            weighted = ((which >= 0) & (which < 3))[None, :] & live[:, None]
            value = tl.where(weighted, weight[:, None], value)
        where = tokens_ptr + rows[:, None] * depth + columns[None, :]
        tl.store(where, value.to(tl.float16), mask=(columns < depth)[None, :] & (rows >= 0)[:, None])
    slack = 1.0 + 2.0**-10 + D * (2.0 * UNIT32)
    flat = tl.sqrt_rn(tl.full([], D, tl.float32)) * 2.0**-13  # half a unit of fp16's subnormals, times 2^11
    b = tl.sqrt_rn(kept) * slack + flat
    a = tl.sqrt_rn(lost) * slack + b * (2.0 * UNIT32) + SLACK  # x - mu is rounded too
    a = tl.where(finite, tl.where(bounded & followed, a, UNKNOWN), float("nan"))
    tl.store(stats_ptr + rows * 4, a, mask=live)
    tl.store(stats_ptr + rows * 4 + 1, b, mask=live)
    tl.store(stats_ptr + rows * 4 + 2, weight, mask=live)
    tl.store(stats_ptr + rows * 4 + 3, size, mask=live)


@triton.jit(do_not_specialize=["tokens_per_batch", "stride_b", "N", "K", "code_programs"])
def operands_kernel(
    x_ptr,  # [B, T, D]
    codebook_ptr,  # [K, D]
    tokens_ptr,  # [tokens, depth] float16
    stats_ptr,  # [N, 4] float32
    operand_ptr,  # [codes, depth] float16
    bias_ptr,  # [codes] float32
    limits_ptr,  # [granules, 4] float32
    unit_ptr,  # [K] float64
    tokens_per_batch,
    stride_b,
    stride_t,
    stride_d,
    N,
    K,
    D,
    depth,
    code_programs,
    product_error,  # of a score by arithmetic, relative to |x| |c|
    bias_error,  # and to |c|^2 / 2
    COSINE: tl.constexpr,
    TERMS: tl.constexpr,
    BIAS: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The first programs take BLOCK_G granules of codes each, the others a tile of tokens."""
    reference, centered = reference_scale(codebook_ptr, K, D, COSINE, BLOCK_D)
    program = tl.program_id(0)
    if program < code_programs:
        code_operands(
            program, reference, centered, codebook_ptr, operand_ptr, bias_ptr, limits_ptr, unit_ptr,
            K, D, depth, product_error, bias_error, COSINE, TERMS, BIAS, GRANULE, BLOCK_G, BLOCK_D,
        )  # fmt: skip
    else:
        token_operands(
            program - code_programs, reference, centered, x_ptr, codebook_ptr, tokens_ptr, stats_ptr,
            tokens_per_batch, stride_b, stride_t, stride_d, N, K, D, depth, COSINE, TERMS, BIAS, BLOCK_T, BLOCK_D,
        )  # fmt: skip
