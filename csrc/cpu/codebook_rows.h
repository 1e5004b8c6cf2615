// The codebook as dense rows of float or double, whatever its strides and element type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../exact.h"
#include "decide.h"
#include "kernel_table.h"
#include "parallel.h"
#include "tokens.h"

namespace vqkernels {
namespace cpu {

// Power of two that brings the largest entry of a float64 row to [1, 2): directions survive any scale.
inline void scale_direction(double* row, int64_t dim) {
  const exact::ScaledVector scale = exact::scale_vector(row, 1, dim);
  for (int64_t d = 0; d < dim; ++d) row[d] = row[d] * scale.factor * scale.factor2;
}

template <class Row>
struct CodebookRows {
  Buffer<Row> copy;
  const Row* rows;  // [K, D]: the copy, or the tensor's own memory
  int64_t size;
  int64_t dim;

  std::vector<double> inverse_norms(const KernelTable& table) const {
    std::vector<double> inverse(size);
    for_each_range(size, 256, 8.0 * size * dim, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) inverse[k] = inverse_norm_of(table, rows + k * dim, dim);
    });
    return inverse;
  }
  bool finite() const { return all_finite(rows, size * dim); }
};

// In place where that can be.
template <class Element>
CodebookRows<Wide<Element>> read_codebook(const Tensor& codebook, bool cosine) {  // [K, D]
  using Row = Wide<Element>;
  const int64_t size = codebook.size(0), dim = codebook.size(1);
  const Tokens<const Element> view{static_cast<const Element*>(codebook.const_data_ptr()),
                                   1,
                                   size,
                                   dim,
                                   0,
                                   codebook.stride(0),
                                   codebook.stride(1)};
  const bool scaled = cosine && std::is_same_v<Row, double>;
  if constexpr (std::is_same_v<Row, Element>) {
    if (codebook.is_contiguous() && !scaled) return {Buffer<Row>(0), view.data, size, dim};
  }
  Buffer<Row> copy(size * dim);
  for_each_range(size, 1024, 4.0 * size * dim, [&](int64_t begin, int64_t end) {
    load_rows(view, begin, end, &copy[begin * dim]);
    if constexpr (std::is_same_v<Row, double>) {
      for (int64_t k = begin; k < end && scaled; ++k) scale_direction(&copy[k * dim], dim);
    }
  });
  const Row* rows = copy.get();
  return {std::move(copy), rows, size, dim};
}

}  // namespace cpu
}  // namespace vqkernels
