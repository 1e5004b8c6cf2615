"""Exact decisions in Triton: sums of float64 products without rounding, and cosines in double-double.

Products of float32 values are exact in float64. A sum of such terms is taken apart into digits of 36 bits, from the
highest down, and the digits are added as int64: no order of additions can change the result. Every product below is
exact, or lies far under the last bit that counts, so that contraction to fused multiply-adds changes nothing either.
"""

from __future__ import annotations

import triton
import triton.language as tl

BITS = tl.constexpr(36)  # of a digit; at most 2^18 terms make a sum below 2^54
SCALE = tl.constexpr(2.0**36)
EXPONENT_MASK = tl.constexpr(0x7FF << 52)
DECIDED = tl.constexpr(1 << 24)  # more than there are terms: the digits below cannot change the sign any more
ENOUGH = tl.constexpr(2.0**144)  # four digits from the largest term down, where 106 bits are kept


@triton.jit
def digit_places(
    largest,  # float64 scalar, the largest |term|
    smallest,  # float64 scalar, the smallest that is not 0; inf where there is none
):
    """Powers of two: what scales the highest digit to an integer, and a factor at which none is needed any more."""
    high = (tl.where(largest > 0, largest, 1.0).to(tl.int64, bitcast=True) & EXPONENT_MASK).to(tl.float64, bitcast=True)
    low = (tl.where(largest > 0, smallest, 1.0).to(tl.int64, bitcast=True) & EXPONENT_MASK).to(tl.float64, bitcast=True)
    first = SCALE / 2 / high
    return first, tl.where(largest > 0, SCALE * 2.0**52 / low, first)


@triton.jit
def digit(
    term,  # [..., BLOCK_D] float64
    factor,  # float64 scalar, a power of two
):
    """The lowest 36 bits of the integer part of |term| * factor, signed like it, as int64."""
    size = tl.abs(term) * factor
    bits = tl.floor(size) - tl.floor(size / SCALE) * SCALE
    return tl.where(term < 0, -bits, bits).to(tl.int64)


@triton.jit
def extremes(
    term,  # [..., BLOCK_D] float64
    largest,
    smallest,
):
    """The largest |term| and the smallest that is not 0, among these and the scalars given."""
    size = tl.abs(term)
    return tl.maximum(largest, tl.max(size)), tl.minimum(smallest, tl.min(tl.where(size == 0, float("inf"), size)))


@triton.jit
def load_row(
    ptr,  # [..., D]
    offset,  # int64 scalar
    stride_d,
    dims,  # [BLOCK_D] int32
    D,
):
    """[BLOCK_D] float64 of one row, zero past its end."""
    value = tl.load(ptr + offset + dims.to(tl.int64) * stride_d, mask=dims < D, other=0.0)
    return value.to(tl.float64)


@triton.jit
def difference_terms(
    x_ptr,  # [B, T, D]
    x_offset,
    x_stride,
    codebook_ptr,  # [K, D] float32
    a_offset,
    b_offset,
    dims,  # [BLOCK_D] int32
    D,
):
    """[4, BLOCK_D] exact terms aa, -bb, -2xa, 2xb: their sum is |x - a|^2 - |x - b|^2."""
    x = tl.load(x_ptr + x_offset + dims.to(tl.int64) * x_stride, mask=dims < D, other=0.0)
    x = x.to(tl.float64)[None, :]
    a = tl.load(codebook_ptr + a_offset + dims, mask=dims < D, other=0.0).to(tl.float64)[None, :]
    b = tl.load(codebook_ptr + b_offset + dims, mask=dims < D, other=0.0).to(tl.float64)[None, :]
    differ = a != b  # where they agree the four cancel
    which = tl.arange(0, 4)[:, None]
    code = tl.where(differ, tl.where(which % 2 == 0, a, b), 0.0)
    factor = tl.where(which < 2, code, -2.0 * x)
    return tl.where(which % 2 == 0, factor, -factor) * code


@triton.jit
def compare_codes(
    x_ptr,  # [B, T, D]
    x_offset,
    x_stride,
    codebook_ptr,  # [K, D] float32
    code_a,
    code_b,
    D,
    BLOCK_D: tl.constexpr,
):
    """An int64 with the sign of |x - c_a|^2 - |x - c_b|^2 over the real numbers."""
    a_offset = code_a.to(tl.int64) * D
    b_offset = code_b.to(tl.int64) * D
    largest = tl.full([], 0.0, tl.float64)
    smallest = tl.full([], float("inf"), tl.float64)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        term = difference_terms(x_ptr, x_offset, x_stride, codebook_ptr, a_offset, b_offset, dims, D)
        largest, smallest = extremes(term, largest, smallest)
    total = tl.full([], 0, tl.int64)
    factor, stop = digit_places(largest, smallest)
    while (factor < stop) & (tl.abs(total) < DECIDED):
        total = total << BITS
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            term = difference_terms(x_ptr, x_offset, x_stride, codebook_ptr, a_offset, b_offset, dims, D)
            total += tl.sum(digit(term, factor))
        factor *= SCALE
    return total


@triton.jit
def two_sum(a, b):
    """a + b = s + e without rounding (Knuth)."""
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


@triton.jit
def two_product(a, b):
    """a * b as a double-double, to 2^-105 of itself; from half-width products, which are exact."""
    mask = tl.full([], -(1 << 27), tl.int64)
    a_high = (a.to(tl.int64, bitcast=True) & mask).to(tl.float64, bitcast=True)
    b_high = (b.to(tl.int64, bitcast=True) & mask).to(tl.float64, bitcast=True)
    a_low = a - a_high
    b_low = b - b_high
    middle, middle_error = two_sum(a_high * b_low, a_low * b_high)
    high, low = two_sum(a_high * b_high, middle)
    return two_sum(high, low + (middle_error + a_low * b_low))


@triton.jit
def row_dot(
    a_ptr,  # [..., D]
    a_offset,
    a_stride,
    b_ptr,  # [..., D]
    b_offset,
    b_stride,
    D,
    BLOCK_D: tl.constexpr,
):
    """The dot product of two rows as a double-double, to 2^-104 of the sum of its terms' sizes."""
    largest = tl.full([], 0.0, tl.float64)
    smallest = tl.full([], float("inf"), tl.float64)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        term = load_row(a_ptr, a_offset, a_stride, dims, D) * load_row(b_ptr, b_offset, b_stride, dims, D)
        largest, smallest = extremes(term, largest, smallest)
    high = tl.full([], 0.0, tl.float64)
    low = tl.full([], 0.0, tl.float64)
    factor, stop = digit_places(largest, smallest)
    stop = tl.minimum(stop, factor * ENOUGH)
    while factor < stop:
        total = tl.full([], 0, tl.int64)
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            term = load_row(a_ptr, a_offset, a_stride, dims, D) * load_row(b_ptr, b_offset, b_stride, dims, D)
            total += tl.sum(digit(term, factor))
        high, error = two_sum(high, total.to(tl.float64) / factor)
        low += error
        factor *= SCALE
    return two_sum(high, low)


@triton.jit
def cosine_of(
    dot_high,  # float64 scalars, each pair a double-double
    dot_low,
    x_high,
    x_low,
    c_high,
    c_low,
):
    """dot / sqrt(|x|^2 |c|^2) as a double-double; 0 where a norm is 0."""
    high, low = two_product(x_high, c_high)
    square, square_low = two_sum(high, low + (x_high * c_low + x_low * c_high))
    root = tl.sqrt(tl.where(square > 0, square, 1.0))
    high, low = two_product(root, root)
    root_low = ((square - high) + (square_low - low)) / (2.0 * root)
    ratio = dot_high / root
    high, low = two_product(ratio, root)
    ratio_low = ((dot_high - high) + (dot_low - low - ratio * root_low)) / root
    high, low = two_sum(ratio, ratio_low)
    return tl.where(square > 0, high, 0.0), tl.where(square > 0, low, 0.0)
