// Sixteen floats in a register, and the columns of passes with as many 32-bit lanes, for kernel_scores.h. The
// including unit compiles for AVX512.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace vqkernels {
namespace cpu {
namespace {

struct Columns {
  using Values = __m512;
  static Values load_values(const float* p) { return _mm512_loadu_ps(p); }
  static void store_values(float* p, Values v) { _mm512_storeu_ps(p, v); }
  static Values least_values(Values a, Values b) { return _mm512_min_ps(a, b); }
  static unsigned not_above(Values v, Values limits) { return _mm512_cmp_ps_mask(v, limits, _CMP_LE_OQ); }
  static Values values(__m512 sums, float factor, float offset) {
    return _mm512_fmadd_ps(sums, _mm512_set1_ps(factor), _mm512_set1_ps(offset));
  }
  static Values values(__m512i sums, float factor, float offset) {
    return values(_mm512_cvtepi32_ps(sums), factor, offset);
  }
};

struct Float32 : Columns {
  using Word = float;
  using Vector = __m512;
  static constexpr int ROWS = 6, VECTORS = 4, LANES = 16, DEPTH = 1;
  static int64_t steps(int64_t dim) { return dim; }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector broadcast(float value) { return _mm512_set1_ps(value); }
  static Vector start(Vector biases, Vector /*shared*/) { return biases; }
  static Vector minimum(Vector a, Vector b) { return _mm512_min_ps(a, b); }
  static float least(Vector v) { return _mm512_reduce_min_ps(v); }
  static void accumulate(Vector& sum, Vector a, Vector b) { sum = _mm512_fnmadd_ps(a, b, sum); }
  static Vector multiply_add(Vector a, float b, Vector c) { return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c); }
  static float limit_of(double limit) {
    return __builtin_nextafterf(static_cast<float>(limit), __builtin_inff());
  }
  static unsigned below(Vector v, float limit) {
    return _mm512_cmp_ps_mask(v, _mm512_set1_ps(limit), _CMP_LE_OQ);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
