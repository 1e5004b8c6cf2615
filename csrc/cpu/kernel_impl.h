// The inner loops, written once over `Simd` and `Shape`, which the including unit defines in an anonymous
// namespace. Nothing from the standard library is instantiated here: a shared template compiled for AVX512
// could be the copy that the linker keeps for everyone.
//
// Simd: LANES, Vector, load, store, broadcast, minimum, subtract_product(acc, a, b) = acc - a * b (fused
// where the instruction set can), any_below(v, limit).
#include "kernel_table.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int WIDTH = Shape::VECTORS * Simd::LANES;
using Vector = Simd::Vector;

// One tile against one panel: rows x vectors accumulators stay in registers.
inline void score_panel(const float* __restrict tile,   // [D, ROWS]
                        const float* __restrict panel,  // [1 + D, WIDTH]
                        int64_t dim,
                        float* granule_scores,  // [ROWS, stride]
                        int64_t stride) {
  Vector scores[Shape::ROWS][Shape::VECTORS];
#pragma GCC unroll 16
  for (int row = 0; row < Shape::ROWS; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < Shape::VECTORS; ++v) scores[row][v] = Simd::load(panel + v * Simd::LANES);
  }
  for (int64_t d = 0; d < dim; ++d) {
    panel += WIDTH;
    Vector codes[Shape::VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < Shape::VECTORS; ++v) codes[v] = Simd::load(panel + v * Simd::LANES);
#pragma GCC unroll 16
    for (int row = 0; row < Shape::ROWS; ++row) {
      const Vector token = Simd::broadcast(tile[row]);
#pragma GCC unroll 4
      for (int v = 0; v < Shape::VECTORS; ++v) {
        scores[row][v] = Simd::subtract_product(scores[row][v], token, codes[v]);
      }
    }
    tile += Shape::ROWS;
  }
#pragma GCC unroll 16
  for (int row = 0; row < Shape::ROWS; ++row) {
    Vector least = scores[row][0];
#pragma GCC unroll 4
    for (int v = 1; v < Shape::VECTORS; ++v) least = Simd::minimum(least, scores[row][v]);
    Simd::store(granule_scores + row * stride, least);
  }
}

// Four running minima, so that one does not wait for the other.
inline float least_of(const float* scores, int64_t count) {
  constexpr int CHAINS = 4;
  Vector best[CHAINS];
  for (int i = 0; i < CHAINS; ++i) best[i] = Simd::load(scores);
  int64_t i = 0;
  for (; i + CHAINS * Simd::LANES <= count; i += CHAINS * Simd::LANES) {
#pragma GCC unroll 4
    for (int j = 0; j < CHAINS; ++j) {
      best[j] = Simd::minimum(best[j], Simd::load(scores + i + j * Simd::LANES));
    }
  }
  for (; i < count; i += Simd::LANES) best[0] = Simd::minimum(best[0], Simd::load(scores + i));
  float lanes[Simd::LANES];
  Simd::store(lanes, Simd::minimum(Simd::minimum(best[0], best[1]), Simd::minimum(best[2], best[3])));
  float least = lanes[0];
  for (int lane = 1; lane < Simd::LANES; ++lane) least = lanes[lane] < least ? lanes[lane] : least;
  return least;
}

void score_panels(const float* tile,    // [D, ROWS]
                  const float* panels,  // [count, 1 + D, WIDTH]
                  int64_t count, int64_t dim,
                  float* granule_scores,  // [ROWS, count * LANES]
                  float* least) {         // [ROWS]
  const int64_t stride = count * Simd::LANES;
  for (int64_t panel = 0; panel < count; ++panel) {
    score_panel(tile, panels + panel * (1 + dim) * WIDTH, dim, granule_scores + panel * Simd::LANES, stride);
  }
  for (int row = 0; row < Shape::ROWS; ++row) least[row] = least_of(granule_scores + row * stride, stride);
}

int64_t find_scores(const float* scores,  // [count]
                    int64_t count, float limit,
                    int32_t* found,  // [capacity]
                    int64_t capacity) {
  constexpr int GROUP = 4 * Simd::LANES;
  int64_t number = 0;
  for (int64_t base = 0; base < count; base += GROUP) {
    const int64_t end = count - base < GROUP ? count : base + GROUP;
    Vector least = Simd::load(scores + base);
    for (int64_t i = base + Simd::LANES; i < end; i += Simd::LANES) {
      least = Simd::minimum(least, Simd::load(scores + i));
    }
    if (!Simd::any_below(least, limit)) continue;
    for (int64_t i = base; i < end; ++i) {
      if (i % Simd::LANES == 0 && !Simd::any_below(Simd::load(scores + i), limit)) {
        i += Simd::LANES - 1;
        continue;
      }
      if (!(scores[i] <= limit)) continue;
      if (number < capacity) found[number] = static_cast<int32_t>(i);
      ++number;
    }
  }
  return number;
}

// Dimensions handled at a time where rows are transposed: one cache line of each row.
constexpr int STRIP = 16;

double pack_panel(const float* codes,   // [count, D]
                  const float* centre,  // [D]
                  float scale, float scale2, int64_t count, int64_t dim,
                  float* panel) {  // [1 + D, WIDTH]
  double squares[WIDTH] = {};
  float strip[WIDTH][STRIP] = {};
  for (int64_t base = 0; base < dim; base += STRIP) {
    const int64_t width = dim - base < STRIP ? dim - base : STRIP;
    for (int64_t j = 0; j < count; ++j) {
      const float* code = codes + j * dim + base;
      for (int64_t i = 0; i < width; ++i) strip[j][i] = (code[i] - centre[base + i]) * scale * scale2;
    }
    for (int64_t i = 0; i < width; ++i) {
      float* row = panel + (1 + base + i) * WIDTH;
      for (int j = 0; j < WIDTH; ++j) row[j] = strip[j][i];
      for (int j = 0; j < WIDTH; ++j) squares[j] += static_cast<double>(row[j]) * row[j];
    }
  }
  double largest = 0.0;
  for (int64_t j = 0; j < WIDTH; ++j) {
    panel[j] = j < count ? static_cast<float>(0.5 * squares[j]) : __builtin_inff();
    if (!(squares[j] <= largest)) largest = squares[j];
    if (squares[j] != squares[j]) return squares[j];
  }
  return largest;
}

// In strips: computed along the rows, then transposed.
void pack_tile(const float* tokens,  // [count, D]
               const float* centre,  // [D]
               const float* scales,  // [count, 2]
               int64_t count, int64_t dim,
               float* tile,        // [D, ROWS]
               double* squares) {  // [ROWS]
  double parts[Shape::ROWS][STRIP] = {};
  float strip[Shape::ROWS][STRIP] = {};
  for (int64_t base = 0; base < dim; base += STRIP) {
    const int64_t width = dim - base < STRIP ? dim - base : STRIP;
    for (int64_t row = 0; row < count; ++row) {
      const float* token = tokens + row * dim + base;
      const float scale = scales[2 * row], scale2 = scales[2 * row + 1];
      for (int64_t i = 0; i < width; ++i) {
        const float value = (token[i] - centre[base + i]) * scale * scale2;
        strip[row][i] = value;
        parts[row][i] += static_cast<double>(value) * value;
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      for (int row = 0; row < Shape::ROWS; ++row) tile[(base + i) * Shape::ROWS + row] = strip[row][i];
    }
  }
  for (int row = 0; row < Shape::ROWS; ++row) {
    squares[row] = 0.0;
    for (int i = 0; i < STRIP; ++i) squares[row] += parts[row][i];
  }
}

// Eight partial sums: the compiler may not reorder a sum by itself.
template <class Code, bool DIFFERENCE>
inline double reduce_row(const double* __restrict x, const Code* __restrict code, int64_t dim) {
  constexpr int PARTS = 8;
  double parts[PARTS] = {};
  int64_t d = 0;
  for (; d + PARTS <= dim; d += PARTS) {
    for (int i = 0; i < PARTS; ++i) {
      const double c = static_cast<double>(code[d + i]);
      const double difference = x[d + i] - c;
      parts[i] += DIFFERENCE ? difference * difference : x[d + i] * c;
    }
  }
  double sum = 0.0;
  for (; d < dim; ++d) {
    const double c = static_cast<double>(code[d]);
    const double difference = x[d] - c;
    sum += DIFFERENCE ? difference * difference : x[d] * c;
  }
  for (int i = 0; i < PARTS; ++i) sum += parts[i];
  return sum;
}

template <class Code, bool DIFFERENCE>
void reduce_rows(const double* x,    // [D]
                 const Code* codes,  // [count, D]
                 int64_t count, int64_t dim,
                 double* out) {  // [count]
  for (int64_t k = 0; k < count; ++k) out[k] = reduce_row<Code, DIFFERENCE>(x, codes + k * dim, dim);
}

constexpr KernelTable make_table(const char* name) {
  return {name,
          Shape::ROWS,
          Simd::LANES,
          Shape::VECTORS,
          score_panels,
          find_scores,
          pack_panel,
          pack_tile,
          reduce_rows<float, true>,
          reduce_rows<double, true>,
          reduce_rows<float, false>,
          reduce_rows<double, false>};
}

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
