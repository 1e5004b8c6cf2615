// Tokens with any strides and any of the four element types, read and written as rows of float or double.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>

#include "../checks.h"
#include "transpose.h"

namespace vqkernels {
namespace cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Arithmetic of the 16-bit types is done in float.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(T{}) with the element type of `type`.
template <class F>
auto dispatch_floating(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

template <class T>
struct Tokens {
  T* data;  // [B, T, D]
  int64_t batch;
  int64_t length;
  int64_t dim;
  int64_t batch_stride;
  int64_t length_stride;
  int64_t dim_stride;

  int64_t count() const { return batch * length; }
  bool rows_are_dense() const { return dim_stride == 1 || dim == 1; }

  // A channels-first map: neighbouring tokens lie side by side.
  bool is_map() const { return length_stride == 1 && dim_stride > 1 && dim > 1 && length > 1; }

  // Calls f(pointer to the first, position within the range, count) for each run of tokens within one batch
  // entry.
  template <class F>
  void for_runs(int64_t begin, int64_t end, const F& f) const {
    for (int64_t n = begin; n < end;) {
      const int64_t within = n % length;
      const int64_t count = length - within < end - n ? length - within : end - n;
      f(data + (n / length) * batch_stride + within * length_stride, n - begin, count);
      n += count;
    }
  }

  T* row(int64_t n) const {
    if (batch == 1) return data + n * length_stride;
    return data + (n / length) * batch_stride + (n % length) * length_stride;
  }

  // Whether one stride leads from every token to the next.
  bool evenly_spaced() const { return batch == 1 || length == 1 || batch_stride == length * length_stride; }
  int64_t spacing() const { return length == 1 ? batch_stride : length_stride; }
};

template <class T>
Tokens<const T> tokens_of(const Tensor& x) {  // [B, T, D]
  return {static_cast<const T*>(x.const_data_ptr()),
          x.size(0),
          x.size(1),
          x.size(2),
          x.stride(0),
          x.stride(1),
          x.stride(2)};
}

template <class T>
Tokens<T> mutable_tokens_of(const Tensor& x) {  // [B, T, D]
  return {static_cast<T*>(x.mutable_data_ptr()),
          x.size(0),
          x.size(1),
          x.size(2),
          x.stride(0),
          x.stride(1),
          x.stride(2)};
}

// One number a token, in any strides: the gradient of a mean is one number for all.
template <class W>
struct TokenValues {
  const W* data = nullptr;  // [B, T] or null: zero
  int64_t length = 1;
  int64_t batch_stride = 0;
  int64_t length_stride = 0;

  W operator[](int64_t n) const {
    if (data == nullptr) return W(0);
    return n < length ? data[n * length_stride]
                      : data[(n / length) * batch_stride + (n % length) * length_stride];
  }
};

template <class W>
TokenValues<W> token_values_of(const Tensor& values) {  // [B, T]
  return {static_cast<const W*>(values.const_data_ptr()), values.size(1), values.stride(0), values.stride(1)};
}

// The tokens' walk order: along D, unless neighbouring tokens lie closer (channels-first maps); then in
// strips of TOKEN_STRIP tokens, so that both sides stay in the cache.
constexpr int64_t TOKEN_STRIP = 16;

template <class T, class F>
void for_elements(const Tokens<T>& tokens, T* first, int64_t count, const F& f) {
  const int64_t along = tokens.length_stride, across = tokens.dim_stride;
  const bool adjacent = along < across;
  const int64_t strip = adjacent ? TOKEN_STRIP : 1;
  for (int64_t base = 0; base < count; base += strip) {
    const int64_t width = count - base < strip ? count - base : strip;
    for (int64_t d = 0; d < tokens.dim; ++d) {
      for (int64_t i = base; i < base + width; ++i) f(first[i * along + d * across], i, d);
    }
  }
}

// Tokens [begin, end) as dense rows.
template <class T, class Row>
void load_rows(const Tokens<const T>& tokens, int64_t begin, int64_t end,
               Row* rows) {  // [end - begin, D]
  const int64_t dim = tokens.dim;
  tokens.for_runs(begin, end, [&](const T* first, int64_t position, int64_t count) {
    Row* out = rows + position * dim;
    if constexpr (std::is_same_v<T, float> && std::is_same_v<Row, float>) {
      if (tokens.is_map()) return map_to_rows(first, tokens.dim_stride, count, dim, out);
    }
    if (!tokens.rows_are_dense()) {
      for_elements(tokens, first, count,
                   [&](const T& value, int64_t i, int64_t d) { out[i * dim + d] = static_cast<Row>(value); });
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const T* row = first + i * tokens.length_stride;
      for (int64_t d = 0; d < dim; ++d) out[i * dim + d] = static_cast<Row>(row[d]);
    }
  });
}

// Rows that are dense each, `stride` apart.
template <class Row>
struct RowBlock {
  Row* data;
  int64_t stride;

  Row* operator[](int64_t i) const { return data + i * stride; }
};

template <class T>
bool usable_as_rows(const Tokens<T>& tokens) {
  return std::is_same_v<std::remove_const_t<T>, Wide<std::remove_const_t<T>>> && tokens.rows_are_dense() &&
         tokens.evenly_spaced();
}

// Tokens [begin, end) as rows: in place where that can be, else copied to `scratch` [end - begin, D].
template <class T>
RowBlock<const Wide<T>> read_rows(const Tokens<const T>& tokens, int64_t begin, int64_t end,
                                  Wide<T>* scratch) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    if (usable_as_rows(tokens)) return {tokens.row(begin), tokens.spacing()};
  }
  load_rows(tokens, begin, end, scratch);
  return {scratch, tokens.dim};
}

// Where rows [begin, end) are to be written: in place where that can be, else to `scratch`, for store_rows.
template <class T>
RowBlock<Wide<T>> rows_to_write(const Tokens<T>& tokens, int64_t begin, Wide<T>* scratch) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    if (usable_as_rows(tokens)) return {tokens.row(begin), tokens.spacing()};
  }
  return {scratch, tokens.dim};
}

// Dense rows into tokens [begin, end).
template <class T, class Row>
void store_rows(const Tokens<T>& tokens, int64_t begin, int64_t end,
                const Row* rows) {  // [end - begin, D]
  const int64_t dim = tokens.dim;
  tokens.for_runs(begin, end, [&](T* first, int64_t position, int64_t count) {
    const Row* in = rows + position * dim;
    if constexpr (std::is_same_v<T, float> && std::is_same_v<Row, float>) {
      if (tokens.is_map()) return rows_to_map(in, count, dim, first, tokens.dim_stride);
    }
    for_elements(tokens, first, count,
                 [&](T& value, int64_t i, int64_t d) { value = static_cast<T>(in[i * dim + d]); });
  });
}

// A mask [B, T] as it lies in memory, made dense; null where there is none.
struct DenseMask {
  std::optional<Tensor> held;

  DenseMask(const std::optional<Tensor>& mask, const Tensor& x) {
    if (!mask.has_value()) return;
    check_rank(*mask, "mask", 2, "[B, T]");
    check_type(*mask, "mask", ScalarType::Bool);
    for (int64_t axis = 0; axis < 2; ++axis) check_size(*mask, "mask", axis, x.size(axis), "as x");
    held = torch::stable::contiguous(*mask);
  }
  const bool* get() const {
    return held.has_value() ? static_cast<const bool*>(held->const_data_ptr()) : nullptr;
  }
};

}  // namespace cpu
}  // namespace vqkernels
