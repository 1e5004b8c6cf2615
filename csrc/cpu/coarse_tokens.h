// What a coarse pass is told of a token before it packs it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "coarse.h"

namespace vqkernels {
namespace cpu {

constexpr float LARGEST_SQUARE = 0x1p80f;  // of a token's norm; the float64 pass takes larger ones

// Relative, of the squares that measure_rows sums.
inline double square_error(int64_t dim) { return 1.02 * (static_cast<double>(dim) / 16.0 + 10.0) * 0x1p-24; }

struct MeasuredToken {
  ScalePair scale;  // what it is multiplied with: for cosine its own, for directions may have any length
  float square;     // of its norm, after centring and scaling
  double norm;      // at least that; 0 where the coarse passes cannot take it
  bool scorable;
};

inline Packing scaled_by(Packing packing, const ScalePair& scale) {
  packing.scale = scale.first;
  packing.scale2 = scale.second;
  return packing;
}

// Brings the largest of a direction's numbers to [1, 2).
inline int direction_exponent(const float* row,  // [D]
                              int64_t dim) {
  float largest = 0.0f;
  for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(row[d]));
  return largest > 0.0f && std::isfinite(largest) ? -std::ilogb(largest) : 0;
}

inline MeasuredToken measure_token(const KernelTable& table, const Packing& packing,
                                   const float* row) {  // [D]
  MeasuredToken token;
  token.scale = packing.cosine ? scale_pair(direction_exponent(row, packing.dim))
                               : ScalePair{packing.scale, packing.scale2};
  table.measure_rows(row, 1, scaled_by(packing, token.scale), &token.square);
  token.scorable = token.square < LARGEST_SQUARE;
  token.norm = token.scorable ? std::sqrt(static_cast<double>(token.square)) * (1.0 + 1e-4) + 0x1p-50 : 0.0;
  return token;
}

}  // namespace cpu
}  // namespace vqkernels
