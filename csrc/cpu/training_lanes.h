// Eight numbers at a time, floats and doubles, in registers of the including unit: its `Unit` converts
// between them.
#pragma once

#include <cstdint>

#include "training_table.h"

namespace vqkernels {
namespace cpu {
namespace {

#define VQ_INLINE inline __attribute__((always_inline))
#define VQ_ALWAYS __attribute__((always_inline))

constexpr int64_t LANES = 8;

// Eight doubles in the unit's registers: `Unit::Doubles` is one of them, `Unit::Floats` as many floats. Wider
// vectors would be taken apart and put together on the stack, and GCC 12 converts to them by halves.
struct Doubles {
  using Part = Unit::Doubles;
  static constexpr int PARTS = LANES * sizeof(double) / sizeof(Part), WIDTH = LANES / PARTS;

  Part part[PARTS] = {};

  VQ_INLINE double operator[](int i) const { return part[i / WIDTH][i % WIDTH]; }
  VQ_INLINE Doubles& operator+=(const Doubles& other) {
    for (int i = 0; i < PARTS; ++i) part[i] += other.part[i];
    return *this;
  }
  VQ_INLINE Doubles& operator-=(const Doubles& other) {
    for (int i = 0; i < PARTS; ++i) part[i] -= other.part[i];
    return *this;
  }
  VQ_INLINE Doubles& operator*=(const Doubles& other) {
    for (int i = 0; i < PARTS; ++i) part[i] *= other.part[i];
    return *this;
  }
  VQ_INLINE Doubles& operator*=(double factor) {
    for (int i = 0; i < PARTS; ++i) part[i] *= factor;
    return *this;
  }
  friend VQ_INLINE Doubles operator+(Doubles a, const Doubles& b) { return a += b; }
  friend VQ_INLINE Doubles operator-(Doubles a, const Doubles& b) { return a -= b; }
  friend VQ_INLINE Doubles operator*(Doubles a, const Doubles& b) { return a *= b; }
  friend VQ_INLINE Doubles operator*(double factor, Doubles a) { return a *= factor; }
};

typedef float TwoFloats __attribute__((vector_size(8)));
typedef float FourFloats __attribute__((vector_size(16)));
typedef float EightFloats __attribute__((vector_size(32)));

template <class W>
struct Eight;
template <>
struct Eight<float> {
  using Vector = EightFloats;
};
template <>
struct Eight<double> {
  using Vector = Doubles;
};

VQ_INLINE void load(const float* from, EightFloats& to) { __builtin_memcpy(&to, from, sizeof(to)); }
VQ_INLINE void load(const double* from, Doubles& to) {
  for (int i = 0; i < Doubles::PARTS; ++i) {
    __builtin_memcpy(&to.part[i], from + i * Doubles::WIDTH, sizeof(to.part[i]));
  }
}
VQ_INLINE void store(float* to, const EightFloats& from) { __builtin_memcpy(to, &from, sizeof(from)); }
VQ_INLINE void store(double* to, const Doubles& from) {
  for (int i = 0; i < Doubles::PARTS; ++i) {
    __builtin_memcpy(to + i * Doubles::WIDTH, &from.part[i], sizeof(from.part[i]));
  }
}

// The floats of as many registers.
VQ_INLINE EightFloats joined(const FourFloats (&part)[2]) {
  return __builtin_shufflevector(part[0], part[1], 0, 1, 2, 3, 4, 5, 6, 7);
}
VQ_INLINE EightFloats joined(const TwoFloats (&part)[4]) {
  EightFloats eight;
  __builtin_memcpy(&eight, part, sizeof(part));
  return eight;
}

VQ_INLINE Doubles load_wide(const float* from) {
  Doubles to;
  for (int i = 0; i < Doubles::PARTS; ++i) {
    Unit::Floats part;
    __builtin_memcpy(&part, from + i * Doubles::WIDTH, sizeof(part));
    to.part[i] = Unit::widen(part);
  }
  return to;
}
VQ_INLINE Doubles load_wide(const double* from) {
  Doubles to;
  load(from, to);
  return to;
}
VQ_INLINE Doubles widen(const EightFloats& from) {
  float eight[LANES];
  store(eight, from);
  return load_wide(eight);
}
VQ_INLINE Doubles widen(const Doubles& from) { return from; }
VQ_INLINE void narrow(const Doubles& from, EightFloats& to) {
  Unit::Floats part[Doubles::PARTS];
  for (int i = 0; i < Doubles::PARTS; ++i) part[i] = Unit::narrow(from.part[i]);
  to = joined(part);
}
VQ_INLINE void narrow(const Doubles& from, Doubles& to) { to = from; }
template <class W>
VQ_INLINE void store_narrow(W* to, const Doubles& from) {
  typename Eight<W>::Vector rounded;
  narrow(from, rounded);
  store(to, rounded);
}
VQ_INLINE Doubles no_rows() {
  Doubles none;
  for (Unit::Doubles& part : none.part) part = NO_ROWS - part;
  return none;
}

template <class Vector>
VQ_INLINE auto add_lanes(const Vector& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
