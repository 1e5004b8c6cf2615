// The loops of training_table.h in the compiler's own vectors of eight numbers; included once by every unit,
// inside its choice of instructions.
#pragma once

#include <cmath>
#include <cstdint>

#include "training_table.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t LANES = 8;
typedef double Doubles __attribute__((vector_size(64)));

template <class W>
struct Eight;
template <>
struct Eight<float> {
  typedef float Vector __attribute__((vector_size(32)));
};
template <>
struct Eight<double> {
  typedef Doubles Vector;
};

#define VQ_INLINE inline __attribute__((always_inline))

template <class W>
VQ_INLINE void load(const W* from, typename Eight<W>::Vector& to) {
  __builtin_memcpy(&to, from, sizeof(to));
}
template <class W>
VQ_INLINE void store(W* to, const typename Eight<W>::Vector& from) {
  __builtin_memcpy(to, &from, sizeof(from));
}
template <class W>
VQ_INLINE void load_wide(const W* from, Doubles& to) {
  typename Eight<W>::Vector narrow;
  load(from, narrow);
  to = __builtin_convertvector(narrow, Doubles);
}
template <class W>
VQ_INLINE void store_narrow(W* to, const Doubles& from) {
  const typename Eight<W>::Vector narrow = __builtin_convertvector(from, typename Eight<W>::Vector);
  store(to, narrow);
}
template <class Vector>
VQ_INLINE auto add_lanes(const Vector& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

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
  Doubles xx = {}, qq = {}, xq = {}, gx = {}, gq = {}, a, b, c;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    load_wide(x + d, a);
    load_wide(q + d, b);
    load_wide(g + d, c);
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
  Doubles a, b, c;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    load_wide(x + d, a);
    load_wide(q + d, b);
    load_wide(g + d, c);
    c = (scale * c + (along_x * a + along_q * b)) + wide_pull * (a - b);
    store_narrow(dx + d, c);
  }
  for (; d < dim; ++d) {
    const double e = x[d], r = q[d];
    dx[d] = static_cast<W>((scale * g[d] + (along_x * e + along_q * r)) + wide_pull * (e - r));
  }
}

template <class W>
VQ_INLINE void add_one_row(const W* row, int64_t dim, double* total) {
  Doubles sum, a;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    load(total + d, sum);
    load_wide(row + d, a);
    sum += a;
    store(total + d, sum);
  }
  for (; d < dim; ++d) total[d] += row[d];
}

template <class W>
void add_row(const W* row, int64_t dim, double* total) {
  add_one_row(row, dim, total);
}

template <class W>
void put_sum(const double* total, int64_t dim, bool adds, W* out) {
  typename Eight<W>::Vector old;
  Doubles sum;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    load(total + d, sum);
    typename Eight<W>::Vector fresh = __builtin_convertvector(sum, typename Eight<W>::Vector);
    if (adds) {
      load(out + d, old);
      fresh += old;
    }
    store(out + d, fresh);
  }
  for (; d < dim; ++d) out[d] = adds ? out[d] + static_cast<W>(total[d]) : static_cast<W>(total[d]);
}

// A sum of one row is that row.
template <class W>
VQ_INLINE void put_row(const W* row, int64_t dim, bool adds, W* out) {
  typename Eight<W>::Vector fresh, old;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    load(row + d, fresh);
    if (adds) {
      load(out + d, old);
      fresh += old;
    }
    store(out + d, fresh);
  }
  for (; d < dim; ++d) out[d] = adds ? out[d] + row[d] : row[d];
}

constexpr int64_t AHEAD = 6;  // rows lie anywhere in memory, and the processor would not guess them

template <class W>
VQ_INLINE void fetch_row(const W* row, int64_t dim) {
  constexpr int64_t PER_LINE = 64 / sizeof(W);
  for (int64_t d = 0; d < dim; d += PER_LINE) __builtin_prefetch(row + d);
}

template <class W>
void sum_rows(const W* rows, int64_t stride, const int64_t* order, int64_t count, int64_t left, int64_t dim,
              double* total, bool adds, W* out) {
  if (AHEAD < left) fetch_row(rows + order[AHEAD] * stride, dim);
  if (count == 1) return put_row(rows + order[0] * stride, dim, adds, out);
  for (int64_t d = 0; d < dim; ++d) total[d] = rows[order[0] * stride + d];
  for (int64_t i = 1; i < count; ++i) {
    if (i + AHEAD < left) fetch_row(rows + order[i + AHEAD] * stride, dim);
    add_one_row(rows + order[i] * stride, dim, total);
  }
  put_sum(total, dim, adds, out);
}

template <class W>
void add_rows(const W* rows, const int64_t* slots, int64_t count, int64_t dim, double* totals) {
  for (int64_t n = 0; n < count; ++n) {
    if (slots[n] >= 0) add_one_row(rows + n * dim, dim, totals + slots[n] * dim);
  }
}

template <class W>
void add_pull(const W* x, const W* q, W weight, int64_t dim, double* total) {
  typename Eight<W>::Vector a, b;
  Doubles sum;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    load(total + d, sum);
    load(x + d, a);
    load(q + d, b);
    b = weight * (b - a);
    sum += __builtin_convertvector(b, Doubles);
    store(total + d, sum);
  }
  for (; d < dim; ++d) total[d] += weight * (q[d] - x[d]);
}

template <class W>
void divide_by_length(W* row, int64_t dim) {
  Doubles sum = {}, a;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    load_wide(row + d, a);
    sum += a * a;
  }
  double square = add_lanes(sum);
  for (; d < dim; ++d) square += static_cast<double>(row[d]) * row[d];
  const double norm = std::sqrt(square), inverse = 1.0 / (norm > 1e-12 ? norm : 1e-12);
  for (d = 0; d + LANES <= dim; d += LANES) {
    load_wide(row + d, a);
    a *= inverse;
    store_narrow(row + d, a);
  }
  for (; d < dim; ++d) row[d] = static_cast<W>(row[d] * inverse);
}

template <class W>
VQ_INLINE void learn_eight(const EmaRow& step, const typename Eight<W>::Vector& was,
                           const typename Eight<W>::Vector& sum, W* embed, W* code) {
  Doubles value = __builtin_convertvector(was, Doubles);
  value = step.decay * value + step.gain * __builtin_convertvector(sum, Doubles);
  const typename Eight<W>::Vector rounded = __builtin_convertvector(value, typename Eight<W>::Vector);
  store(embed, rounded);
  store_narrow(code, __builtin_convertvector(rounded, Doubles) * step.inverse);
}

template <class W>
void learn_row(const EmaRow& step, const W* sum, int64_t dim, W* embed, W* code) {
  typename Eight<W>::Vector was, fresh = {}, last = {}, last_sum = {};
  const int64_t end = dim - LANES;  // the last eight overlap the ones before: read before those are written
  if (end >= 0) load(embed + end, last);
  if (end >= 0 && sum != nullptr) load(sum + end, last_sum);
  int64_t d = 0;
  for (; d < end; d += LANES) {
    load(embed + d, was);
    if (sum != nullptr) load(sum + d, fresh);
    learn_eight<W>(step, was, fresh, embed + d, code + d);
  }
  if (end >= 0) learn_eight<W>(step, last, last_sum, embed + end, code + end);
  for (; end < 0 && d < dim; ++d) {
    embed[d] = static_cast<W>(step.decay * embed[d] + step.gain * (sum != nullptr ? sum[d] : W(0)));
    code[d] = static_cast<W>(embed[d] * step.inverse);
  }
  if (step.normalize) divide_by_length(code, dim);
}

template <class W>
constexpr TrainingLoops<W> make_loops() {
  return {copy_code<W>, straight_through<W>, rotation<W>, add_rows<W>, sum_rows<W>,
          add_row<W>,   put_sum<W>,          add_pull<W>, learn_row<W>};
}

constexpr TrainingTable TRAINING{make_loops<float>(), make_loops<double>()};

#undef VQ_INLINE

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
