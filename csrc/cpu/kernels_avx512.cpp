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

#include "floats_avx512.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int REGISTER_BYTES = 64;  // see strips.h

// Eight tiles of 16 rows of 64 bytes, this thread's until released. The compiler's own functions for them
// want literals for numbers.
struct AmxTiles {
  AmxTiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~AmxTiles() { asm volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  void clear() {}  // as they are at first
  template <int TILE>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
  }
  template <int TILE>
  void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
  }
  template <int TILE>
  void store(int32_t* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{64}), "i"(TILE) : "memory");
  }
  template <int SUM, int A, int B>
  void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
  }
};

struct Float64 {
  using Word = double;
  using Vector = __m512d;
  static constexpr int ROWS = 6, VECTORS = 4, LANES = 8, DEPTH = 1;
  static int64_t steps(int64_t dim) { return dim; }
  static Vector load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Vector v) { _mm512_storeu_pd(p, v); }
  static Vector broadcast(double value) { return _mm512_set1_pd(value); }
  static Vector start(Vector biases, Vector /*shared*/) { return biases; }
  static Vector minimum(Vector a, Vector b) { return _mm512_min_pd(a, b); }
  static double least(Vector v) { return _mm512_reduce_min_pd(v); }
  static void accumulate(Vector& sum, Vector a, Vector b) { sum = _mm512_fnmadd_pd(a, b, sum); }
  static double limit_of(double limit) { return limit; }
  static unsigned below(Vector v, double limit) {
    return _mm512_cmp_pd_mask(v, _mm512_set1_pd(limit), _CMP_LE_OQ);
  }
};

struct Unit {
  typedef uint64_t Words __attribute__((vector_size(64)));
  static Words product_of_halves(Words word) {
    return (Words)_mm512_mul_epu32((__m512i)word, _mm512_srli_epi64((__m512i)word, 32));
  }
  using Narrow = __m256;
  static __m512d widen(Narrow v) { return _mm512_cvtps_pd(v); }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "kernel_int8.h"
#include "kernel_wide.h"

namespace vqkernels {
namespace cpu {
namespace {
constexpr CoarsePass FLOAT32 = make_wide_pass<Float32>("float32", 0x1p120);
constexpr CoarsePass INT8 = Int8<Float32, AmxTiles>::make_pass();
constexpr CoarsePass FLOAT64 = make_wide_pass<Float64>("float64", __builtin_inf());
constexpr KernelTable TABLE = make_table<Unit>("avx512", &FLOAT32, &FLOAT64, nullptr, nullptr,
                                               false);  // those are in kernels_avx512_vnni.cpp
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
const KernelTable* avx512_kernels() { return &TABLE; }
const CoarsePass* avx512_amx_int8() { return &INT8; }
}  // namespace cpu
}  // namespace vqkernels

#else
namespace vqkernels {
namespace cpu {
const KernelTable* avx512_kernels() { return nullptr; }
const CoarsePass* avx512_amx_int8() { return nullptr; }
}  // namespace cpu
}  // namespace vqkernels
#endif
