// Sums of the tokens of every code with the tokens read in their own order: where codes are few and have many
// tokens each, all of the sums stay in the cache, and reading in order costs less than sorting and then
// reading all over the memory. Threads share out the dimensions. The additions, and so the bits, are those of
// the sums by code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {

constexpr int64_t SUMS_BYTES = 512 * 1024;  // of all sums in float64, in the second cache
constexpr int64_t TOKENS_A_CODE = 8;        // from which on what is done once a code counts for little
constexpr int64_t SLAB_LINE = 64;           // bytes: slabs of several threads share none
constexpr int64_t NARROWEST_SLAB = 128;     // bytes of a token: with less, every thread reads all of them

// Dimensions that a thread takes at a time, or 0 where sums by code are the better way.
template <class W>
int64_t slab_width(int64_t tokens, int64_t size, int64_t dim) {
  constexpr int64_t LINE = SLAB_LINE / sizeof(W), NARROWEST = NARROWEST_SLAB / sizeof(W);
  if (tokens < TOKENS_A_CODE * size || size > SUMS_BYTES / static_cast<int64_t>(sizeof(double)) / dim)
    return 0;
  const int64_t threads = useful_threads(4.0 * tokens * dim);
  if (threads == 1) return dim;
  const int64_t width = ceil_div(ceil_div(dim, threads), LINE) * LINE;
  return width >= NARROWEST && ceil_div(dim, width) == threads ? width : 0;
}

// sums[code] = the sum of its tokens, or += it; rows of codes without any stay as they are.
template <class W>
void sum_rows_in_order(const W* rows,                         // [N, D], stride apart
                       int64_t stride, const int64_t* codes,  // [N], below 0: none
                       int64_t tokens, int64_t size, int64_t dim, int64_t width,
                       const std::vector<int64_t>& tokens_of_code,  // [K]
                       bool adds,
                       W* sums) {  // [K, D]
  const TrainingLoops<W>& loops = training_loops<W>();
  for_each_item<std::vector<double>>(
      ceil_div(dim, width), 4.0 * tokens * dim, [&] { return std::vector<double>(size * width); },
      [&](int64_t slab, std::vector<double>& totals) {
        const int64_t first = slab * width, count = std::min(width, dim - first);
        std::fill(totals.begin(), totals.end(), NO_ROWS);
        loops.add_rows(rows + first, stride, codes, tokens, count, totals.data());
        for (int64_t k = 0; k < size; ++k) {
          if (tokens_of_code[k] == 0) continue;
          loops.put_sum(totals.data() + k * count, count, adds, sums + k * dim + first);
        }
      });
}

}  // namespace cpu
}  // namespace vqkernels
