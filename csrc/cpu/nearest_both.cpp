// The nearest code of every token and the nearest token of every code: one sweep for both (columns.h).
#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "coarse_search.h"
#include "codebook_rows.h"
#include "columns.h"
#include "ops.h"
#include "search.h"

namespace vqkernels {
namespace cpu {
namespace {

// The tokens as rows, and which of them may be the nearest of a code.
struct TokenRows {
  CodebookRows<float> dense;     // [N, D]
  std::vector<uint8_t> allowed;  // [N]
  int64_t first;                 // the lowest that may, N where none may

  Tokens<const float> view() const { return {dense.rows, 1, dense.size, dense.dim, 0, dense.dim, 1}; }
};

template <class Element>
CodebookRows<float> read_tokens(const Tokens<const Element>& tokens) {
  const int64_t count = tokens.count(), dim = tokens.dim;
  if constexpr (std::is_same_v<Element, float>) {
    const bool dense = usable_as_rows(tokens) && (tokens.spacing() == dim || count <= 1);
    if (dense) return {Buffer<float>(0), tokens.data, count, dim};
  }
  Buffer<float> copy(count * dim);
  for_each_range(count, 1024, 4.0 * count * dim, [&](int64_t begin, int64_t end) {
    load_rows(tokens, begin, end, copy.get() + begin * dim);
  });
  const float* rows = copy.get();
  return {std::move(copy), rows, count, dim};
}

TokenRows choose_tokens(CodebookRows<float> dense, const bool* mask) {
  std::vector<uint8_t> allowed(dense.size);
  for_each_range(dense.size, 1024, 4.0 * dense.size * dense.dim, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      allowed[n] = (mask == nullptr || mask[n]) && all_finite(dense.rows + n * dense.dim, dense.dim);
  });
  const int64_t first = std::find(allowed.begin(), allowed.end(), 1) - allowed.begin();
  return {std::move(dense), std::move(allowed), first};
}

// The codes that the sweep leaves, by a search with the roles exchanged. In the place of a token that may not
// be chosen stands a copy of the first that may: they tie, and whichever comes out is taken for that one.
void search_columns(const TokenRows& x, const Book<float>& codes, const std::vector<int64_t>& left,
                    const Outputs& out) {
  const int64_t count = static_cast<int64_t>(left.size()), size = x.dense.size, dim = codes.dim;
  const Buffer<float> chosen(count * dim);
  for (int64_t i = 0; i < count; ++i) std::copy_n(codes.row(left[i]), dim, chosen.get() + i * dim);
  Buffer<float> copy(size * dim);
  for (int64_t n = 0; n < size; ++n) {
    std::copy_n(x.dense.rows + (x.allowed[n] != 0 ? n : x.first) * dim, dim, copy.get() + n * dim);
  }
  const float* rows = copy.get();
  const CodebookRows<float> dense{std::move(copy), rows, size, dim};
  const KernelTable& table = *codes.table;
  PreparedCodebook prepared;
  prepare(table, choose_pass(table, dim, true), dense, codes.cosine, {}, prepared);
  const double* norms = codes.cosine ? prepared.inverse_norm.data() : nullptr;
  const Book<float> tokens{&table, rows, norms, size, dim, codes.cosine, true};
  std::vector<int64_t> found(count);
  std::vector<float> distance(count);
  const Tokens<const float> view{chosen.get(), 1, count, dim, 0, dim, 1};
  const Outputs own{found.data(), distance.data()};
  CoarseSearch<float>(tokens, prepared, view, own, nullptr).run();
  for (int64_t i = 0; i < count; ++i) {
    out.codes[left[i]] = x.allowed[found[i]] != 0 ? found[i] : x.first;
    out.distance[left[i]] = distance[i];
  }
}

void search_both(const TokenRows& x, const Tensor& codebook, const CodebookRows<float>& dense, bool cosine,
                 const Outputs& rows, const Outputs& columns) {
  const KernelTable& table = kernels();
  if (x.dense.size == 0) check_codebook_finite(dense.finite());
  if (x.first == x.dense.size) {
    for (int64_t k = 0; k < dense.size; ++k) write_invalid(columns, k);
  }
  if (x.dense.size == 0) return;
  const CoarsePass& pass = choose_pass(table, dense.dim, true);
  const auto prepared = current(table, pass, dense, codebook, cosine, nullptr);
  const double* norms = cosine ? prepared->inverse_norm.data() : nullptr;
  const Book<float> codes{&table, dense.rows, norms, dense.size, dense.dim, cosine, true};
  const Tokens<const float> tokens = x.view();
  if (x.first == x.dense.size) return CoarseSearch<float>(codes, *prepared, tokens, rows, nullptr).run();
  Columns found(prepared->coarse, x.allowed.data(), x.first);
  CoarseSearch<float>(codes, *prepared, tokens, rows, nullptr, &found).run();
  const Book<float> book{&table, x.dense.rows, nullptr, x.dense.size, dense.dim, cosine, true};
  const std::vector<int64_t> left = found.decide(book, codes, columns);
  if (!left.empty()) search_columns(x, codes, left, columns);
}

struct Result {
  Tensor index;
  Tensor distance;

  Result(const Tensor& x, std::vector<int64_t> shape)
      : index(torch::stable::new_empty(x, shape, ScalarType::Long)),
        distance(torch::stable::new_empty(x, shape, ScalarType::Float)) {}
  Outputs outputs() {
    return {static_cast<int64_t*>(index.mutable_data_ptr()),
            static_cast<float*>(distance.mutable_data_ptr())};
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> nearest_both(Tensor x, Tensor codebook, std::optional<Tensor> mask,
                                                        bool cosine) {
  check_tokens(x, "x");
  check_codebook(codebook, x);
  check(x.scalar_type() != ScalarType::Double, "x: expected float32, float16 or bfloat16, got float64");
  const DenseMask real(mask, x);
  Result rows(x, {x.size(0), x.size(1)}), columns(x, {codebook.size(0)});
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    if constexpr (!std::is_same_v<Element, double>) {
      const CodebookRows<float> dense = read_codebook<Element>(codebook, cosine);
      const TokenRows tokens = choose_tokens(read_tokens(tokens_of<Element>(x)), real.get());
      search_both(tokens, codebook, dense, cosine, rows.outputs(), columns.outputs());
    }
  });
  return {rows.index, rows.distance, columns.index, columns.distance};
}

}  // namespace cpu
}  // namespace vqkernels
