// The inner loops of the training step over single rows, one table of functions for each instruction set. All
// tables give the same bits: sums run in eight lanes, added in a fixed order, and nothing is contracted.
#pragma once

#include <cstdint>

namespace vqkernels {
namespace cpu {

// What an EMA step does to the row of one code.
struct EmaRow {
  double decay;
  double gain;     // 1 - decay
  double inverse;  // 1 / smoothed cluster size
  bool normalize;  // the new code gets length 1
};

template <class W>
struct TrainingLoops {
  // out = code; returns |x - code|^2.
  W (*copy_code)(const W* code,  // [D]
                 const W* x,     // [D]
                 int64_t dim,
                 W* out);  // [D], may be code

  // dx = g + pull (x - q); g null: zero.
  void (*straight_through)(const W* x,  // [D]
                           const W* q,  // [D]
                           const W* g,  // [D] or null
                           int64_t dim, W pull,
                           W* dx);  // [D]

  // dx = lambda (g - 2 (g.w) w + 2 (g.v) u) + pull (x - q), u = x/|x|, v = q/|q|, w = (u + v)/|u + v|,
  // lambda = |q|/|x| (Fifty et al. 2024, section 4.2), sums in float64.
  void (*rotation)(const W* x,  // [D]
                   const W* q,  // [D]
                   const W* g,  // [D]
                   int64_t dim, W pull,
                   W* dx);  // [D]

  // total[slot] += row, row after row; a slot below 0 is left out.
  void (*add_rows)(const W* rows,         // [count, D]
                   const int64_t* slots,  // [count]
                   int64_t count, int64_t dim,
                   double* totals);  // [slots, D]

  // out = sum of the chosen rows of a matrix, or out += it; rows far apart are fetched ahead.
  void (*sum_rows)(const W* rows,  // [N, D], stride apart
                   int64_t stride,
                   const int64_t* order,  // [left] indices of the rows to be summed now and of those after
                   int64_t count, int64_t left, int64_t dim,
                   double* total,  // [D], memory
                   bool adds,
                   W* out);  // [D]

  // total += row
  void (*add_row)(const W* row,  // [D]
                  int64_t dim,
                  double* total);  // [D]

  // out = total, or out += it
  void (*put_sum)(const double* total,  // [D]
                  int64_t dim, bool adds,
                  W* out);  // [D]

  // total += weight (q - x)
  void (*add_pull)(const W* x,  // [D]
                   const W* q,  // [D]
                   W weight, int64_t dim,
                   double* total);  // [D]

  // embed = decay embed + gain sum;  code = embed inverse, of length 1 with `normalize`.
  void (*learn_row)(const EmaRow& step,
                    const W* sum,  // [D] or null: zero
                    int64_t dim,
                    W* embed,  // [D]
                    W* code);  // [D]
};

struct TrainingTable {
  TrainingLoops<float> single;
  TrainingLoops<double> twice;
};

// One a unit; null where the unit was not compiled for this machine's architecture.
const TrainingTable* avx512_training();
const TrainingTable* avx2_training();
const TrainingTable* portable_training();

// The table of the instruction set that `nearest` uses.
const TrainingTable& training_kernels();

template <class W>
const TrainingLoops<W>& training_loops();
template <>
inline const TrainingLoops<float>& training_loops<float>() {
  return training_kernels().single;
}
template <>
inline const TrainingLoops<double>& training_loops<double>() {
  return training_kernels().twice;
}

}  // namespace cpu
}  // namespace vqkernels
