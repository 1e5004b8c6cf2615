// The loops of the streaming softmax for AVX2 with FMA.
#include "softmax_power.h"
#include "softmax_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace vqkernels {
namespace cpu {
namespace {

constexpr int REGISTER_BYTES = 32;  // see strips.h

struct Pass {
  using Word = float;
  using Vector = __m256;
  static constexpr int LANES = 8, VECTORS = 2, ROWS = 6, TOKENS = 2;
  static constexpr float LEAST = -126.0f;
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector broadcast(float value) { return _mm256_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static float sum_of(Vector v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static float largest_of(Vector v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static Vector power(Vector t) {
    const Vector whole = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vector rest = _mm256_sub_ps(t, whole);
    Vector value = broadcast(PowerSeries<float>::C[PowerSeries<float>::TERMS - 1]);
#pragma GCC unroll 8
    for (int i = PowerSeries<float>::TERMS - 2; i >= 0; --i) {
      value = fma(value, rest, broadcast(PowerSeries<float>::C[i]));
    }
    value = fma(value, rest, broadcast(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    const Vector scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), exponent));
    const Vector counts = _mm256_cmp_ps(t, broadcast(LEAST), _CMP_NLE_UQ);  // a NaN does
    return _mm256_and_ps(counts, scaled);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "softmax_tile.h"

namespace vqkernels {
namespace cpu {
namespace {
constexpr SoftmaxTable<float> TABLE = SoftmaxTile<Pass>::make_table("avx2");
}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace vqkernels {
namespace cpu {
const SoftmaxTable<float>* avx2_softmax() { return &TABLE; }
}  // namespace cpu
}  // namespace vqkernels

#else
namespace vqkernels {
namespace cpu {
const SoftmaxTable<float>* avx2_softmax() { return nullptr; }
}  // namespace cpu
}  // namespace vqkernels
#endif
