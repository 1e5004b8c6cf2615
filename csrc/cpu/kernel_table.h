// The inner loops of `nearest`, one table of functions for each instruction set, chosen at run time.
#pragma once

#include <cstdint>

namespace vqkernels {
namespace cpu {

// A *panel* is WIDTH = vectors * lanes codes stored [1 + D, WIDTH]: first the bias h of every code, then the
// codes, transposed. A *tile* is `rows` tokens stored [D, rows]. The score of a token and a code is h - x.c.
// A *granule* is one lane of a panel: the `vectors` codes  panel * WIDTH + v * lanes + lane.
struct KernelTable {
  const char* name;
  int rows;
  int lanes;
  int vectors;

  // Scores of a tile against panels; of every granule only the least is kept.
  void (*score_panels)(const float* tile,    // [D, rows]
                       const float* panels,  // [count, 1 + D, WIDTH]
                       int64_t count, int64_t dim,
                       float* granule_scores,  // [rows, count * lanes]
                       float* least);          // [rows]

  // Positions of the scores <= limit, in order; returns how many there are and writes at most `capacity`.
  int64_t (*find_scores)(const float* scores,  // [count], count a multiple of lanes
                         int64_t count, float limit,
                         int32_t* found,  // [capacity]
                         int64_t capacity);

  // panel[1 + d][j] = (codes[j][d] - centre[d]) * scale * scale2 and panel[0][j] = sum_d panel[1 + d][j]^2 /
  // 2, summed in float64. Columns j >= count hold 0 and an infinite bias. Returns the largest such sum (NaN
  // if any is).
  double (*pack_panel)(const float* codes,   // [count, D]
                       const float* centre,  // [D]
                       float scale, float scale2, int64_t count, int64_t dim,
                       float* panel);  // [1 + D, WIDTH]

  // tile[d][i] = (tokens[i][d] - centre[d]) * scales[i][0] * scales[i][1] and squares[i] = sum_d tile[d][i]^2
  // in float64. Rows i >= count hold 0.
  void (*pack_tile)(const float* tokens,  // [count, D]
                    const float* centre,  // [D]
                    const float* scales,  // [count, 2]
                    int64_t count, int64_t dim,
                    float* tile,       // [D, rows]
                    double* squares);  // [rows]

  // sum_d (x - c)^2 in float64.
  void (*squared_distances_float)(const double* x,     // [D]
                                  const float* codes,  // [count, D]
                                  int64_t count, int64_t dim,
                                  double* out);          // [count]
  void (*squared_distances_double)(const double* x,      // [D]
                                   const double* codes,  // [count, D]
                                   int64_t count, int64_t dim,
                                   double* out);  // [count]

  // sum_d x * c in float64.
  void (*dot_products_float)(const double* x,     // [D]
                             const float* codes,  // [count, D]
                             int64_t count, int64_t dim,
                             double* out);          // [count]
  void (*dot_products_double)(const double* x,      // [D]
                              const double* codes,  // [count, D]
                              int64_t count, int64_t dim,
                              double* out);  // [count]
};

// One a unit; null where the unit was not compiled for this machine's architecture.
const KernelTable* avx512_kernels();
const KernelTable* avx2_kernels();
const KernelTable* portable_kernels();

// The best table this CPU can run, or the one that VQKERNELS_CPU_ISA names; throws where that cannot run.
const KernelTable& kernels();

}  // namespace cpu
}  // namespace vqkernels
