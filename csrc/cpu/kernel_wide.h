// Packing for the float32 and float64 passes, and the float64 reductions, in plain C++ that the compiler
// vectorises for the including unit. What kernel_scores.h says of the standard library holds here too.
#pragma once

#include "kernel_scores.h"
#include "strips.h"

namespace vqkernels {
namespace cpu {
namespace {

void measure_rows(const float* rows,  // [count, D]
                  int64_t count, const Packing& packing,
                  float* squares) {  // [count]
  for (int64_t k = 0; k < count; ++k) {
    FloatStrip sum{};
    for (int64_t d = 0; d < packing.dim; d += STRIP) {
      const FloatStrip value = packed_strip(rows + k * packing.dim, packing, d);
      sum += value * value;
    }
    squares[k] = sum_of(sum);
  }
}

// A sum of products of 32-bit halves, each moved by a random key (the universal family NH of Black et al.,
// "UMAC: Fast and Secure Message Authentication", CRYPTO 1999), twice, the second time with the keys of the
// words after (its Toeplitz construction), in eight lanes. Keys must be unrelated to each other: on evenly
// spaced ones, sign flips in a column cancel.
//
// U::Words is a vector of uint64_t that is a register of the unit's, and U::product_of_halves multiplies the
// two 32-bit halves of each. On wider vectors, and left to multiply all 64 bits, GCC 12 makes 1.5 GB/s of it
// for AVX2.
template <class U>
void hash_words(const uint64_t* words,  // [count]
                int64_t count,
                const uint64_t* keys,  // [count rounded up to 8, and 8]
                uint64_t* sums) {      // [16]
  using Words = typename U::Words;
  constexpr int LANES = sizeof(Words) / sizeof(uint64_t), PARTS = 8 / LANES;
  constexpr int64_t AHEAD = 512;  // words: a page, for the processor's own fetching ends with each
  Words first[PARTS] = {}, second[PARTS] = {};
  const auto add = [&](const uint64_t* eight, int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) {
      const uint64_t* key = keys + i + part * LANES;
      const Words word = load_vector<Words>(eight + part * LANES);
      first[part] += U::product_of_halves(word + load_vector<Words>(key));
      second[part] += U::product_of_halves(word + load_vector<Words>(key + 8));
    }
  };
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __builtin_prefetch(words + i + AHEAD);
    add(words + i, i);
  }
  if (i < count) {
    uint64_t last[8] = {};
    __builtin_memcpy(last, words + i, sizeof(uint64_t) * (count - i));  // may lie at any float's address
    add(last, i);
  }
  __builtin_memcpy(sums, first, sizeof(first));
  __builtin_memcpy(sums + 8, second, sizeof(second));
}

template <class Word>
inline Word packed_value(const float* row, const Packing& packing, int64_t d) {
  return (static_cast<Word>(row[d]) - static_cast<Word>(packing.centre[d])) * packing.scale * packing.scale2;
}

// The error of h - x.c, computed in words of unit roundoff u, in units of u (|c|^2/2 + |x||c|): D for the
// additions, 1 for products that are not fused, 2 for the rounding of x and c, 1 for that of h and 2 for what
// rounding c does to h; 4 to spare and 2% for the second order, which holds while their sum is below 2^-6. In
// float64 the sums for h, and the norms that cosine divides by, count as well: another D. Entries or products
// below the smallest normal number come on top.
template <class Word>
struct Rounding;
template <>
struct Rounding<float> {
  static constexpr double unit = UNIT32, smallest = 0x1p-120;
};
template <>
struct Rounding<double> {
  static constexpr double unit = 0x1p-53, smallest = 0x1p-1000;
};

template <class Word>
inline double relative_error(int64_t dim) {
  const int64_t terms = sizeof(Word) == sizeof(double) ? 2 * dim + 20 : dim + 10;
  const double error = 1.02 * static_cast<double>(terms) * Rounding<Word>::unit;
  return error > 0x1p-6 ? __builtin_inf() : error;
}

template <class P>
void pack_wide_panel(const float* const* codes,    // [WIDTH] of [D]
                     const double* inverse_norms,  // [WIDTH] or null
                     const Packing& packing,
                     void* panel,  // [1 + D, WIDTH]
                     CodeBound* bound) {
  using Word = typename P::Word;
  constexpr int WIDTH = Scores<P>::WIDTH;
  Word* out = static_cast<Word*>(panel);
  double squares[WIDTH] = {};
  Word strip[WIDTH][STRIP] = {};
  for (int64_t base = 0; base < packing.dim; base += STRIP) {
    const int64_t width = packing.dim - base < STRIP ? packing.dim - base : STRIP;
    for (int j = 0; j < WIDTH; ++j) {
      for (int64_t i = 0; i < width && inverse_norms == nullptr; ++i) {
        strip[j][i] = packed_value<Word>(codes[j], packing, base + i);
      }
      for (int64_t i = 0; i < width && inverse_norms != nullptr; ++i) {
        strip[j][i] = static_cast<Word>(static_cast<double>(codes[j][base + i]) * inverse_norms[j]);
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      Word* row = out + (1 + base + i) * WIDTH;
      for (int j = 0; j < WIDTH; ++j) row[j] = strip[j][i];
      for (int j = 0; j < WIDTH; ++j) squares[j] += static_cast<double>(row[j]) * row[j];
    }
  }
  double largest = bound->largest * bound->largest;
  for (int j = 0; j < WIDTH; ++j) {
    out[j] = packing.cosine ? Word(0) : static_cast<Word>(0.5 * squares[j]);
    largest = squares[j] > largest ? squares[j] : largest;
  }
  const double relative = relative_error<Word>(packing.dim);
  const double underflow = static_cast<double>(packing.dim) * Rounding<Word>::smallest;
  const double norm = __builtin_sqrt(largest) * (1.0 + 1e-12);
  const double half_square = packing.cosine ? 0.0 : 0.5 * largest;
  *bound = {norm, underflow, relative * half_square + underflow * (1.0 + norm), 0.0};
}

template <class P>
void pack_wide_token(const float* token,  // [D]
                     const Packing& packing, double /*norm*/, double /*largest*/, int row,
                     void* tile,  // [ROWS, D] and one
                     TokenBound* bound) {
  using Word = typename P::Word;
  constexpr int CHAINS = 8;
  Word* out = static_cast<Word*>(tile) + row * packing.dim;
  static_cast<Word*>(tile)[P::ROWS * packing.dim] = 0;
  double parts[CHAINS] = {}, square = 0.0;
  int64_t d = 0;
  for (; d + CHAINS <= packing.dim; d += CHAINS) {
    for (int i = 0; i < CHAINS; ++i) {
      const Word value = packed_value<Word>(token, packing, d + i);
      out[d + i] = value;
      parts[i] += static_cast<double>(value) * value;
    }
  }
  for (; d < packing.dim; ++d) {
    out[d] = packed_value<Word>(token, packing, d);
    square += static_cast<double>(out[d]) * out[d];
  }
  for (int i = 0; i < CHAINS; ++i) square += parts[i];
  const double norm = __builtin_sqrt(square) * (1.0 + 1e-12);
  const double residual =
      relative_error<Word>(packing.dim) * norm + static_cast<double>(packing.dim) * Rounding<Word>::smallest;
  *bound = {1.0, norm, residual, 0.0, 0.0};
}

// Eight numbers as float64. The unit's own conversion where it has one: GCC 12 makes two halves of what it
// converts to 64 bytes.
template <class U, class Code, class Wide = DoubleHalf>
inline Wide load_wide(const Code* p) {
  if constexpr (sizeof(Code) == sizeof(double)) {
    return load_vector<Wide>(p);
  } else if constexpr (requires { typename U::Narrow; }) {
    return (Wide)U::widen(load_vector<typename U::Narrow>(p));
  } else if constexpr (requires { typename Wide::Part; }) {
    typedef Code Narrow __attribute__((vector_size(Wide::LANES * sizeof(Code))));
    return Wide::make([&](int i) {
      return __builtin_convertvector(load_vector<Narrow>(p + i * Wide::LANES), typename Wide::Part);
    });
  } else {
    typedef Code Narrow __attribute__((vector_size(sizeof(Wide) / sizeof(double) * sizeof(Code))));
    return __builtin_convertvector(load_vector<Narrow>(p), Wide);
  }
}

template <class U, class Code>
inline DoubleHalf load_wide_part(const Code* p, int64_t width) {
  return load_wide<U>(Padded<sizeof(DoubleHalf) / sizeof(double), Code>(p, width).values);
}

template <bool DIFFERENCE>
inline DoubleHalf term(DoubleHalf x, DoubleHalf c) {
  const DoubleHalf difference = x - c;
  return DIFFERENCE ? difference * difference : x * c;
}

// sum_d (x - c)^2, or sum_d x * c, of COUNT codes side by side.
template <class U, class Code, bool DIFFERENCE, int COUNT>
inline void reduce_together(const Code* x, const Code* const (&codes)[COUNT], int64_t dim, double* out) {
  constexpr int64_t HALF = 8;
  DoubleHalf sums[COUNT];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) sums[i] = DoubleHalf{};
  int64_t d = 0;
  for (; d + HALF <= dim; d += HALF) {
    const DoubleHalf token = load_wide<U>(x + d);
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) sums[i] += term<DIFFERENCE>(token, load_wide<U>(codes[i] + d));
  }
  if (d < dim) {
    const DoubleHalf token = load_wide_part<U>(x + d, dim - d);
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i)
      sums[i] += term<DIFFERENCE>(token, load_wide_part<U>(codes[i] + d, dim - d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) out[i] = sum_of(sums[i]);
}

template <class U, class Code, bool DIFFERENCE>
void reduce_rows(const Code* x,          // [D]
                 const Code* rows,       // [K, D]
                 const int64_t* chosen,  // [count], or null for the first `count`
                 int64_t count, int64_t dim,
                 double* out) {  // [count]
  const auto row = [&](int64_t i) { return rows + (chosen == nullptr ? i : chosen[i]) * dim; };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const Code* const codes[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
    reduce_together<U, Code, DIFFERENCE, 4>(x, codes, dim, out + i);
  }
  for (; i < count; ++i) {
    const Code* const code[1] = {row(i)};
    reduce_together<U, Code, DIFFERENCE, 1>(x, code, dim, out + i);
  }
}

// sum_d (x - c)^2 in float32, of COUNT codes side by side.
template <int COUNT>
inline void float_distances_together(const float* x, const float* const (&codes)[COUNT], int64_t dim,
                                     const float* end, float* out) {
  FloatStrip sums[COUNT] = {};
  for (int64_t d = 0; d < dim; d += STRIP) {
    const FloatStrip token = load_strip(x + d, dim - d, x + dim);
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
      const FloatStrip difference = token - load_strip(codes[i] + d, dim - d, end);
      sums[i] += difference * difference;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) out[i] = sum_of(sums[i]);
}

inline void float_distances(const float* x, const float* rows, int64_t size, const int64_t* chosen,
                            int64_t count, int64_t dim, float* out) {
  const float* end = rows + size * dim;
  const auto row = [&](int64_t i) { return rows + chosen[i] * dim; };
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    const float* const codes[2] = {row(i), row(i + 1)};
    float_distances_together<2>(x, codes, dim, end, out + i);
  }
  if (i < count) {
    const float* const code[1] = {row(i)};
    float_distances_together<1>(x, code, dim, end, out + i);
  }
}

template <class P>
constexpr CoarsePass make_wide_pass(const char* name, double largest_score) {
  return Scores<P>::make_pass(name, largest_score, pack_wide_panel<P>, pack_wide_token<P>);
}

template <class U>
constexpr KernelTable make_table(const char* name, const CoarsePass* float32, const CoarsePass* float64,
                                 const CoarsePass* int16, const CoarsePass* byte, bool byte_is_quicker) {
  return {name,
          float32,
          float64,
          int16,
          nullptr,
          byte,
          byte_is_quicker,
          measure_rows,
          hash_words<U>,
          float_distances,
          reduce_rows<U, float, true>,
          reduce_rows<U, double, true>,
          reduce_rows<U, float, false>,
          reduce_rows<U, double, false>};
}

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
