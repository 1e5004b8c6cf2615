// The inner loops in the compiler's own vectors, for every architecture.
#include "kernel_table.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int REGISTER_BYTES = 64;  // see strips.h; of one vector each, as the int8 pass needs them

template <class T, int BYTES = 16>
struct Portable {
  using Word = T;
  typedef T Vector __attribute__((vector_size(BYTES)));
  static constexpr int ROWS = 4, VECTORS = 2, LANES = BYTES / sizeof(T), DEPTH = 1;
  static int64_t steps(int64_t dim) { return dim; }
  static Vector load(const T* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(T* p, Vector v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Vector broadcast(T value) { return Vector{} + value; }
  static Vector start(Vector biases, Vector /*shared*/) { return biases; }
  static Vector minimum(Vector a, Vector b) { return a < b ? a : b; }
  static T least(Vector v) {
    T least = v[0];
    for (int lane = 1; lane < LANES; ++lane) least = v[lane] < least ? v[lane] : least;
    return least;
  }
  static void accumulate(Vector& sum, Vector a, Vector b) { sum -= a * b; }
  static T limit_of(double limit) {
    if constexpr (sizeof(T) == sizeof(double)) return limit;
    return __builtin_nextafterf(static_cast<float>(limit), __builtin_inff());
  }
  static unsigned below(Vector v, T limit) {
    unsigned lanes = 0;
    for (int lane = 0; lane < LANES; ++lane) lanes |= (v[lane] <= limit ? 1u : 0u) << lane;
    return lanes;
  }
};

template <int BYTES>
struct Floats : Portable<float, BYTES> {
  using Base = Portable<float, BYTES>;
  using Vector = typename Base::Vector;
  using Base::LANES, Base::load, Base::store, Base::minimum;
  using Values = Vector;
  static Values load_values(const float* p) { return load(p); }
  static void store_values(float* p, Values v) { store(p, v); }
  static Values least_values(Values a, Values b) { return minimum(a, b); }
  static Values values(Vector sums, float factor, float offset) { return sums * factor + offset; }
  static Vector multiply_add(Vector a, float b, Vector c) { return a * b + c; }
  static unsigned not_above(Values v, Values limits) {
    unsigned lanes = 0;
    for (int lane = 0; lane < LANES; ++lane) lanes |= (v[lane] <= limits[lane] ? 1u : 0u) << lane;
    return lanes;
  }
};
using Float32 = Floats<16>;

struct Sixteen : Floats<64> {
  static constexpr int VECTORS = 4;
};

// Of eight bits each, as AVX512 VNNI multiplies them.
struct Bytes {
  typedef int32_t Vector __attribute__((vector_size(64)));
  static constexpr int ROWS = 6, OFFSET = 128;
  static constexpr float LARGEST_SUM = 4 * 255.0f;  // fits whatever it is
  static Vector load(const int32_t* p) { return Portable<int32_t, 64>::load(p); }
  static Vector broadcast(int32_t value) { return Vector{} + value; }
  static Sixteen::Vector to_floats(Vector v) { return __builtin_convertvector(v, Sixteen::Vector); }
  static int32_t first(Vector v) { return v[0]; }
  static void renew(Vector& /*v*/) {}
  static __attribute__((noinline)) void add(Vector& sum, Vector tokens, Vector codes) {
    for (int byte = 0; byte < 4; ++byte, tokens >>= 8, codes >>= 8)
      sum += (tokens & 255) * ((codes << 24) >> 24);
  }
  static void add(Vector& sum, Vector tokens, Vector more_tokens, Vector codes, Vector more_codes) {
    add(sum, tokens, codes);
    add(sum, more_tokens, more_codes);
  }
};

struct Unit {
  typedef uint64_t Words __attribute__((vector_size(16)));
  static Words product_of_halves(Words word) { return (word & 0xffffffff) * (word >> 32); }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "kernel_byte.h"
#include "kernel_int8.h"
#include "kernel_wide.h"

namespace vqkernels {
namespace cpu {
namespace {
constexpr CoarsePass FLOAT32 = make_wide_pass<Float32>("float32", 0x1p120);
constexpr CoarsePass FLOAT64 = make_wide_pass<Portable<double>>("float64", __builtin_inf());
constexpr CoarsePass INT8 = Int8<Sixteen, PlainTiles>::make_pass();
constexpr CoarsePass BYTE = Byte<Sixteen, Bytes>::make_pass();
constexpr KernelTable TABLE = make_table<Unit>("portable", &FLOAT32, &FLOAT64, nullptr, &BYTE, false);
}  // namespace
const KernelTable* portable_kernels() { return &TABLE; }
const CoarsePass* portable_int8() { return &INT8; }
}  // namespace cpu
}  // namespace vqkernels
