// The loops of training_table.h in vectors of eight numbers; included once by every unit, inside its choice
// of instructions and after its `Unit`, which converts between floats and doubles.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "training_lanes.h"
#include "training_sums.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {
namespace {

template <class W>
W copy_code(const W* code, const W* x, int64_t dim, W* out) {
  typename Eight<W>::Vector sum = {}, a, b;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    load(code + d, a);
    load(x + d, b);
    store(out + d, a);
    b -= a;
    sum += b * b;
  }
  W error = add_lanes(sum);
  for (; d < dim; ++d) {
    const W difference = x[d] - code[d];
    out[d] = code[d];
    error += difference * difference;
  }
  return error;
}

template <class W>
void straight_through(const W* x, const W* q, const W* g, int64_t dim, W pull, W* dx) {
  typename Eight<W>::Vector a, b;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    typename Eight<W>::Vector c = {};
    if (g != nullptr) load(g + d, c);
    load(x + d, a);
    load(q + d, b);
    c += pull * (a - b);
    store(dx + d, c);
  }
  for (; d < dim; ++d) dx[d] = (g != nullptr ? g[d] : W(0)) + pull * (x[d] - q[d]);
}

// Sums over one token that its rotation needs.
struct Products {
  double xx = 0, qq = 0, xq = 0, gx = 0, gq = 0;
};

template <class W>
VQ_INLINE Products products_of(const W* x, const W* q, const W* g, int64_t dim) {
  Doubles xx, qq, xq, gx, gq;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    const Doubles a = load_wide(x + d), b = load_wide(q + d), c = load_wide(g + d);
    xx += a * a;
    qq += b * b;
    xq += a * b;
    gx += c * a;
    gq += c * b;
  }
  Products sums{add_lanes(xx), add_lanes(qq), add_lanes(xq), add_lanes(gx), add_lanes(gq)};
  for (; d < dim; ++d) {
    const double e = x[d], r = q[d], f = g[d];
    sums.xx += e * e;
    sums.qq += r * r;
    sums.xq += e * r;
    sums.gx += f * e;
    sums.gq += f * r;
  }
  return sums;
}

// |u + v|^2 and g.(u + v).
struct Middle {
  double square;
  double along;
};

// Term by term, for u near -v, where the sums of `Products` would cancel.
template <class W>
Middle middle_by_terms(const W* x, const W* q, const W* g, int64_t dim, double to_u, double to_v) {
  Middle middle{0.0, 0.0};
  for (int64_t d = 0; d < dim; ++d) {
    const double bisector = x[d] * to_u + q[d] * to_v;
    middle.square += bisector * bisector;
    middle.along += g[d] * bisector;
  }
  return middle;
}

constexpr double NEARLY_OPPOSITE = 0.1;  // of |u + v|^2; above it the cancellation costs one digit of sixteen
constexpr double OPPOSITE = 1e-12;       // no direction lies between u and v

template <class W>
void rotation(const W* x, const W* q, const W* g, int64_t dim, W pull, W* dx) {
  const Products sums = products_of(x, q, g, dim);
  const double x_norm = std::sqrt(sums.xx), q_norm = std::sqrt(sums.qq);
  if (x_norm == 0.0 || q_norm == 0.0) return straight_through(x, q, g, dim, pull, dx);
  const double to_u = 1.0 / x_norm, to_v = 1.0 / q_norm;
  Middle middle{2.0 + 2.0 * (sums.xq * to_u * to_v), sums.gx * to_u + sums.gq * to_v};
  if (!(middle.square >= NEARLY_OPPOSITE)) middle = middle_by_terms(x, q, g, dim, to_u, to_v);
  const double reflect = middle.square < OPPOSITE ? 0.0 : 2.0 * middle.along / middle.square;
  const double scale = q_norm * to_u;
  const double along_x = scale * to_u * (2.0 * sums.gq * to_v - reflect), along_q = -scale * to_v * reflect;
  const double wide_pull = pull;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    const Doubles a = load_wide(x + d), b = load_wide(q + d), c = load_wide(g + d);
    store_narrow(dx + d, (scale * c + (along_x * a + along_q * b)) + wide_pull * (a - b));
  }
  for (; d < dim; ++d) {
    const double e = x[d], r = q[d];
    dx[d] = static_cast<W>((scale * g[d] + (along_x * e + along_q * r)) + wide_pull * (e - r));
  }
}

template <class W>
void add_row(const W* row, int64_t dim, double* total) {
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    store(total + d, load_wide(total + d) + load_wide(row + d));
  }
  for (; d < dim; ++d) total[d] += row[d];
}

template <class W>
void sum_codes(const W* rows, int64_t stride, const CodeTokens& tokens, int64_t first, int64_t end,
               int64_t dim, double* total, bool adds, W* out) {
  CodeSums<W> sums(rows, stride, dim, tokens, first, total);
  for (int64_t g = first; g < end; ++g) {
    if (tokens.size_of(g) > 0) sums.sum(g, adds, out + tokens.code_of(g) * dim);
  }
}

template <class W>
void add_rows(const W* rows, const int64_t* slots, int64_t count, int64_t dim, double* totals) {
  for (int64_t n = 0; n < count; ++n) {
    if (slots[n] >= 0) add_row(rows + n * dim, dim, totals + slots[n] * dim);
  }
}

template <class W>
void add_pull(const W* x, const W* q, W weight, int64_t dim, double* total) {
  typename Eight<W>::Vector a, b;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    load(x + d, a);
    load(q + d, b);
    b = weight * (b - a);
    store(total + d, load_wide(total + d) + widen(b));
  }
  for (; d < dim; ++d) total[d] += weight * (q[d] - x[d]);
}

template <class W>
void divide_by_length(W* row, int64_t dim) {
  Doubles sum;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    const Doubles a = load_wide(row + d);
    sum += a * a;
  }
  double square = add_lanes(sum);
  for (; d < dim; ++d) square += static_cast<double>(row[d]) * row[d];
  const double norm = std::sqrt(square), inverse = 1.0 / (norm > 1e-12 ? norm : 1e-12);
  for (d = 0; d + LANES <= dim; d += LANES) store_narrow(row + d, inverse * load_wide(row + d));
  for (; d < dim; ++d) row[d] = static_cast<W>(row[d] * inverse);
}

// Eight flags at a time.
VQ_INLINE bool any_of_eight(const bool* flags) {
  uint64_t bytes;
  __builtin_memcpy(&bytes, flags, sizeof(bytes));
  return bytes != 0;
}

template <class W>
VQ_INLINE double learn_size(const EmaStep& step, W counts, bool revived, W& size) {
  size = static_cast<W>(revived ? step.revived_size : step.decay * size + (1.0 - step.decay) * counts);
  return size;
}

template <class W>
double learn_sizes(const EmaStep& step, const W* counts, const bool* revive, int64_t count, W* sizes) {
  const double decay = step.decay, gain = 1.0 - decay;
  Doubles total;
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) {
    if (revive != nullptr && any_of_eight(revive + k)) {
      for (int64_t i = k; i < k + LANES; ++i) learn_size(step, counts[i], revive[i], sizes[i]);
    } else {
      store_narrow(sizes + k, decay * load_wide(sizes + k) + gain * load_wide(counts + k));
    }
    total += load_wide(sizes + k);
  }
  double sum = add_lanes(total);
  for (; k < count; ++k) sum += learn_size(step, counts[k], revive != nullptr && revive[k], sizes[k]);
  return sum;
}

// 1 / the smoothed size; a finite number, so that a code without any tokens stays at zero.
template <class W>
VQ_INLINE W inverse_of(const EmaStep& step, W size) {
  const double inverse = step.preserve / (size + step.eps);
  constexpr double MOST = std::numeric_limits<W>::max();
  return static_cast<W>(inverse > MOST ? MOST : inverse);
}

template <class W>
VQ_INLINE void learn_eight(const EmaRow<W>& step, const Doubles& value, W* embed, W* code) {
  typename Eight<W>::Vector rounded;
  narrow(value, rounded);
  store(embed, rounded);
  store(code, step.inverse * rounded);
}

// SUMMED: with `sum`; else it is null, and zero.
template <bool SUMMED, class W>
VQ_INLINE void learn_row(const EmaRow<W>& step, const W* sum, int64_t dim, W* embed, W* code) {
  const auto learned = [&](int64_t d) VQ_ALWAYS {
    const Doubles was = load_wide(embed + d);
    if constexpr (SUMMED) return step.decay * was + step.gain * load_wide(sum + d);
    return step.decay * was;
  };
  if (dim < LANES) {
    for (int64_t d = 0; d < dim; ++d) {
      embed[d] = static_cast<W>(step.decay * embed[d] + (SUMMED ? step.gain * sum[d] : 0.0));
      code[d] = embed[d] * step.inverse;
    }
    return;
  }
  const int64_t end = dim - LANES;  // the last eight overlap the ones before: read before those are written
  const Doubles last = learned(end);
  for (int64_t d = 0; d < end; d += LANES) learn_eight<W>(step, learned(d), embed + d, code + d);
  learn_eight<W>(step, last, embed + end, code + end);
}

template <class W>
VQ_INLINE EmaRow<W> row_of(const EmaStep& step, W size) {
  return {step.decay, 1.0 - step.decay, inverse_of(step, size)};
}

template <class W>
void learn_rows(const EmaStep& step, const W* sizes, W* counts, W* sums, int64_t first, int64_t end,
                int64_t dim, W* embed, W* codebook) {
  for (int64_t k = first; k < end; ++k) {
    const EmaRow<W> row = row_of(step, sizes[k]);
    W* code = codebook + k * dim;
    const bool counted = counts == nullptr || counts[k] != W(0);
    if (counted) {
      learn_row<true, W>(row, sums + k * dim, dim, embed + k * dim, code);
    } else {
      learn_row<false, W>(row, nullptr, dim, embed + k * dim, code);
    }
    if (step.normalize) divide_by_length(code, dim);
    if (counts == nullptr || !counted) continue;
    counts[k] = W(0);
    for (int64_t d = k * dim; d < (k + 1) * dim; ++d) sums[d] = W(0);
  }
}

// The same with the sums of `tokens` of codes [first, end), which are made where they are used; group `g` is
// the first of a code not below `first`.
template <class W>
void learn_codes(const EmaStep& step, const W* sizes, const W* rows, int64_t stride, const CodeTokens& tokens,
                 int64_t g, int64_t first, int64_t end, int64_t dim, double* total, W* sum, W* embed,
                 W* codebook) {
  CodeSums<W> sums(rows, stride, dim, tokens, g, total);
  for (int64_t k = first; k < end; ++k) {
    const EmaRow<W> row = row_of(step, sizes[k]);
    W* code = codebook + k * dim;
    const bool found = g < tokens.used && tokens.code_of(g) == k;
    if (found && tokens.size_of(g) > 0) {
      learn_row<true, W>(row, sums.row_or_sum(g, sum), dim, embed + k * dim, code);
    } else {
      learn_row<false, W>(row, nullptr, dim, embed + k * dim, code);
    }
    g += found;
    if (step.normalize) divide_by_length(code, dim);
  }
}

template <class W>
constexpr TrainingLoops<W> make_loops() {
  return {copy_code<W>, straight_through<W>, rotation<W>,   add_rows<W>,    sum_codes<W>,  add_row<W>,
          put_sum<W>,   add_pull<W>,         learn_rows<W>, learn_codes<W>, learn_sizes<W>};
}

constexpr TrainingTable TRAINING{make_loops<float>(), make_loops<double>()};

#undef VQ_INLINE
#undef VQ_ALWAYS

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
