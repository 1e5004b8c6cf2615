// The last word on a token: float64 values of its candidates, then error-free arithmetic between those that
// tie.
//
// A *value* is what is minimised: |x - c|^2, or -cos(x, c).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../exact.h"
#include "coarse.h"
#include "kernel_table.h"
#include "parallel.h"

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
  CodeRows code_rows() const
    requires std::is_same_v<Row, float>
  {
    return {rows, inverse_norm, size, dim};
  }
};

// One token with what its values need.
template <class Row>
struct Token {
  const Row* row;       // [D]
  double inverse_norm;  // 0 for the zero vector
};

struct Choice {
  int64_t code;
  double value;
};

inline void squared_distances(const KernelTable& table, const float* x, const float* rows,
                              const int64_t* chosen, int64_t count, int64_t dim, double* out) {
  table.squared_distances_float(x, rows, chosen, count, dim, out);
}
inline void squared_distances(const KernelTable& table, const double* x, const double* rows,
                              const int64_t* chosen, int64_t count, int64_t dim, double* out) {
  table.squared_distances_double(x, rows, chosen, count, dim, out);
}
inline void dot_products(const KernelTable& table, const float* x, const float* rows, const int64_t* chosen,
                         int64_t count, int64_t dim, double* out) {
  table.dot_products_float(x, rows, chosen, count, dim, out);
}
inline void dot_products(const KernelTable& table, const double* x, const double* rows, const int64_t* chosen,
                         int64_t count, int64_t dim, double* out) {
  table.dot_products_double(x, rows, chosen, count, dim, out);
}

// Values in float64 of the chosen codes, or of the first `count`.
template <class Row>
void values_of(const Book<Row>& book, const Token<Row>& token, const int64_t* chosen, int64_t count,
               double* values) {  // [count]
  if (!book.cosine)
    return squared_distances(*book.table, token.row, book.rows, chosen, count, book.dim, values);
  dot_products(*book.table, token.row, book.rows, chosen, count, book.dim, values);
  for (int64_t i = 0; i < count; ++i) {
    values[i] *= -token.inverse_norm * book.inverse_norm[chosen == nullptr ? i : chosen[i]];
  }
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
  if (count == 0) return {-1, std::numeric_limits<double>::quiet_NaN()};  // every score overflowed
  double least = values[0];
  for (int64_t i = 1; i < count; ++i) least = values[i] < least ? values[i] : least;
  const double limit = book.exact ? tie_limit(least, book.dim, book.cosine) : least;
  int64_t near = 0, only = 0;  // summed, not branched on: which code it is cannot be predicted
  for (int64_t i = 0; i < count; ++i) {
    const int64_t is_near = values[i] <= limit;
    near += is_near;
    only += is_near * i;
  }
  if (near == 1) return {codes == nullptr ? only : codes[only], least};
  tied.clear();
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] <= limit) tied.push_back(codes == nullptr ? i : codes[i]);
  }
  if (tied.empty()) return {-1, std::numeric_limits<double>::quiet_NaN()};  // only NaN
  Choice choice{tied[0], least};
  if (book.exact) {
    choice.code = book.cosine ? most_similar_of_tied(book, token, tied) : nearest_of_tied(book, token, tied);
    values_of(book, token, &choice.code, 1, &choice.value);
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

struct Outputs {
  int64_t* codes;   // [N]
  float* distance;  // [N]
};

template <class Row>
void write(const Outputs& out, int64_t n, const Book<Row>& book, const Choice& choice) {
  out.codes[n] = choice.code;
  out.distance[n] = distance_of(choice.value, book.cosine);
}

inline void write_invalid(const Outputs& out, int64_t n) {
  out.codes[n] = -1;
  out.distance[n] = std::numeric_limits<float>::quiet_NaN();
}

// Codes in memory that is used again and never cleared: a vector's resize would write zeros for every token.
class CodeList {
 public:
  int64_t count = 0;

  const int64_t* data() const { return memory_.data(); }
  int64_t operator[](int64_t i) const { return memory_[i]; }
  void add(int64_t code) {
    if (count == static_cast<int64_t>(memory_.size())) memory_.resize(2 * memory_.size());
    memory_[count++] = code;
  }
  template <class F>
  void keep_if(const F& is_kept) {  // is_kept(position)
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      memory_[kept] = memory_[i];
      kept += is_kept(i);
    }
    count = kept;
  }

 private:
  std::vector<int64_t> memory_ = std::vector<int64_t>(256);
};

// What one thread needs to decide tokens.
template <class Row>
struct DecideScratch {
  CodeList codes;  // the candidates
  std::vector<int64_t> tied;
  std::vector<double> values;
};

// 1 / |row| of a row whose squares neither over- nor underflow; 0 for the zero vector.
template <class Row>
double inverse_norm_of(const KernelTable& table, const Row* row, int64_t dim) {
  double square = 0.0;
  dot_products(table, row, row, nullptr, 1, dim, &square);
  return square > 0.0 ? 1.0 / std::sqrt(square) : 0.0;
}

template <class Row>
Token<Row> make_token(const Book<Row>& book, const Row* row) {
  return {row, book.cosine ? inverse_norm_of(*book.table, row, book.dim) : 0.0};
}

// Of scratch.codes.
template <class Row>
const double* values_of_codes(const Book<Row>& book, const Token<Row>& token, DecideScratch<Row>& scratch) {
  const int64_t count = scratch.codes.count;
  if (static_cast<int64_t>(scratch.values.size()) < count) scratch.values.resize(count);
  values_of(book, token, scratch.codes.data(), count, scratch.values.data());
  return scratch.values.data();
}

// The least value of scratch.codes is not above this.
template <class Row>
double least_value(const Book<Row>& book, const Row* row, DecideScratch<Row>& scratch) {
  const double* values = values_of_codes(book, make_token(book, row), scratch);
  return tie_limit(*std::min_element(values, values + scratch.codes.count), book.dim, book.cosine);
}

// The token's code among scratch.codes.
template <class Row>
void decide_token(const Book<Row>& book, const Row* row, DecideScratch<Row>& scratch, const Outputs& out,
                  int64_t n) {
  const Token<Row> token = make_token(book, row);
  if (book.cosine && token.inverse_norm == 0.0) return write(out, n, book, {0, 0.0});  // every cosine is 0
  const double* values = values_of_codes(book, token, scratch);
  const int64_t count = scratch.codes.count;
  if (count == 1) return write(out, n, book, {scratch.codes[0], values[0]});
  write(out, n, book, decide(book, token, scratch.codes.data(), values, count, scratch.tied));
}

// The token's code among all.
template <class Row>
void scan(const Book<Row>& book, const Row* row, DecideScratch<Row>& scratch, const Outputs& out, int64_t n) {
  const Token<Row> token = make_token(book, row);
  if (book.cosine && token.inverse_norm == 0.0) return write(out, n, book, {0, 0.0});
  scratch.values.resize(book.size);
  values_of(book, token, nullptr, book.size, scratch.values.data());
  write(out, n, book,
        decide(book, token, static_cast<const int64_t*>(nullptr), scratch.values.data(), book.size,
               scratch.tied));
}

}  // namespace cpu
}  // namespace vqkernels
