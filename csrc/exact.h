// Error-free arithmetic that decides what float64 cannot: the sign of a difference of squared distances,
// summed without any rounding, and cosines in double-double. Header only, no torch, for host and device code
// alike.
//
// The fixed-point sum is Kulisch's long accumulator ("Computer Arithmetic and Validity", 2008); two_sum and
// two_product are Knuth's and Dekker's, the double-double operations those of Li et al. 2002 (XBLAS).
// Translation units that include this file are compiled with -ffp-contract=off; on the device the _rn
// intrinsics, which are never contracted, do the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VQ_HD __host__ __device__
// Unrolled, the loops over all digits would hold 136 of them in registers, and spill.
#define VQ_ROLLED _Pragma("unroll 1")
#else
#define VQ_HD
#define VQ_ROLLED
#endif

namespace vqkernels {
namespace exact {

VQ_HD inline double to_double(double value) { return value; }

// float, and the 16-bit types of host and device, whose values are all floats.
template <class T>
VQ_HD inline double to_double(T value) {
  return static_cast<double>(static_cast<float>(value));
}

VQ_HD inline double add_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

VQ_HD inline double mul_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// ---------------------------------------------------------------------------------------- fixed point

// A finite double as mantissa * 2^exponent, with its sign apart.
struct Decomposed {
  uint64_t mantissa;  // < 2^53
  int exponent;
  bool negative;
};

VQ_HD inline Decomposed decompose(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint64_t fraction = bits & ((uint64_t(1) << 52) - 1);
  const int field = static_cast<int>((bits >> 52) & 0x7ff);
  Decomposed parts;
  parts.mantissa = field == 0 ? fraction : fraction | (uint64_t(1) << 52);
  parts.exponent = field == 0 ? -1074 : field - 1075;
  parts.negative = (bits >> 63) != 0;
  return parts;
}

// Sum of signed integers times 2^LOW_EXPONENT. Each 32-bit digit lives in an int64 lane, so that carries
// wait.
template <int LOW_EXPONENT, int WORDS>
class FixedPointSum {
 public:
  VQ_HD FixedPointSum() : pending_(0) { VQ_ROLLED for (int i = 0; i < WORDS; ++i) lanes_[i] = 0; }

  // Adds (negate ? -1 : 1) * a * b * 2^shift, exactly.
  VQ_HD void add_product(double a, double b, bool negate, int shift) {
    const Decomposed left = decompose(a);
    const Decomposed right = decompose(b);
    if (left.mantissa == 0 || right.mantissa == 0) return;
    const bool negative = (left.negative != right.negative) != negate;
    const int bit = left.exponent + right.exponent + shift - LOW_EXPONENT;
    const uint64_t left_low = left.mantissa & MASK, left_high = left.mantissa >> 32;
    const uint64_t right_low = right.mantissa & MASK, right_high = right.mantissa >> 32;
    add_bits(left_low * right_low, bit, negative);
    add_bits(left_low * right_high + left_high * right_low, bit + 32, negative);
    add_bits(left_high * right_high, bit + 64, negative);
    if (++pending_ == CARRY_EVERY) propagate();
  }

  // -1, 0 or 1.
  VQ_HD int sign() {
    propagate();
    if (lanes_[WORDS - 1] != 0) return lanes_[WORDS - 1] < 0 ? -1 : 1;
    VQ_ROLLED for (int i = 0; i < WORDS - 1; ++i) {
      if (lanes_[i] != 0) return 1;
    }
    return 0;
  }

 private:
  static constexpr uint64_t MASK = 0xffffffffu;
  static constexpr int CARRY_EVERY = 1 << 26;  // at most 9 digits below 2^32 join a lane per product: < 2^62

  VQ_HD void add_bits(uint64_t value, int bit, bool negative) {
    const int word = bit >> 5;
    const int shift = bit & 31;
    const int64_t low = static_cast<int64_t>((value << shift) & MASK);
    const int64_t middle = static_cast<int64_t>((value >> (32 - shift)) & MASK);
    const int64_t high = shift == 0 ? 0 : static_cast<int64_t>(value >> (64 - shift));
    lanes_[word] += negative ? -low : low;
    lanes_[word + 1] += negative ? -middle : middle;
    lanes_[word + 2] += negative ? -high : high;
  }

  // Leaves every lane but the last in [0, 2^32); the last carries the sign.
  VQ_HD void propagate() {
    VQ_ROLLED for (int i = 0; i < WORDS - 1; ++i) {
      const int64_t carry = lanes_[i] >> 32;  // rounds down, also below zero
      lanes_[i] -= carry * (int64_t(1) << 32);
      lanes_[i + 1] += carry;
    }
    pending_ = 0;
  }

  int64_t lanes_[WORDS];
  int pending_;
};

// Products of floats lie in [2^-298, 2^256), held as doubles whose last bits reach 104 places further down.
// Products of doubles lie in [2^-2148, 2^2048). Both leave room for more than 2^60 of them.
using NarrowSum = FixedPointSum<-402, 24>;
using WideSum = FixedPointSum<-2148, 136>;

template <class T>
struct SumFor {
  using type = NarrowSum;
};
template <>
struct SumFor<double> {
  using type = WideSum;
};

// Sign of |x - ci|^2 - |x - cj|^2 over the real numbers: -1 when ci is nearer, 0 on a true tie, 1 when cj is.
// Strides in elements; all values finite.
template <class T>
VQ_HD inline int compare_euclidean(const T* x,  // [D]
                                   int64_t x_stride,
                                   const T* ci,  // [D]
                                   int64_t ci_stride,
                                   const T* cj,  // [D]
                                   int64_t cj_stride, int64_t dim) {
  typename SumFor<T>::type sum;
  for (int64_t d = 0; d < dim; ++d) {
    const double token = to_double(x[d * x_stride]);
    const double first = to_double(ci[d * ci_stride]);
    const double second = to_double(cj[d * cj_stride]);
    if (first == second) continue;
    sum.add_product(first, first, false, 0);
    sum.add_product(token, first, true, 1);
    sum.add_product(second, second, true, 0);
    sum.add_product(token, second, false, 1);
  }
  return sum.sign();
}

// -------------------------------------------------------------------------------------- double-double

// hi + lo with |lo| <= ulp(hi) / 2.
struct DoubleDouble {
  double hi;
  double lo;
};

VQ_HD inline DoubleDouble two_sum(double a, double b) {
  const double sum = add_rn(a, b);
  const double b_part = add_rn(sum, -a);
  const double a_part = add_rn(sum, -b_part);
  return {sum, add_rn(add_rn(a, -a_part), add_rn(b, -b_part))};
}

// As two_sum where |a| >= |b| or a == 0.
VQ_HD inline DoubleDouble quick_two_sum(double a, double b) {
  const double sum = add_rn(a, b);
  return {sum, add_rn(b, -add_rn(sum, -a))};
}

VQ_HD inline DoubleDouble two_product(double a, double b) {
  const double product = mul_rn(a, b);
  return {product, fma(a, b, -product)};
}

VQ_HD inline DoubleDouble add(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble high = two_sum(a.hi, b.hi);
  const DoubleDouble low = two_sum(a.lo, b.lo);
  const DoubleDouble first = quick_two_sum(high.hi, add_rn(high.lo, low.hi));
  return quick_two_sum(first.hi, add_rn(first.lo, low.lo));
}

VQ_HD inline DoubleDouble negate(DoubleDouble a) { return {-a.hi, -a.lo}; }

VQ_HD inline DoubleDouble multiply(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble product = two_product(a.hi, b.hi);
  const double cross = add_rn(mul_rn(a.hi, b.lo), mul_rn(a.lo, b.hi));
  return quick_two_sum(product.hi, add_rn(product.lo, cross));
}

VQ_HD inline DoubleDouble divide(DoubleDouble a, DoubleDouble b) {
  const double first = a.hi / b.hi;
  const DoubleDouble rest = add(a, negate(multiply({first, 0.0}, b)));
  const double second = rest.hi / b.hi;
  const DoubleDouble rest2 = add(rest, negate(multiply({second, 0.0}, b)));
  return add(quick_two_sum(first, second), {rest2.hi / b.hi, 0.0});
}

// a > 0.
VQ_HD inline DoubleDouble square_root(DoubleDouble a) {
  const double root = sqrt(a.hi);
  const DoubleDouble rest = add(a, negate(two_product(root, root)));
  return quick_two_sum(root, rest.hi / add_rn(root, root));
}

VQ_HD inline bool less(DoubleDouble a, DoubleDouble b) {
  return a.hi < b.hi || (a.hi == b.hi && a.lo < b.lo);
}

// Cosines this close to the largest count as ties.
VQ_HD inline double cosine_tie() { return 8.077935669463161e-28; }  // 2^-90

// A vector's power-of-two scale, as two factors since 2^1074 is no double, and its squared norm after
// scaling.
struct ScaledVector {
  double factor;
  double factor2;
  DoubleDouble square;  // 0 for the zero vector
};

// Scaled so that the largest entry lies in [1, 2): what then underflows is below 2^-1000 of the norm.
template <class T>
VQ_HD inline ScaledVector scale_vector(const T* v,  // [D]
                                       int64_t stride, int64_t dim) {
  double largest = 0.0;
  for (int64_t d = 0; d < dim; ++d) {
    const double size = fabs(to_double(v[d * stride]));
    largest = size > largest ? size : largest;
  }
  ScaledVector scaled{1.0, 1.0, {0.0, 0.0}};
  if (largest == 0.0) return scaled;
  const int exponent = -ilogb(largest);
  scaled.factor = ldexp(1.0, exponent / 2);
  scaled.factor2 = ldexp(1.0, exponent - exponent / 2);
  for (int64_t d = 0; d < dim; ++d) {
    const double entry = mul_rn(mul_rn(to_double(v[d * stride]), scaled.factor), scaled.factor2);
    scaled.square = add(scaled.square, two_product(entry, entry));
  }
  return scaled;
}

// cos(x, c) in double-double, 0 when either is the zero vector; absolute error below D * 2^-102.
template <class T>
VQ_HD inline DoubleDouble cosine(const T* x,  // [D]
                                 int64_t x_stride, ScaledVector x_scale,
                                 const T* c,  // [D]
                                 int64_t c_stride, ScaledVector c_scale, int64_t dim) {
  if (x_scale.square.hi == 0.0 || c_scale.square.hi == 0.0) return {0.0, 0.0};
  DoubleDouble dot{0.0, 0.0};
  for (int64_t d = 0; d < dim; ++d) {
    const double token = mul_rn(mul_rn(to_double(x[d * x_stride]), x_scale.factor), x_scale.factor2);
    const double code = mul_rn(mul_rn(to_double(c[d * c_stride]), c_scale.factor), c_scale.factor2);
    dot = add(dot, two_product(token, code));
  }
  return divide(dot, square_root(multiply(x_scale.square, c_scale.square)));
}

}  // namespace exact
}  // namespace vqkernels
