// The inner loops in the compiler's own vectors, for every architecture.
#include "kernel_table.h"

namespace vqkernels {
namespace cpu {
namespace {

struct Shape {
  static constexpr int ROWS = 4;
  static constexpr int VECTORS = 2;
};

struct Simd {
  static constexpr int LANES = 4;
  typedef float Vector __attribute__((vector_size(16)));
  static Vector load(const float* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, Vector v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Vector broadcast(float value) { return Vector{value, value, value, value}; }
  static Vector minimum(Vector a, Vector b) { return a < b ? a : b; }
  static Vector subtract_product(Vector acc, Vector a, Vector b) { return acc - a * b; }
  static bool any_below(Vector v, float limit) {
    return v[0] <= limit || v[1] <= limit || v[2] <= limit || v[3] <= limit;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "kernel_impl.h"

namespace vqkernels {
namespace cpu {
namespace {
constexpr KernelTable TABLE = make_table("portable");
}
const KernelTable* portable_kernels() { return &TABLE; }
}  // namespace cpu
}  // namespace vqkernels
