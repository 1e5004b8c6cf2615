// The inner loops of the training step over single rows, one table of functions for each instruction set. All
// tables give the same bits: sums run in eight lanes, added in a fixed order, and nothing is contracted.
#pragma once

#include <cstdint>

namespace vqkernels {
namespace cpu {

// Where sums of rows start: a sum of one row is that row, down to the sign of its zeros.
constexpr double NO_ROWS = -0.0;

// What an EMA step does to sizes and rows.
struct EmaStep {
  double decay;
  double eps;
  double preserve;  // a code's smoothed size is (size + eps) / preserve
  double revived_size;
  bool normalize;  // new codes get length 1
};

// And to the row of one code. The average is taken in float64; its quotient, where nothing cancels, in W.
template <class W>
struct EmaRow {
  double decay;
  double gain;  // 1 - decay
  W inverse;    // 1 / smoothed cluster size
};

// Tokens one code after another, in groups of one code each.
struct CodeTokens {
  const int64_t* code;    // [used] ascending, or null: group g is code g, and may have no token
  const uint32_t* start;  // [used + 1] of each group's tokens in `order`
  const uint32_t* order;  // [count]
  int64_t used;
  int64_t count;

  int64_t code_of(int64_t g) const { return code == nullptr ? g : code[g]; }
  int64_t size_of(int64_t g) const { return start[g + 1] - start[g]; }
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

  // out[code] = sum of the rows of its tokens, or += it, for the groups [first, end) of `tokens` that have
  // any; rows far apart are fetched ahead.
  void (*sum_codes)(const W* rows,  // [N, D], stride apart
                    int64_t stride, const CodeTokens& tokens, int64_t first, int64_t end, int64_t dim,
                    double* total,  // [D], memory
                    bool adds,
                    W* out);  // [K, D]

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

  // embed = decay embed + gain sum;  code = embed / smoothed size, of length 1 with `normalize`; for codes
  // [first, end). With `counts`, rows of sums whose count is 0 are not read, and zeros are left in both.
  void (*learn_rows)(const EmaStep& step,
                     const W* sizes,  // [K], new
                     W* counts,       // [K] or null
                     W* sums,         // [K, D]
                     int64_t first, int64_t end, int64_t dim,
                     W* embed,      // [K, D]
                     W* codebook);  // [K, D]

  // The same with sums that are made where they are used, of the tokens of codes [first, end); `group` is the
  // first one of a code not below `first`.
  void (*learn_codes)(const EmaStep& step,
                      const W* sizes,  // [K], new
                      const W* rows,   // [N, D], stride apart
                      int64_t stride, const CodeTokens& tokens, int64_t group, int64_t first, int64_t end,
                      int64_t dim,
                      double* total,  // [D], memory
                      W* sum,         // [D], memory
                      W* embed,       // [K, D]
                      W* codebook);   // [K, D]

  // size = decay size + gain counts, or revived_size; returns the sum of the new ones.
  double (*learn_sizes)(const EmaStep& step,
                        const W* counts,     // [count]
                        const bool* revive,  // [count] or null: none
                        int64_t count,
                        W* sizes);  // [count]
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
