// Sixteen floats or eight doubles at a time, in the compiler's own vectors: one register of AVX512, two of
// AVX2.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr double UNIT32 = 0x1p-24;  // float32's unit roundoff
constexpr int64_t STRIP = 16;
typedef float FloatStrip __attribute__((vector_size(64)));
typedef int32_t IntStrip __attribute__((vector_size(64)));
typedef int16_t ShortStrip __attribute__((vector_size(32)));
typedef float FloatHalf __attribute__((vector_size(32)));
typedef double DoubleHalf __attribute__((vector_size(64)));

template <class Vector, class T>
inline Vector load_vector(const T* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// The first `width` numbers, zeros after them.
template <class Vector, class T>
inline Vector load_part(const T* p, int64_t width) {
  T values[sizeof(Vector) / sizeof(T)] = {};
  for (int64_t i = 0; i < width; ++i) values[i] = p[i];
  return load_vector<Vector>(values);
}

// The first `width` numbers of 16, zeros after them. What lies before `end` may be read.
inline FloatStrip load_strip(const float* p, int64_t width, const float* end) {
  if (width >= STRIP) return load_vector<FloatStrip>(p);
  if (p + STRIP > end) return load_part<FloatStrip>(p, width);
  constexpr IntStrip LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const IntStrip kept = LANE < static_cast<int32_t>(width);
  return (FloatStrip)((IntStrip)load_vector<FloatStrip>(p) & kept);
}

// Sixteen numbers of a row, centred and scaled; zeros after the last dimension.
inline FloatStrip packed_strip(const float* row, const Packing& packing, int64_t base) {
  const FloatStrip centre = load_vector<FloatStrip>(packing.centre + base);  // padded with zeros
  return (load_strip(row + base, packing.dim - base, packing.end) - centre) * packing.scale * packing.scale2;
}

// Of unit length.
inline FloatStrip unit_strip(const float* row, double inverse_norm, const Packing& packing, int64_t base) {
  float values[STRIP] = {};
  const int64_t width = packing.dim - base < STRIP ? packing.dim - base : STRIP;
  for (int64_t i = 0; i < width; ++i)
    values[i] = static_cast<float>(static_cast<double>(row[base + i]) * inverse_norm);
  return load_vector<FloatStrip>(values);
}

// Sixteen numbers of code j as they are packed: of unit length for cosine.
inline FloatStrip code_strip(const float* const* codes,    // rows of [D]
                             const double* inverse_norms,  // of them, or null
                             int j, const Packing& packing, int64_t base) {
  return inverse_norms == nullptr ? packed_strip(codes[j], packing, base)
                                  : unit_strip(codes[j], inverse_norms[j], packing, base);
}

// To the nearest integers, of numbers below 2^22.
inline FloatStrip rounded_strip(FloatStrip value) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  return (value + MAGIC) - MAGIC;
}

// What packing to integers costs in float32.
constexpr double ROUNDING = 4 * UNIT32;  // of (x - mu) * scale * scale2 * factor
constexpr double SUM_SLACK = 1.0001;     // of squares summed in 16 parts, for D up to 16384

inline double norm_of(float square) { return __builtin_sqrt(static_cast<double>(square)) * SUM_SLACK; }

// Relative, of |c|^2 / 2 summed in 16 parts and rounded.
inline double half_square_error(int64_t dim) {
  return (static_cast<double>(dim) / 16.0 + 48.0) * 1.1 * UNIT32;
}

inline float sum_of(FloatStrip v) {
  typedef float Quarter __attribute__((vector_size(16)));
  const FloatHalf half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Quarter quarter =
      __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

inline double sum_of(DoubleHalf v) {
  typedef double Quarter __attribute__((vector_size(32)));
  const Quarter quarter =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

// Rows to columns, 16 by 16: blocks of 8, 4, 2 and 1 change places across the diagonal.
inline void exchange8(IntStrip& a, IntStrip& b) {
  const IntStrip first =
      __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  b = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  a = first;
}
inline void exchange4(IntStrip& a, IntStrip& b) {
  const IntStrip first =
      __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  b = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  a = first;
}
inline void exchange2(IntStrip& a, IntStrip& b) {
  const IntStrip first =
      __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  b = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  a = first;
}
inline void exchange1(IntStrip& a, IntStrip& b) {
  const IntStrip first =
      __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  b = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  a = first;
}

inline void transpose(IntStrip (&rows)[16]) {
  for (int i = 0; i < 8; ++i) exchange8(rows[i], rows[i + 8]);
  for (int i = 0; i < 16; ++i) {
    if ((i & 4) == 0) exchange4(rows[i], rows[i + 4]);
  }
  for (int i = 0; i < 16; ++i) {
    if ((i & 2) == 0) exchange2(rows[i], rows[i + 2]);
  }
  for (int i = 0; i < 16; i += 2) exchange1(rows[i], rows[i + 1]);
}

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
