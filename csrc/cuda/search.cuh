// One search as every kernel sees it, and its distances in float64.
#pragma once

#include <cstring>
#include <type_traits>

#include "../exact.h"
#include "coarse.cuh"

namespace vqkernels::cuda {

template <typename T>
struct Search {
  Tokens<const T> x;      // [B, T, D]
  const T* codebook;      // [K, D]
  int64_t codebook_size;  // K
  bool cosine;

  VQ_DEVICE const T* code(int64_t k) const { return codebook + k * x.dim; }
};

constexpr double kUnit = 0x1p-53;  // unit roundoff of float64

// Of a value >= 0; -1023 for subnormals, which a scaling by 2^1023 brings above 2^-52.
VQ_DEVICE int exponent_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return static_cast<int>((bits >> 52) & 0x7ff) - 1023;
}

VQ_DEVICE double two_to_the(int exponent) {
  uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// A power of two that brings `largest` near 1, as two factors: 2^1074 is no double.
struct PowerOfTwo {
  double factor, factor2;
  VQ_DEVICE double operator()(double value) const { return value * factor * factor2; }
};

VQ_DEVICE PowerOfTwo power_of_two_for(double largest) {
  int exponent = -exponent_of(largest);
  return {two_to_the(exponent / 2), two_to_the(exponent - exponent / 2)};
}

// For values that float32 holds: two Newton steps from its 22 bits. Less code than the float64 root.
VQ_DEVICE double inverse_sqrt_in_float_range(double value) {
  double root = inverse_sqrt(static_cast<float>(value));
  for (int step = 0; step < 2; ++step) root *= 1.5 - 0.5 * value * root * root;
  return root;
}

// Within a few units of float64; 0, infinity and NaN stay what they are.
VQ_DEVICE double square_root(double square) {
  if (!(square > 0 && square < INFINITY)) return square;
  int half = exponent_of(square) >> 1;
  double scaled = square * two_to_the(-half) * two_to_the(-half);  // in [1, 4) unless subnormal
  return scaled * inverse_sqrt_in_float_range(scaled) * two_to_the(half);
}

VQ_DEVICE double larger_or_nan(double a, double b) { return a > b || a != a ? a : b; }

// Below, `group` adjacent lanes (1 to 32) call each function together for one code, each with its own `lane`.
VQ_DEVICE double group_sum(double value, int group) {
  for (int mask = group / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

VQ_DEVICE double group_max(double value, int group) {
  for (int mask = group / 2; mask > 0; mask /= 2) {
    double other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Two rows of `dim` numbers.
template <typename T>
struct Pair {
  const T* token;
  int64_t stride;  // of the token's entries
  const T* code;
  int64_t dim;
};

template <typename T>
VQ_DEVICE double rough_distance(const Pair<T>& pair, int lane, int group) {
  double sum = 0;
  for (int64_t d = lane; d < pair.dim; d += group) {
    double difference =
        static_cast<double>(widen(pair.token[d * pair.stride])) - static_cast<double>(widen(pair.code[d]));
    sum = std::fma(difference, difference, sum);
  }
  return group_sum(sum, group);
}

// Float inputs need none: their products neither overflow nor underflow in float64.
template <typename T>
VQ_DEVICE PowerOfTwo power_of_two(const T*, int64_t, int64_t, int, int) {
  return {1.0, 1.0};
}
VQ_DEVICE PowerOfTwo power_of_two(const double* row, int64_t stride, int64_t dim, int lane, int group) {
  double largest = 0;
  for (int64_t d = lane; d < dim; d += group) largest = std::fmax(largest, std::fabs(row[d * stride]));
  return power_of_two_for(group_max(largest, group));
}

// cos(x, c) in float64, 0 for a zero vector.
template <typename T>
VQ_DEVICE double rough_cosine(const Pair<T>& pair, int lane, int group) {
  PowerOfTwo x_scale = power_of_two(pair.token, pair.stride, pair.dim, lane, group);
  PowerOfTwo c_scale = power_of_two(pair.code, 1, pair.dim, lane, group);
  double dot = 0, xx = 0, cc = 0;
  for (int64_t d = lane; d < pair.dim; d += group) {
    double x = x_scale(widen(pair.token[d * pair.stride])), c = c_scale(widen(pair.code[d]));
    dot = std::fma(x, c, dot);
    xx = std::fma(x, x, xx);
    cc = std::fma(c, c, cc);
  }
  dot = group_sum(dot, group);
  xx = group_sum(xx, group);
  cc = group_sum(cc, group);
  return xx > 0 && cc > 0 ? dot * inverse_sqrt(xx) * inverse_sqrt(cc) : 0.0;
}

// What is minimised: |x - c|^2 or -cos(x, c).
template <typename T>
VQ_CALLED double rough_score(Pair<T> pair, bool cosine, int lane, int group) {
  return cosine ? -rough_cosine(pair, lane, group) : rough_distance(pair, lane, group);
}

// Scores up to here may belong to the true best. A sum of D float64 squares is off by (D + 4) units at most;
// squares of doubles can also underflow, or overflow, which makes the limit infinite.
template <typename T>
VQ_DEVICE double rough_limit(double lowest, int64_t dim, bool cosine) {
  double terms = static_cast<double>(dim + 8);
  if (cosine) return lowest + 8 * terms * kUnit;
  double limit = lowest * (1 + 4 * terms * kUnit);
  double hidden = std::is_same<T, double>::value ? terms * 0x1p-1000 : 0.0;
  return limit > hidden ? limit : hidden;
}

}  // namespace vqkernels::cuda
