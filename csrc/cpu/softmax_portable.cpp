// The loops of the streaming softmax in the compiler's own vectors, for every architecture and for float64.
#include "softmax_power.h"
#include "softmax_table.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int REGISTER_BYTES = 64;  // see strips.h; left to the compiler

template <class Word>
struct Bits;
template <>
struct Bits<float> {
  using Int = int32_t;
  static constexpr int FRACTION = 23;
  static constexpr float LEAST = -126.0f, ROUNDER = 0x1.8p23f;
};
template <>
struct Bits<double> {
  using Int = int64_t;
  static constexpr int FRACTION = 52;
  static constexpr double LEAST = -1022.0, ROUNDER = 0x1.8p52;
};

template <class T>
struct Pass {
  using Word = T;
  typedef T Vector __attribute__((vector_size(16)));
  typedef typename Bits<T>::Int Integers __attribute__((vector_size(16)));
  static constexpr int LANES = 16 / sizeof(T), VECTORS = 2, ROWS = 4, TOKENS = 2;
  static constexpr T LEAST = Bits<T>::LEAST;
  static Vector load(const T* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(T* p, Vector v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Vector broadcast(T value) { return Vector{} + value; }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector subtract(Vector a, Vector b) { return a - b; }
  static Vector multiply(Vector a, Vector b) { return a * b; }
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
  static Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
  static T sum_of(Vector v) {
    T sum = v[0];
    for (int lane = 1; lane < LANES; ++lane) sum += v[lane];
    return sum;
  }
  static T largest_of(Vector v) {
    T largest = v[0];
    for (int lane = 1; lane < LANES; ++lane) largest = v[lane] > largest ? v[lane] : largest;
    return largest;
  }
  static Vector power(Vector t) {
    const Vector shifted = t + Bits<T>::ROUNDER;  // the last bits are now t, rounded to an integer
    const Vector rest = t - (shifted - Bits<T>::ROUNDER);
    Vector value = broadcast(PowerSeries<T>::C[PowerSeries<T>::TERMS - 1]);
    for (int i = PowerSeries<T>::TERMS - 2; i >= 0; --i)
      value = fma(value, rest, broadcast(PowerSeries<T>::C[i]));
    value = fma(value, rest, broadcast(T(1)));
    const Vector scaled = (Vector)((Integers)value + ((Integers)shifted << Bits<T>::FRACTION));
    return t <= LEAST ? broadcast(T(0)) : t == t ? scaled : t;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "softmax_tile.h"

namespace vqkernels {
namespace cpu {
namespace {
constexpr SoftmaxTable<float> TABLE32 = SoftmaxTile<Pass<float>>::make_table("portable");
constexpr SoftmaxTable<double> TABLE64 = SoftmaxTile<Pass<double>>::make_table("float64");
}  // namespace
const SoftmaxTable<float>* portable_softmax() { return &TABLE32; }
const SoftmaxTable<double>* float64_softmax() { return &TABLE64; }
}  // namespace cpu
}  // namespace vqkernels
