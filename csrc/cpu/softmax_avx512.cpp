// The loops of the streaming softmax for AVX512.
#include "softmax_power.h"
#include "softmax_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

namespace vqkernels {
namespace cpu {
namespace {

constexpr int REGISTER_BYTES = 64;  // see strips.h

struct Pass {
  using Word = float;
  using Vector = __m512;
  static constexpr int LANES = 16, VECTORS = 4, ROWS = 6, TOKENS = 4;
  static constexpr float LEAST = -126.0f;
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector broadcast(float value) { return _mm512_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static float sum_of(Vector v) { return _mm512_reduce_add_ps(v); }
  static float largest_of(Vector v) { return _mm512_reduce_max_ps(v); }

  // Sums of lanes, many at once: 3 instructions a call where each sum by itself takes 8.
  static Vector halves(Vector a, Vector b) {  // (a, a, b, b)
    return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  static Vector quarters(Vector a, Vector b) {  // of two halves: one quarter each
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  // out[n, d] += the sum of sums[d][n]'s lanes, four dimensions of four tokens at a time.
  template <int DIMS>
  static void add_sums(const Vector (&sums)[DIMS][TOKENS], int64_t tokens, int64_t stride, float* out) {
    constexpr int PADDED = (DIMS + 3) / 4 * 4;
    Vector parts[PADDED];  // quarter n: four parts of token n's sum
#pragma GCC unroll 8
    for (int d = 0; d < PADDED; ++d) {
      parts[d] = d < DIMS ? quarters(halves(sums[d][0], sums[d][1]), halves(sums[d][2], sums[d][3]))
                          : broadcast(0.0f);
    }
#pragma GCC unroll 2
    for (int d = 0; d < PADDED; d += 4) {
      const Vector first = add(_mm512_unpacklo_ps(parts[d], parts[d + 1]),
                               _mm512_unpackhi_ps(parts[d], parts[d + 1]));  // (d, d + 1, d, d + 1)
      const Vector second =
          add(_mm512_unpacklo_ps(parts[d + 2], parts[d + 3]), _mm512_unpackhi_ps(parts[d + 2], parts[d + 3]));
      const Vector four = add(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
      const __mmask8 dims = static_cast<__mmask8>(DIMS - d >= 4 ? 0xf : (1 << (DIMS - d)) - 1);
      add_quarter<0>(four, dims, out + d);
      if (tokens > 1) add_quarter<1>(four, dims, out + stride + d);
      if (tokens > 2) add_quarter<2>(four, dims, out + 2 * stride + d);
      if (tokens > 3) add_quarter<3>(four, dims, out + 3 * stride + d);
    }
  }
  template <int QUARTER>
  static void add_quarter(Vector v, __mmask8 lanes, float* out) {
    const __m128 sum = _mm_add_ps(_mm_maskz_loadu_ps(lanes, out), _mm512_extractf32x4_ps(v, QUARTER));
    _mm_mask_storeu_ps(out, lanes, sum);
  }

  static Vector power(Vector t) {
    const Vector whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vector rest = _mm512_sub_ps(t, whole);
    Vector value = broadcast(PowerSeries<float>::C[PowerSeries<float>::TERMS - 1]);
#pragma GCC unroll 8
    for (int i = PowerSeries<float>::TERMS - 2; i >= 0; --i) {
      value = fma(value, rest, broadcast(PowerSeries<float>::C[i]));
    }
    value = fma(value, rest, broadcast(1.0f));
    const __mmask16 counts = _mm512_cmp_ps_mask(t, broadcast(LEAST), _CMP_NLE_UQ);  // a NaN does
    return _mm512_maskz_scalef_ps(counts, value, whole);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "softmax_tile.h"

namespace vqkernels {
namespace cpu {
namespace {
constexpr SoftmaxTable<float> TABLE = SoftmaxTile<Pass>::make_table("avx512");
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
const SoftmaxTable<float>* avx512_softmax() { return &TABLE; }
}  // namespace cpu
}  // namespace vqkernels

#else
namespace vqkernels {
namespace cpu {
const SoftmaxTable<float>* avx512_softmax() { return nullptr; }
}  // namespace cpu
}  // namespace vqkernels
#endif
