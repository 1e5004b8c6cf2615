// The inner loops for AVX2 with FMA.
#include "kernel_table.h"

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

struct Shape {
  static constexpr int ROWS = 6;
  static constexpr int VECTORS = 2;
};

struct Simd {
  static constexpr int LANES = 8;
  using Vector = __m256;
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector broadcast(float value) { return _mm256_set1_ps(value); }
  static Vector minimum(Vector a, Vector b) { return _mm256_min_ps(a, b); }
  static Vector subtract_product(Vector acc, Vector a, Vector b) { return _mm256_fnmadd_ps(a, b, acc); }
  static bool any_below(Vector v, float limit) {
    return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(limit), _CMP_LE_OQ)) != 0;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "kernel_impl.h"

namespace vqkernels {
namespace cpu {
namespace {
constexpr KernelTable TABLE = make_table("avx2");
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
const KernelTable* avx2_kernels() { return &TABLE; }
}  // namespace cpu
}  // namespace vqkernels

#else
namespace vqkernels {
namespace cpu {
const KernelTable* avx2_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace vqkernels
#endif
