// The inner loops for AVX512.
#include "kernel_table.h"

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

struct Shape {
  static constexpr int ROWS = 6;
  static constexpr int VECTORS = 4;
};

struct Simd {
  static constexpr int LANES = 16;
  using Vector = __m512;
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector broadcast(float value) { return _mm512_set1_ps(value); }
  static Vector minimum(Vector a, Vector b) { return _mm512_min_ps(a, b); }
  static Vector subtract_product(Vector acc, Vector a, Vector b) { return _mm512_fnmadd_ps(a, b, acc); }
  static bool any_below(Vector v, float limit) {
    return _mm512_cmp_ps_mask(v, _mm512_set1_ps(limit), _CMP_LE_OQ) != 0;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "kernel_impl.h"

namespace vqkernels {
namespace cpu {
namespace {
constexpr KernelTable TABLE = make_table("avx512");
}
}  // namespace cpu
}  // namespace vqkernels

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace vqkernels {
namespace cpu {
const KernelTable* avx512_kernels() { return &TABLE; }
}  // namespace cpu
}  // namespace vqkernels

#else
namespace vqkernels {
namespace cpu {
const KernelTable* avx512_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace vqkernels
#endif
