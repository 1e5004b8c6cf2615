// Sums of the tokens of every code with the tokens read in their own order: where codes are few and have many
// tokens each, all of the sums stay in the cache, and one thread is quicker so than by sorting and then
// reading all over the memory. The additions, and so the bits, are those of the sums by code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {

constexpr int64_t SUMS_BYTES = 512 * 1024;  // of all sums in float64, in the second cache
constexpr int64_t TOKENS_A_CODE = 32;       // from which on what is done once a code counts for little

inline bool better_in_order(int64_t tokens, int64_t size, int64_t dim) {
  const int64_t fitting = SUMS_BYTES / (static_cast<int64_t>(sizeof(double)) * dim);
  return tokens >= TOKENS_A_CODE * size && size <= fitting && useful_threads(4.0 * tokens * dim) == 1;
}

// sums[code] = the sum of its tokens, or += it; rows of codes without any stay as they are.
template <class W>
void sum_rows_in_order(const W* rows,  // [N, D], stride apart
                       int64_t stride,
                       const int64_t* codes,  // [N], below 0: none
                       int64_t tokens, int64_t dim,
                       const std::vector<int64_t>& tokens_of_code,  // [K]
                       bool adds,
                       W* sums) {  // [K, D]
  const DefaultArithmetic guard;
  const TrainingLoops<W>& loops = training_loops<W>();
  const int64_t size = static_cast<int64_t>(tokens_of_code.size());
  const Buffer<double> totals(size * dim);  // on a line's boundary, for vectors of a line each
  std::fill_n(totals.get(), size * dim, NO_ROWS);
  loops.add_rows(rows, stride, codes, tokens, dim, totals.get());
  for (int64_t k = 0; k < size; ++k) {
    if (tokens_of_code[k] > 0) loops.put_sum(totals.get() + k * dim, dim, adds, sums + k * dim);
  }
}

}  // namespace cpu
}  // namespace vqkernels
