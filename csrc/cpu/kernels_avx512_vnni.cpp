// The int16 and byte passes for AVX512 with VNNI: twice float32's multiply-adds, and four times. AVX512
// without VNNI needs two instructions that share a port for the same, and gains nothing.
#include "kernel_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#endif

#include "floats_avx512.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int REGISTER_BYTES = 64;  // see strips.h

struct Int16 : Columns {
  using Word = int32_t;
  using Vector = __m512i;
  static constexpr int ROWS = 6, VECTORS = 4, LANES = 16, DEPTH = 2;
  static int64_t steps(int64_t dim) { return (dim + 1) / 2; }
  static Vector load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, Vector v) { _mm512_storeu_si512(p, v); }
  static Vector broadcast(int32_t value) { return _mm512_set1_epi32(value); }
  static Vector start(Vector biases, Vector shared) { return _mm512_madd_epi16(biases, shared); }
  static Vector minimum(Vector a, Vector b) { return _mm512_min_epi32(a, b); }
  static int32_t least(Vector v) { return _mm512_reduce_min_epi32(v); }
  // the intrinsic makes GCC 12 move and spill the sums
  static void accumulate(Vector& sum, Vector a, Vector b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
  static int32_t limit_of(double limit) {
    return limit >= 2147483647.0 ? 2147483647 : static_cast<int32_t>(__builtin_floor(limit));
  }
  static unsigned below(Vector v, int32_t limit) {
    return _mm512_cmple_epi32_mask(v, _mm512_set1_epi32(limit));
  }
};

// Of eight bits each; their sums of 32 bits do not saturate.
struct Bytes {
  using Vector = __m512i;
  static constexpr int ROWS = 5, OFFSET = 128;
  static constexpr float LARGEST_SUM = 4 * 255.0f;  // fits whatever it is
  static Vector load(const int32_t* p) { return Int16::load(p); }
  static Vector broadcast(int32_t value) { return Int16::broadcast(value); }
  static __m512 to_floats(Vector v) { return _mm512_cvtepi32_ps(v); }
  static int32_t first(Vector v) { return _mm512_cvtsi512_si32(v); }
  static void renew(Vector& v) { asm volatile("" : "+v"(v)); }
  static void add(Vector& sum, Vector tokens, Vector more_tokens, Vector codes, Vector more_codes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(tokens), "v"(codes));
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(more_tokens), "v"(more_codes));
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "kernel_byte.h"
#include "kernel_int16.h"

namespace vqkernels {
namespace cpu {
namespace {
constexpr CoarsePass INT16 = make_int16_pass<Int16>();
constexpr CoarsePass BYTE = Byte<Float32, Bytes>::make_pass();
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
const CoarsePass* avx512_vnni_int16() { return &INT16; }
const CoarsePass* avx512_vnni_byte() { return &BYTE; }
}  // namespace cpu
}  // namespace vqkernels

#else
namespace vqkernels {
namespace cpu {
const CoarsePass* avx512_vnni_int16() { return nullptr; }
const CoarsePass* avx512_vnni_byte() { return nullptr; }
}  // namespace cpu
}  // namespace vqkernels
#endif
