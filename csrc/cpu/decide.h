// The last word on a token: float64 values of its candidates, then error-free arithmetic between those that
// tie.
//
// A *value* is what is minimised: |x - c|^2, or -cos(x, c).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../exact.h"
#include "kernel_table.h"

namespace vqkernels {
namespace cpu {

constexpr double UNIT64 = 1.1102230246251565e-16;  // 2^-53, float64's unit roundoff

// The codebook as the decisions read it.
template <class Row>
struct Book {
  const KernelTable* table;
  const Row* rows;             // [K, D]
  const double* inverse_norm;  // [K] for cosine (0 for the zero vector), else null
  int64_t size;
  int64_t dim;
  bool cosine;
  bool exact;

  const Row* row(int64_t k) const { return rows + k * dim; }
};

// One token with what its values need.
template <class Row>
struct Token {
  const Row* row;       // [D]
  const double* wide;   // [D], the same numbers
  double inverse_norm;  // 0 for the zero vector
};

struct Choice {
  int64_t code;
  double value;
};

inline void squared_distances(const KernelTable& table, const double* x, const float* codes, int64_t count,
                              int64_t dim, double* out) {
  table.squared_distances_float(x, codes, count, dim, out);
}
inline void squared_distances(const KernelTable& table, const double* x, const double* codes, int64_t count,
                              int64_t dim, double* out) {
  table.squared_distances_double(x, codes, count, dim, out);
}
inline void dot_products(const KernelTable& table, const double* x, const float* codes, int64_t count,
                         int64_t dim, double* out) {
  table.dot_products_float(x, codes, count, dim, out);
}
inline void dot_products(const KernelTable& table, const double* x, const double* codes, int64_t count,
                         int64_t dim, double* out) {
  table.dot_products_double(x, codes, count, dim, out);
}

// Values of codes [first, first + count) in float64.
template <class Row>
void values_of(const Book<Row>& book, const Token<Row>& token, int64_t first, int64_t count,
               double* values) {  // [count]
  if (!book.cosine) {
    squared_distances(*book.table, token.wide, book.row(first), count, book.dim, values);
    return;
  }
  dot_products(*book.table, token.wide, book.row(first), count, book.dim, values);
  for (int64_t i = 0; i < count; ++i) values[i] *= -token.inverse_norm * book.inverse_norm[first + i];
}

// A value whose code may be nearest although `least` was computed for another: both carry float64 rounding.
inline double tie_limit(double least, int64_t dim, bool cosine) {
  const double terms = static_cast<double>(dim);
  if (cosine) return least + 2.1 * (2.0 * terms + 16.0) * UNIT64 + exact::cosine_tie();
  const double underflow = terms * 8.0 * std::numeric_limits<double>::denorm_min();
  return least * (1.0 + 2.1 * (terms + 4.0) * UNIT64) + underflow;
}

template <class Row>
bool same_row(const Book<Row>& book, int64_t i, int64_t j) {
  return std::memcmp(book.row(i), book.row(j), sizeof(Row) * book.dim) == 0;
}

// The nearest of `tied` over the real numbers, lowest index on equality.
template <class Row>
int64_t nearest_of_tied(const Book<Row>& book, const Token<Row>& token, const std::vector<int64_t>& tied) {
  int64_t best = tied[0];
  int64_t beaten = -1;  // duplicates of it lose again
  for (size_t i = 1; i < tied.size(); ++i) {
    const int64_t rival = tied[i];
    if (beaten >= 0 && same_row(book, beaten, rival)) continue;
    int sign = 0;
    if (!same_row(book, best, rival)) {
      sign = exact::compare_euclidean(token.row, 1, book.row(best), 1, book.row(rival), 1, book.dim);
    }
    if (sign < 0) beaten = rival;
    if (sign > 0) beaten = best;
    if (sign > 0 || (sign == 0 && rival < best)) best = rival;
  }
  return best;
}

// The lowest index among those whose cosine is within 2^-90 of the largest.
template <class Row>
int64_t most_similar_of_tied(const Book<Row>& book, const Token<Row>& token,
                             const std::vector<int64_t>& tied) {
  const exact::ScaledVector x_scale = exact::scale_vector(token.row, 1, book.dim);
  std::vector<exact::DoubleDouble> cosines(tied.size());
  exact::DoubleDouble largest{-2.0, 0.0};
  for (size_t i = 0; i < tied.size(); ++i) {
    if (i > 0 && same_row(book, tied[i - 1], tied[i])) {
      cosines[i] = cosines[i - 1];
      continue;
    }
    const exact::ScaledVector c_scale = exact::scale_vector(book.row(tied[i]), 1, book.dim);
    cosines[i] = exact::cosine(token.row, 1, x_scale, book.row(tied[i]), 1, c_scale, book.dim);
    if (exact::less(largest, cosines[i])) largest = cosines[i];
  }
  const exact::DoubleDouble limit = exact::add(largest, {-exact::cosine_tie(), 0.0});
  int64_t best = std::numeric_limits<int64_t>::max();
  for (size_t i = 0; i < tied.size(); ++i) {
    if (!exact::less(cosines[i], limit) && tied[i] < best) best = tied[i];
  }
  return best;
}

// The choice among candidates: codes[i] has values[i]; codes == nullptr stands for 0, 1, 2 ...
template <class Row>
Choice decide(const Book<Row>& book, const Token<Row>& token, const int64_t* codes, const double* values,
              int64_t count, std::vector<int64_t>& tied) {
  double least = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < count; ++i) least = values[i] < least ? values[i] : least;
  const double limit = book.exact ? tie_limit(least, book.dim, book.cosine) : least;
  tied.clear();
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] <= limit) tied.push_back(codes == nullptr ? i : codes[i]);
  }
  if (tied.empty()) return {-1, std::numeric_limits<double>::quiet_NaN()};  // no candidate, or only NaN
  Choice choice{tied[0], least};
  if (tied.size() == 1) return choice;
  if (book.exact) {
    choice.code = book.cosine ? most_similar_of_tied(book, token, tied) : nearest_of_tied(book, token, tied);
    values_of(book, token, choice.code, 1, &choice.value);
  } else {
    for (const int64_t k : tied) choice.code = k < choice.code ? k : choice.code;
  }
  return choice;
}

inline float distance_of(double value, bool cosine) {
  if (!cosine) return static_cast<float>(value);
  const double distance = 1.0 + value;
  return static_cast<float>(distance > 0.0 ? distance : 0.0);
}

}  // namespace cpu
}  // namespace vqkernels
