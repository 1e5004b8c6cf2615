// Sixteen floats or eight doubles at a time, in the compiler's own vectors: one register of AVX512, two of
// AVX2. The including unit says how wide its registers are, as REGISTER_BYTES: vectors that are wider are
// copied through memory by GCC 12, eight bytes at a time.
#pragma once

#include <cstdint>
#include <utility>

#include "kernel_table.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr double UNIT32 = 0x1p-24;  // float32's unit roundoff
constexpr int64_t STRIP = 16;

// COUNT numbers in several registers, with the operators of one.
template <class T, int COUNT>
struct Parts {
  static constexpr int LANES = REGISTER_BYTES / sizeof(T), NUMBER = COUNT / LANES;
  typedef T Part __attribute__((vector_size(REGISTER_BYTES)));
  Part parts[NUMBER];

  template <class F>
  static inline __attribute__((always_inline)) Parts make(const F& part_of) {
    Parts made;
#pragma GCC unroll 8
    for (int i = 0; i < NUMBER; ++i) made.parts[i] = part_of(i);
    return made;
  }
  friend inline __attribute__((always_inline)) Parts operator+(const Parts& a, const Parts& b) {
    return make([&](int i) { return a.parts[i] + b.parts[i]; });
  }
  friend inline __attribute__((always_inline)) Parts operator-(const Parts& a, const Parts& b) {
    return make([&](int i) { return a.parts[i] - b.parts[i]; });
  }
  friend inline __attribute__((always_inline)) Parts operator*(const Parts& a, const Parts& b) {
    return make([&](int i) { return a.parts[i] * b.parts[i]; });
  }
  friend inline __attribute__((always_inline)) Parts operator+(const Parts& a, T b) {
    return make([&](int i) { return a.parts[i] + b; });
  }
  friend inline __attribute__((always_inline)) Parts operator-(const Parts& a, T b) {
    return make([&](int i) { return a.parts[i] - b; });
  }
  friend inline __attribute__((always_inline)) Parts operator*(const Parts& a, T b) {
    return make([&](int i) { return a.parts[i] * b; });
  }
  friend inline __attribute__((always_inline)) Parts operator-(const Parts& a) {
    return make([&](int i) { return -a.parts[i]; });
  }
  inline Parts& operator+=(const Parts& other) { return *this = *this + other; }
};

template <class T, int COUNT, bool ONE = COUNT * sizeof(T) <= REGISTER_BYTES>
struct VectorOf {
  using Type = Parts<T, COUNT>;
};
template <class T, int COUNT>
struct VectorOf<T, COUNT, true> {
  typedef T Type __attribute__((vector_size(COUNT * sizeof(T))));
};

using FloatStrip = VectorOf<float, 16>::Type;
using IntStrip = VectorOf<int32_t, 16>::Type;
using DoubleHalf = VectorOf<double, 8>::Type;
typedef int16_t ShortStrip __attribute__((vector_size(32)));
typedef int8_t ByteStrip __attribute__((vector_size(16)));

// Of several registers one at a time: GCC 12 copies them 16 bytes at a time, and what is read as 32 just
// after has to wait for both.
template <class Vector, class T>
inline Vector load_vector(const T* p) {
  if constexpr (requires { typename Vector::Part; }) {
    return Vector::make([&](int i) { return load_vector<typename Vector::Part>(p + i * Vector::LANES); });
  } else {
    Vector v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <class Vector, class T>
inline void store_vector(T* p, const Vector& v) {
  if constexpr (requires { typename Vector::Part; }) {
#pragma GCC unroll 8
    for (int i = 0; i < Vector::NUMBER; ++i)
      __builtin_memcpy(p + i * Vector::LANES, &v.parts[i], sizeof(v.parts[i]));
  } else {
    __builtin_memcpy(p, &v, sizeof(v));
  }
}

// The first `width` numbers, zeros after them.
template <int COUNT, class T>
struct Padded {
  T values[COUNT] = {};

  inline Padded(const T* p, int64_t width) {
    for (int64_t i = 0; i < width; ++i) values[i] = p[i];
  }
};

// The first `width` lanes, zeros after them.
template <class Ints>
inline FloatStrip first_lanes(const Ints& bits, int32_t width) {
  constexpr Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (FloatStrip)(bits & (LANE < width));
}
template <int COUNT>
inline Parts<float, COUNT> first_lanes(const Parts<int32_t, COUNT>& bits, int32_t width) {
  using Ints = Parts<int32_t, COUNT>;
  typename Ints::Part lane;
  for (int i = 0; i < Ints::LANES; ++i) lane[i] = i;
  return Parts<float, COUNT>::make([&](int i) {
    return (typename Parts<float, COUNT>::Part)(bits.parts[i] & (lane < width - i * Ints::LANES));
  });
}

// The first `width` numbers of 16, zeros after them. What lies before `end` may be read.
inline FloatStrip load_strip(const float* p, int64_t width, const float* end) {
  if (width >= STRIP) return load_vector<FloatStrip>(p);
  if (p + STRIP > end) return load_vector<FloatStrip>(Padded<STRIP, float>(p, width).values);
  return first_lanes(load_vector<IntStrip>(p), static_cast<int32_t>(width));
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

template <class Floats>
inline IntStrip integers_of(const Floats& whole) {
  return __builtin_convertvector(whole, IntStrip);
}
template <int COUNT>
inline Parts<int32_t, COUNT> integers_of(const Parts<float, COUNT>& whole) {
  using Ints = Parts<int32_t, COUNT>;
  return Ints::make([&](int i) { return __builtin_convertvector(whole.parts[i], typename Ints::Part); });
}

// Of integers that fit.
template <class Ints>
inline ShortStrip shorts_of(const Ints& whole) {
  return __builtin_convertvector(whole, ShortStrip);
}
template <int COUNT>
inline ShortStrip shorts_of(const Parts<int32_t, COUNT>& whole) {
  static_assert(Parts<int32_t, COUNT>::NUMBER == 2);
  return __builtin_shufflevector((ShortStrip)whole.parts[0], (ShortStrip)whole.parts[1], 0, 2, 4, 6, 8, 10,
                                 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

inline ByteStrip bytes_of(ShortStrip whole) {
  typedef int8_t Halves __attribute__((vector_size(32)));
  return __builtin_shufflevector((Halves)whole, (Halves)whole, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24,
                                 26, 28, 30);
}

// The larger of two, lane by lane; the first where that is NaN.
template <class Floats>
inline Floats larger(const Floats& a, const Floats& b) {
  return b > a ? b : a;
}
template <int COUNT>
inline Parts<float, COUNT> larger(const Parts<float, COUNT>& a, const Parts<float, COUNT>& b) {
  return Parts<float, COUNT>::make([&](int i) { return larger(a.parts[i], b.parts[i]); });
}
inline FloatStrip absolute(const FloatStrip& strip) { return larger(strip, -strip); }

// Lane i ^ STEP to lane i.
template <int STEP, class Vector, int... I>
inline Vector swapped_lanes(const Vector& v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ STEP)...);
}
template <int STEP, class Vector>
inline Vector swapped(const Vector& v) {
  return swapped_lanes<STEP>(v, std::make_integer_sequence<int, sizeof(Vector) / sizeof(float)>());
}
template <int STEP, int COUNT>
inline Parts<float, COUNT> swapped(const Parts<float, COUNT>& v) {
  using Floats = Parts<float, COUNT>;
  constexpr int APART = STEP / Floats::LANES;
  return Floats::make([&](int i) {
    if constexpr (APART == 0) return swapped<STEP>(v.parts[i]);
    return v.parts[i ^ APART];
  });
}

inline float largest_of(FloatStrip strip) {
  strip = larger(strip, swapped<8>(strip));
  strip = larger(strip, swapped<4>(strip));
  strip = larger(strip, swapped<2>(strip));
  strip = larger(strip, swapped<1>(strip));
  float first;
  __builtin_memcpy(&first, &strip, sizeof(first));
  return first;
}

// What packing to integers costs in float32.
constexpr double ROUNDING = 4 * UNIT32;  // of (x - mu) * scale * scale2 * factor
constexpr double SUM_SLACK = 1.0001;     // of squares summed in 16 parts, for D up to 16384

inline double norm_of(float square) { return __builtin_sqrt(static_cast<double>(square)) * SUM_SLACK; }

// Of float32's, in the product of a score's factors with the sum of integers, and in adding the bias.
constexpr double SCORE_ROUNDING = 8 * UNIT32;
constexpr double NOTHING = 0x1p-80;  // what underflow may lose of a norm

// What brings numbers of that size to integers of at most `most`.
inline float integer_factor(float largest, float most) {
  constexpr float LARGEST_FACTOR = 0x1p60f;
  return largest * LARGEST_FACTOR > most ? most / largest : LARGEST_FACTOR;
}

inline void raise(double& bound, double value) { bound = value > bound ? value : bound; }

// Relative, of |c|^2 / 2 summed in 16 parts and rounded.
inline double half_square_error(int64_t dim) {
  return (static_cast<double>(dim) / 16.0 + 48.0) * 1.1 * UNIT32;
}

// What bounds the codes of a panel that are rounded to integers of `1 / inverse`: `square` is the largest of
// their |C|^2, `residual` of what rounding leaves, in those integers.
inline void raise_bound(const Packing& packing, float square, float residual, double inverse,
                        CodeBound* bound) {
  const double norm = norm_of(square), half_square = half_square_error(packing.dim) + SCORE_ROUNDING;
  raise(bound->largest, norm);
  raise(bound->residual, norm_of(residual) * inverse + ROUNDING * norm + NOTHING);
  if (!packing.cosine) raise(bound->offset, 0.5 * norm * norm * half_square + NOTHING);
}

// The largest |number| of a token.
inline float largest_of(const float* token, const Packing& packing) {
  FloatStrip most{};
  for (int64_t d = 0; d < packing.dim; d += STRIP)
    most = larger(most, absolute(packed_strip(token, packing, d)));
  return largest_of(most);
}

// Halves are added to each other down to four numbers, these in pairs; in whatever registers they are.
inline float sum_of(VectorOf<float, 16, true>::Type v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  const Half half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Quarter quarter =
      __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}
inline double sum_of(VectorOf<double, 8, true>::Type v) {
  typedef double Quarter __attribute__((vector_size(32)));
  const Quarter quarter =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}
template <class T, int COUNT>
inline T sum_of(const Parts<T, COUNT>& v) {
  static_assert(Parts<T, COUNT>::NUMBER == 2);
  constexpr int LANES = Parts<T, COUNT>::LANES;
  const auto sum = v.parts[0] + v.parts[1];
  T four[4];
  for (int i = 0; i < 4; ++i) four[i] = LANES == 4 ? sum[i] : sum[i] + sum[i + LANES - 4];
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// |C|^2 / 2 of a panel's codes as biases (0 for cosine); returns the largest |C|^2. Calls each(strip) with
// all their numbers.
template <int WIDTH, class StripOf, class Each>
inline float measure_panel(const StripOf& strip_of, const Packing& packing, float* biases, const Each& each) {
  float largest = 0.0f;
  for (int code = 0; code < WIDTH; ++code) {
    FloatStrip square{};
    for (int64_t d = 0; d < packing.dim; d += STRIP) {
      const FloatStrip strip = strip_of(code, d);
      square += strip * strip;
      each(strip);
    }
    const float sum = sum_of(square);
    largest = sum > largest ? sum : largest;
    biases[code] = packing.cosine ? 0.0f : 0.5f * sum;
  }
  return largest;
}

// Of two rows STEP apart, what lies beyond the diagonal: b's numbers to the left of it for a's to the right.
template <int STEP, class Vector, int... I>
inline void exchange_lanes(Vector& a, Vector& b, std::integer_sequence<int, I...>) {
  constexpr int LANES = sizeof...(I);
  const Vector first = __builtin_shufflevector(a, b, ((I & STEP) != 0 ? I - STEP + LANES : I)...);
  b = __builtin_shufflevector(a, b, ((I & STEP) != 0 ? I + LANES : I + STEP)...);
  a = first;
}
template <int STEP, class Vector>
inline void exchange(Vector& a, Vector& b) {
  exchange_lanes<STEP>(a, b, std::make_integer_sequence<int, sizeof(Vector) / sizeof(int32_t)>());
}
template <int STEP, int COUNT>
inline void exchange(Parts<int32_t, COUNT>& a, Parts<int32_t, COUNT>& b) {
  using Ints = Parts<int32_t, COUNT>;
  constexpr int APART = STEP / Ints::LANES;
#pragma GCC unroll 4
  for (int i = 0; i < Ints::NUMBER; ++i) {
    if constexpr (APART == 0) {
      exchange<STEP>(a.parts[i], b.parts[i]);
    } else if ((i & APART) == 0) {
      const typename Ints::Part moved = a.parts[i + APART];
      a.parts[i + APART] = b.parts[i];
      b.parts[i] = moved;
    }
  }
}
template <int STEP>
inline void exchange_rows(IntStrip (&rows)[16]) {
  for (int i = 0; i < 16; ++i) {
    if ((i & STEP) == 0) exchange<STEP>(rows[i], rows[i + STEP]);
  }
}

// Rows to columns, 16 by 16: blocks of 8, 4, 2 and 1 change places across the diagonal.
inline void transpose(IntStrip (&rows)[16]) {
  exchange_rows<8>(rows);
  exchange_rows<4>(rows);
  exchange_rows<2>(rows);
  exchange_rows<1>(rows);
}

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
