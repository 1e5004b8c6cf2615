// Packing for the int16 pass: products of integers are exact, so all of its error is what rounding leaves,
// and that is measured.
//
// With b = target / (largest |c - mu|) a code becomes C = b (c - mu), rounded to integers c^; a token X = a
// (x - mu), rounded to x^, where a brings the norms of its tile to target or less. |X|, |C| <= 2^15 keep
// x^.c^ and all its partial sums below 2^30. With |C|^2/2 = 2^14 eta the score a b (h - x.c) is A eta - X.C,
// A = 2^14 a / b: sums start at A eta, the product of two pairs, A and A / 128 with eta and its fraction in
// 128ths, which is below 2^30 too.
#pragma once

#include "kernel_scores.h"
#include "strips.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr double BIAS_STEP = 16384.0;  // 2^14
constexpr double BIAS_FRACTION = 128.0;
constexpr double LARGEST_INT16 = 32767.0;

// Sixteen numbers rounded, with what that costs.
struct Rounded {
  ShortStrip values;
  FloatStrip square;    // before rounding
  FloatStrip residual;  // squared
};

template <bool NEGATE>
inline Rounded round_strip(FloatStrip strip, float factor) {
  const FloatStrip value = strip * factor;
  const FloatStrip rounded = rounded_strip(value);
  const FloatStrip left = value - rounded;
  return {shorts_of(integers_of(NEGATE ? -rounded : rounded)), value * value, left * left};
}

template <class P>
void pack_int16_panel(const float* const* codes,    // [WIDTH] of [D]
                      const double* inverse_norms,  // [WIDTH] or null
                      const Packing& packing,
                      void* panel,  // [1 + steps, WIDTH] pairs
                      CodeBound* bound) {
  constexpr int WIDTH = Scores<P>::WIDTH;
  constexpr int64_t PAIRS = STRIP;  // packed at a time, of two dimensions each
  const int64_t steps = P::steps(packing.dim);
  const float factor = static_cast<float>(packing.code_factor);
  int32_t* out = static_cast<int32_t*>(panel) + WIDTH;
  FloatStrip square_parts[WIDTH], residual_parts[WIDTH];
  for (int j = 0; j < WIDTH; ++j) square_parts[j] = residual_parts[j] = FloatStrip{};
  for (int64_t base = 0; base < steps; base += PAIRS) {
    const int64_t end = steps - base < PAIRS ? steps - base : PAIRS;
    for (int first = 0; first < WIDTH; first += 16) {
      IntStrip pairs[16] = {};
      for (int j = 0; j < 16; ++j) {
        const int code = first + j;
        for (int half = 0; half < 2; ++half) {
          const int64_t d = 2 * base + half * STRIP;
          if (d >= packing.dim) break;
          // sixteen rows a piece at a time are more than the processor's own fetching follows
          const int64_t next = d + 2 * STRIP;
          __builtin_prefetch(codes[code] +
                             (next < packing.dim ? next : WIDTH * packing.dim + d % (2 * STRIP)));
          const Rounded rounded =
              round_strip<true>(code_strip(codes, inverse_norms, code, packing, d), factor);
          __builtin_memcpy(reinterpret_cast<ShortStrip*>(&pairs[j]) + half, &rounded.values,
                           sizeof(ShortStrip));
          square_parts[code] += rounded.square;
          residual_parts[code] += rounded.residual;
        }
      }
      transpose(pairs);
      for (int64_t i = 0; i < end; ++i) store_vector(out + (base + i) * WIDTH + first, pairs[i]);
    }
  }
  float squares[WIDTH], residuals[WIDTH];
  for (int j = 0; j < WIDTH; ++j) {
    squares[j] = sum_of(square_parts[j]);
    residuals[j] = sum_of(residual_parts[j]);
  }
  float largest = 0.0f, most_left = 0.0f;
  for (int j = 0; j < WIDTH; ++j) {
    largest = squares[j] > largest ? squares[j] : largest;
    most_left = residuals[j] > most_left ? residuals[j] : most_left;
  }
  const double norm = norm_of(largest);
  const double left = norm_of(most_left) + ROUNDING * norm + 0x1p-40;
  bound->largest = norm > bound->largest ? norm : bound->largest;
  bound->residual = left > bound->residual ? left : bound->residual;
  int16_t* bias = static_cast<int16_t*>(panel);
  for (int j = 0; j < WIDTH; ++j) {
    const float eta = packing.cosine ? 0.0f : squares[j] * static_cast<float>(0.5 / BIAS_STEP);
    const int32_t whole = eta < 32767.0f ? static_cast<int32_t>(eta) : 32767;
    bias[2 * j] = static_cast<int16_t>(whole);
    bias[2 * j + 1] = static_cast<int16_t>((eta - static_cast<float>(whole)) * 128.0f + 0.5f);
  }
}

// How a token is scaled, and what the biases are multiplied with.
struct TokenScale {
  double factor;     // a
  double bias;       // A
  int32_t whole;     // A rounded, for eta
  int32_t fraction;  // A / 128 rounded, for the fraction of eta
};

inline TokenScale scale_token(const Packing& packing, double norm, double largest) {
  if (packing.cosine) return {norm > 0.0 ? packing.target / norm : 1.0, 0.0, 0, 0};
  const double to_bias = BIAS_STEP / packing.code_factor;
  double most = largest > 0.0 ? packing.target / largest * to_bias : LARGEST_INT16;
  most = most < LARGEST_INT16 ? most : LARGEST_INT16;
  const int32_t whole = static_cast<int32_t>(most);
  // an A that is an integer costs nothing and has no error; below 1 there is none
  const double factor = static_cast<float>((whole > 0 ? static_cast<double>(whole) : most) / to_bias);
  const double bias = factor * to_bias;
  return {factor, bias, whole, static_cast<int32_t>(bias / BIAS_FRACTION + 0.5)};
}

inline double bias_error(const Packing& packing, const TokenScale& scale) {
  if (packing.cosine) return 0.0;
  const double largest = LARGEST_INT16 + 1.0;
  const double sums = half_square_error(packing.dim);
  return __builtin_fabs(scale.bias - scale.whole) * largest + sums * scale.bias * largest + 1.0 +
         __builtin_fabs(scale.bias / BIAS_FRACTION - scale.fraction) * BIAS_FRACTION + 0.5 * scale.fraction;
}

template <class P>
void pack_int16_token(const float* token,  // [D]
                      const Packing& packing, double norm, double largest, int row,
                      void* tile,  // [ROWS, steps] pairs and one
                      TokenBound* bound) {
  const int64_t dim = packing.dim, steps = P::steps(dim);
  const TokenScale scale = scale_token(packing, norm, largest);
  const float factor = static_cast<float>(scale.factor);
  int16_t* out = static_cast<int16_t*>(tile) + row * 2 * steps;
  FloatStrip residuals{};
  for (int64_t d = 0; d < dim; d += STRIP) {
    const Rounded rounded = round_strip<false>(packed_strip(token, packing, d), factor);
    residuals += rounded.residual;
    const int64_t width = 2 * steps - d < STRIP ? 2 * steps - d : STRIP;
    if (width == STRIP) {
      __builtin_memcpy(out + d, &rounded.values, sizeof(rounded.values));
    } else {
      for (int64_t i = 0; i < width; ++i) out[d + i] = rounded.values[i];
    }
  }
  const int16_t shared[2] = {static_cast<int16_t>(scale.whole), static_cast<int16_t>(scale.fraction)};
  __builtin_memcpy(static_cast<int32_t*>(tile) + P::ROWS * steps, shared, sizeof(shared));
  const double length = scale.factor * norm;
  const double left = norm_of(sum_of(residuals)) + ROUNDING * length + 0x1p-40;
  *bound = {scale.factor * packing.code_factor, length + left, left, bias_error(packing, scale), 0.0};
}

template <class P>
constexpr CoarsePass make_int16_pass() {
  return Scores<P>::make_pass("int16", __builtin_inf(), pack_int16_panel<P>, pack_int16_token<P>);
}

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
