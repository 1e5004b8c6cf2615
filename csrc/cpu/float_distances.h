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
    const double limit =
        measure(book, token, codes) * (1.0 + 2.1 * square_error(book.dim)) + 2.0 * UNDERFLOW_LOSS;
    codes.keep_if([&](int64_t i) { return !(values_[i] > limit); });
  }

 private:
  static constexpr double UNDERFLOW_LOSS = 0x1p-100;  // more than products too small for float32 may lose

  // Fills `values_`, within square_error, and returns the least.
  double measure(const Book<float>& book, const float* token, const CodeList& codes) {
    const Packing from_token{padded(token, book.dim), 1.0f, 1.0f, book.dim, false,
                             book.row(book.size),     0.0,  0.0};
    if (static_cast<int64_t>(values_.size()) < codes.count) values_.resize(codes.count);
    float least = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < codes.count; ++i) {
      book.table->measure_rows(book.row(codes[i]), 1, from_token, &values_[i]);
      least = std::min(least, values_[i]);
    }
    return least;
  }

  // With zeros to the next multiple of 16, as a centre has to be.
  const float* padded(const float* token, int64_t dim) {
    if (dim % 16 == 0) return token;
    padded_.assign(ceil_div(dim, int64_t{16}) * 16, 0.0f);
    std::copy_n(token, dim, padded_.begin());
    return padded_.data();
  }

  std::vector<float> values_;  // [codes]
  std::vector<float> padded_;  // [D rounded up to 16]
};

}  // namespace cpu
}  // namespace vqkernels
