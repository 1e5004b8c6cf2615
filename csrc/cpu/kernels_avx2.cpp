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

constexpr int REGISTER_BYTES = 32;  // see strips.h

// Of a vector stored as `Word lanes[]`.
template <class Word, int LANES>
inline Word least_of_lanes(const Word (&lanes)[LANES]) {
  Word least = lanes[0];
  for (int lane = 1; lane < LANES; ++lane) least = lanes[lane] < least ? lanes[lane] : least;
  return least;
}

// Columns of the passes with eight 32-bit lanes.
struct Columns {
  using Values = __m256;
  static Values load_values(const float* p) { return _mm256_loadu_ps(p); }
  static void store_values(float* p, Values v) { _mm256_storeu_ps(p, v); }
  static Values least_values(Values a, Values b) { return _mm256_min_ps(a, b); }
  static unsigned not_above(Values v, Values limits) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, limits, _CMP_LE_OQ)));
  }
  static Values values(__m256 sums, float factor, float offset) {
    return _mm256_fmadd_ps(sums, _mm256_set1_ps(factor), _mm256_set1_ps(offset));
  }
  static Values values(__m256i sums, float factor, float offset) {
    return values(_mm256_cvtepi32_ps(sums), factor, offset);
  }
};

struct Float32 : Columns {
  using Word = float;
  using Vector = __m256;
  static constexpr int ROWS = 6, VECTORS = 2, LANES = 8, DEPTH = 1;
  static int64_t steps(int64_t dim) { return dim; }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector broadcast(float value) { return _mm256_set1_ps(value); }
  static Vector start(Vector biases, Vector /*shared*/) { return biases; }
  static Vector minimum(Vector a, Vector b) { return _mm256_min_ps(a, b); }
  static Word least(Vector v) {
    Word lanes[LANES];
    store(lanes, v);
    return least_of_lanes(lanes);
  }
  static void accumulate(Vector& sum, Vector a, Vector b) { sum = _mm256_fnmadd_ps(a, b, sum); }
  static Vector multiply_add(Vector a, float b, Vector c) { return _mm256_fmadd_ps(a, _mm256_set1_ps(b), c); }
  static float limit_of(double limit) {
    return __builtin_nextafterf(static_cast<float>(limit), __builtin_inff());
  }
  static unsigned below(Vector v, float limit) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(limit), _CMP_LE_OQ)));
  }
};

struct Float64 {
  using Word = double;
  using Vector = __m256d;
  static constexpr int ROWS = 6, VECTORS = 2, LANES = 4, DEPTH = 1;
  static int64_t steps(int64_t dim) { return dim; }
  static Vector load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Vector v) { _mm256_storeu_pd(p, v); }
  static Vector broadcast(double value) { return _mm256_set1_pd(value); }
  static Vector start(Vector biases, Vector /*shared*/) { return biases; }
  static Vector minimum(Vector a, Vector b) { return _mm256_min_pd(a, b); }
  static Word least(Vector v) {
    Word lanes[LANES];
    store(lanes, v);
    return least_of_lanes(lanes);
  }
  static void accumulate(Vector& sum, Vector a, Vector b) { sum = _mm256_fnmadd_pd(a, b, sum); }
  static double limit_of(double limit) { return limit; }
  static unsigned below(Vector v, double limit) {
    return static_cast<unsigned>(_mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_set1_pd(limit), _CMP_LE_OQ)));
  }
};

struct Int16 : Columns {
  using Word = int32_t;
  using Vector = __m256i;
  static constexpr int ROWS = 6, VECTORS = 2, LANES = 8, DEPTH = 2;
  static int64_t steps(int64_t dim) { return (dim + 1) / 2; }
  static Vector load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(int32_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Vector broadcast(int32_t value) { return _mm256_set1_epi32(value); }
  static Vector start(Vector biases, Vector shared) { return _mm256_madd_epi16(biases, shared); }
  static Vector minimum(Vector a, Vector b) { return _mm256_min_epi32(a, b); }
  static Word least(Vector v) {
    Word lanes[LANES];
    store(lanes, v);
    return least_of_lanes(lanes);
  }
  static void accumulate(Vector& sum, Vector a, Vector b) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    __asm__("" : "+x"(sum));  // in this order: GCC 12 would add up products first, and spill half of them
  }
  static int32_t limit_of(double limit) {
    return limit >= 2147483647.0 ? 2147483647 : static_cast<int32_t>(__builtin_floor(limit));
  }
  static unsigned below(Vector v, int32_t limit) {
    const Vector above = _mm256_cmpgt_epi32(v, _mm256_set1_epi32(limit));
    return ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(above))) & 0xffu;
  }
};

// Products of bytes, two summed in 16 bits, and two more, then all four in 32: five instructions for 64
// products, where eight make as many of 16 bits.
struct Bytes {
  using Vector = __m256i;
  static constexpr int ROWS = 4, OFFSET = 64;
  static constexpr float LARGEST_SUM = 258.0f;  // 127 * 258 < 2^15
  static Vector load(const int32_t* p) { return Int16::load(p); }
  static Vector broadcast(int32_t value) { return _mm256_set1_epi32(value); }
  static __m256 to_floats(Vector v) { return _mm256_cvtepi32_ps(v); }
  static int32_t first(Vector v) { return _mm256_cvtsi256_si32(v); }
  static void renew(Vector& v) { __asm__ volatile("" : "+x"(v)); }

  Vector ones = _mm256_set1_epi16(1);
  Bytes() { __asm__("" : "+x"(ones)); }  // in a register, for which GCC 12 would keep a sum in memory
  void add(Vector& sum, Vector tokens, Vector more_tokens, Vector codes, Vector more_codes) const {
    const Vector sums =
        _mm256_add_epi16(_mm256_maddubs_epi16(tokens, codes), _mm256_maddubs_epi16(more_tokens, more_codes));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(sums, ones));
    __asm__("" : "+x"(sum));
  }
};

struct Unit {
  typedef uint64_t Words __attribute__((vector_size(32)));
  static Words product_of_halves(Words word) {
    return (Words)_mm256_mul_epu32((__m256i)word, _mm256_srli_epi64((__m256i)word, 32));
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "kernel_byte.h"
#include "kernel_int16.h"
#include "kernel_wide.h"

namespace vqkernels {
namespace cpu {
namespace {
constexpr CoarsePass FLOAT32 = make_wide_pass<Float32>("float32", 0x1p120);
constexpr CoarsePass FLOAT64 = make_wide_pass<Float64>("float64", __builtin_inf());
constexpr CoarsePass INT16 = make_int16_pass<Int16>();
constexpr CoarsePass BYTE = Byte<Float32, Bytes>::make_pass();
constexpr KernelTable TABLE = make_table<Unit>("avx2", &FLOAT32, &FLOAT64, &INT16, &BYTE, true);
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
