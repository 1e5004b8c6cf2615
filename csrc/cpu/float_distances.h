// Distances in float32: a third of float64's time, and nearly always enough to tell the candidates of the
// byte pass apart.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "coarse_tokens.h"
#include "decide.h"

namespace vqkernels {
namespace cpu {

class FloatDistances {
 public:
  // The least |x - c|^2 of these codes is not above this.
  double least(const Book<float>& book, const float* token, const CodeList& codes) {
    return measure(book, token, codes) * (1.0 + square_error(book.dim)) + UNDERFLOW_LOSS;
  }

  // Leaves those that may be the nearest of them.
  void drop_farther(const Book<float>& book, const float* token, CodeList& codes) {
    const double most =
        measure(book, token, codes) * (1.0 + 2.1 * square_error(book.dim)) + 2.0 * UNDERFLOW_LOSS;
    const float limit = static_cast<float>(most);  // infinity where a nearer one's sum may have overflowed
    codes.keep_if([&](int64_t i) { return !(values_[i] > limit); });
  }

 private:
  static constexpr double UNDERFLOW_LOSS = 0x1p-100;  // more than products too small for float32 may lose

  // Fills `values_`, within square_error, and returns the least.
  double measure(const Book<float>& book, const float* token, const CodeList& codes) {
    if (static_cast<int64_t>(values_.size()) < codes.count) values_.resize(codes.count);
    book.table->float_distances(token, book.rows, book.size, codes.data(), codes.count, book.dim,
                                values_.data());
    float least = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < codes.count; ++i) least = std::min(least, values_[i]);
    return least;
  }

  std::vector<float> values_;  // [codes]
};

}  // namespace cpu
}  // namespace vqkernels
