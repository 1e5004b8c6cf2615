// What the two forms of the EMA update share.
#pragma once

#include <cstdint>
#include <vector>

#include "../checks.h"
#include "parallel.h"

namespace vqkernels {
namespace cpu {

constexpr int64_t SIZES_BLOCK = 4096;

// Sum over [0, size) of block(begin, end), which threads share out and which is added up in order.
template <class Block>
double sum_of_blocks(int64_t size, const Block& block) {
  std::vector<double> sums(ceil_div(size, SIZES_BLOCK));
  for_each_range(size, SIZES_BLOCK, 8.0 * size,
                 [&](int64_t begin, int64_t end) { sums[begin / SIZES_BLOCK] = block(begin, end); });
  double sum = 0.0;
  for (const double each : sums) sum += each;
  return sum;
}

// Smoothed sizes are (size + eps) / this: with n, the sum of all sizes, their sum stays n unless `plain`.
inline double preserved(double n, int64_t size, double eps, bool plain) {
  return plain ? 1.0 : (n + static_cast<double>(size) * eps) / n;
}

// Throws unless these are contiguous [K, D], [K], [K, D] of one type, float32 or float64.
void check_codebook_state(const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_sum);

}  // namespace cpu
}  // namespace vqkernels
