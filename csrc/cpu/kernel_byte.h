// The byte pass: a number is one byte. AVX2 multiplies bytes half as fast again as numbers of 16 bits; what
// they cannot tell apart, a finer pass decides (coarse_search.h).
//
// A token X = x - mu is rounded to X^ = round(a X), where a is its own, and stored as X^ + OFFSET, without a
// sign, as the instruction wants one of its operands; a code C = c - mu to C^ = round(b C), where b is a
// panel's. Sums of 32 bits begin at -OFFSET sum C^. The score h - X.C is then |C|^2 / 2 - X^.C^ / ab, in
// float32.
//
// X^ has 8 bits with AVX512's VNNI. AVX2 sums four products in 16 bits: there X^ has 7, and b keeps every
// four |C^| that meet so small that their products fit.
//
// A tile is [ROWS, steps] words of four dimensions, then [ROWS] factors -1/a. A panel is [WIDTH] beginnings,
// [WIDTH] biases, a line that begins with 1/b, then [steps, WIDTH] words.
#pragma once

#include "kernel_scores.h"
#include "strips.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr float LARGEST_BYTE = 127.0f;

// P: floats, as for kernel_scores.h, with multiply_add(Vector, float, Vector). M: Vector (of 32-bit lanes, as
// many as P's), ROWS, OFFSET, LARGEST_SUM (of four codes' numbers), load, broadcast, to_floats, first(v),
// renew(v), and of an object add(sum, tokens, more_tokens, codes, more_codes): the products of eight
// dimensions, four of each.
template <class P, class M>
struct Byte {
  using Vector = typename P::Vector;
  using Integers = typename M::Vector;
  using Rows = Scores<P>;
  static constexpr int ROWS = M::ROWS, LANES = P::LANES, VECTORS = P::VECTORS, WIDTH = VECTORS * LANES;
  static constexpr int64_t HEAD = 2 * WIDTH + STRIP;  // words of a panel before its codes
  static constexpr int64_t WORD_DIM = 4;              // dimensions of a word; two words are added at a time
  static constexpr float LARGEST_TOKEN = M::OFFSET - 1;
  static_assert(WIDTH % STRIP == 0);

  static int64_t steps(int64_t dim) { return (dim + 2 * WORD_DIM - 1) / (2 * WORD_DIM) * 2; }
  static int64_t tile_words(int64_t dim) { return (ROWS * (steps(dim) + 1) + STRIP - 1) / STRIP * STRIP; }
  static int64_t panel_words(int64_t dim) { return HEAD + steps(dim) * WIDTH; }

  // ---------------------------------------------------------------------------------------------- packing

  // Of a strip the sums of those |values| that meet in 16 bits: two neighbours, and the two four further.
  static FloatStrip sums_of_four(const FloatStrip& strip) {
    const FloatStrip values = absolute(strip), pairs = values + swapped<1>(values);
    return pairs + swapped<4>(pairs);
  }

  static void pack_panel(const float* const* codes,    // [WIDTH] of [D]
                         const double* inverse_norms,  // [WIDTH] or null
                         const Packing& packing,
                         void* panel,  // [panel_words]
                         CodeBound* bound) {
    constexpr int64_t WORDS = STRIP, DIM = WORDS * WORD_DIM;  // of a code at a time
    const auto strip_of = [&](int code, int64_t d) {
      return code_strip(codes, inverse_norms, code, packing, d);
    };
    int32_t* starts = static_cast<int32_t*>(panel);
    float* biases = static_cast<float*>(panel) + WIDTH;
    FloatStrip most{}, most_of_four{};
    const float largest = measure_panel<WIDTH>(strip_of, packing, biases, [&](const FloatStrip& strip) {
      most = larger(most, absolute(strip));
      most_of_four = larger(most_of_four, sums_of_four(strip));
    });
    const float of_one = integer_factor(largest_of(most), LARGEST_BYTE);
    const float of_four = integer_factor(largest_of(most_of_four), M::LARGEST_SUM - 2.5f);  // rounding adds 2
    const float factor = of_one < of_four ? of_one : of_four;
    const double inverse = 1.0 / factor;
    for (int i = 0; i < STRIP; ++i) biases[WIDTH + i] = i == 0 ? static_cast<float>(inverse) : 0.0f;
    int32_t* out = static_cast<int32_t*>(panel) + HEAD;
    const int64_t words = steps(packing.dim);
    float residual = 0.0f;
    for (int first = 0; first < WIDTH; first += STRIP) {
      FloatStrip residuals[STRIP] = {};
      IntStrip totals[STRIP] = {};
      for (int64_t base = 0; base < words; base += WORDS) {
        IntStrip rows[STRIP] = {};  // of a code each, then of four dimensions
        for (int j = 0; j < STRIP; ++j) {
          const int64_t begin = base * WORD_DIM;
          for (int64_t d = begin; d < begin + DIM && d < packing.dim; d += STRIP) {
            const FloatStrip value = strip_of(first + j, d) * factor;
            const FloatStrip rounded = rounded_strip(value), left = value - rounded;
            const IntStrip whole = integers_of(rounded);
            const ByteStrip bytes = bytes_of(shorts_of(whole));
            __builtin_memcpy(reinterpret_cast<char*>(&rows[j]) + (d - begin), &bytes, sizeof(bytes));
            residuals[j] += left * left;
            totals[j] += whole;
          }
        }
        transpose(rows);
        const int64_t end = words - base < WORDS ? words - base : WORDS;
        for (int64_t i = 0; i < end; ++i) store_vector(out + (base + i) * WIDTH + first, rows[i]);
      }
      for (int j = 0; j < STRIP; ++j) {
        const float left = sum_of(residuals[j]);
        residual = left > residual ? left : residual;
        int32_t parts[STRIP], total = 0;
        store_vector(parts, totals[j]);
        for (int i = 0; i < STRIP; ++i) total += parts[i];
        starts[first + j] = -M::OFFSET * total;
      }
    }
    raise_bound(packing, largest, residual, inverse, bound);
  }

  static void pack_token(const float* token,  // [D]
                         const Packing& packing, double norm, double /*largest*/, int row,
                         void* tile,  // [tile_words]
                         TokenBound* bound) {
    FloatStrip residuals{};
    const float factor = integer_factor(largest_of(token, packing), LARGEST_TOKEN);
    const double inverse = 1.0 / factor;
    const int64_t words = steps(packing.dim), bytes = words * WORD_DIM;
    char* out = static_cast<char*>(tile) + row * bytes;
    for (int64_t d = 0; d < packing.dim; d += STRIP) {
      const FloatStrip value = packed_strip(token, packing, d) * factor;
      const FloatStrip rounded = rounded_strip(value), left = value - rounded;
      const ByteStrip strip = bytes_of(shorts_of(integers_of(rounded + static_cast<float>(M::OFFSET))));
      __builtin_memcpy(out + d, &strip, bytes - d < STRIP ? bytes - d : STRIP);
      residuals += left * left;
    }
    static_cast<float*>(tile)[ROWS * words + row] = static_cast<float>(-inverse);
    const double left = norm_of(sum_of(residuals)) * inverse + ROUNDING * norm + NOTHING;
    *bound = {1.0, norm + left, left + SCORE_ROUNDING * (norm + left), 0.0, 0.0};
  }

  // ---------------------------------------------------------------------------------------------- scores

  using Sums = Integers[ROWS][VECTORS];

  // Two words of the tile's tokens and the panel's codes.
  static inline __attribute__((always_inline)) void add_words(
      const int32_t* tile,   // [ROWS, steps], at their column
      int64_t words,         // steps
      const int32_t* panel,  // [2, WIDTH]
      const M& multiply, Sums& sums) {
    Integers codes[2][VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      codes[0][v] = M::load(panel + v * LANES);
      codes[1][v] = M::load(panel + WIDTH + v * LANES);
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      const Integers tokens = M::broadcast(tile[row * words]), more = M::broadcast(tile[row * words + 1]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) multiply.add(sums[row][v], tokens, more, codes[0][v], codes[1][v]);
    }
  }

  static constexpr int64_t LINE = 64;  // bytes
  static int64_t fetched_bytes(int64_t count, int64_t dim) { return count * (steps(dim) / 2) * LINE; }

  // FOLD: of the scores of every lane only the least. FETCH: a line of the next panels for two words.
  template <bool FOLD, bool FETCH>
  static void sweep(const int32_t* tile, const int32_t* panels, int64_t count, int64_t dim, int64_t group,
                    float* scores, int64_t stride, const char* next) {
    const int64_t words = steps(dim), size = panel_words(dim);
    const float* factors = reinterpret_cast<const float*>(tile + ROWS * words);
    const M multiply;
    int64_t grouped = 0;
    for (int64_t number = 0; number < count; ++number, panels += size) {
      const float* biases = reinterpret_cast<const float*>(panels + WIDTH);
      const int32_t* codes = panels + HEAD;
      Sums sums;
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const Integers start = M::load(panels + v * LANES);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) sums[row][v] = start;
      }
#pragma GCC unroll 1
      for (int64_t word = 0; word < words; word += 2, codes += 2 * WIDTH) {
        add_words(tile + word, words, codes, multiply, sums);
        if constexpr (FETCH) {
          __builtin_prefetch(next, 0, 2);
          next += LINE;
        }
      }
      const float inverse = biases[WIDTH];
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        float* out = scores + row * stride;
        Vector made[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          made[v] = P::multiply_add(M::to_floats(sums[row][v]), factors[row] * inverse,
                                    P::load(biases + v * LANES));
        }
        if constexpr (FOLD) {
          Vector least = made[0];
#pragma GCC unroll 4
          for (int v = 1; v < VECTORS; ++v) least = P::minimum(least, made[v]);
          if (grouped > 0) least = P::minimum(least, P::load(out));
          P::store(out, least);
        } else {
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) P::store(out + v * LANES, made[v]);
        }
      }
      if (FOLD && ++grouped < group) continue;
      grouped = 0;
      scores += FOLD ? LANES : WIDTH;
    }
  }

  static void score_panels(const void* tile, const void* panels, int64_t count, int64_t dim, int64_t group,
                           void* granule_scores, double* least, const void* next) {
    float* out = static_cast<float*>(granule_scores);
    const int64_t granules = group == 0 ? count * WIDTH : (count + group - 1) / group * LANES;
    const auto run = next != nullptr ? (group == 0 ? sweep<false, true> : sweep<true, true>)
                                     : (group == 0 ? sweep<false, false> : sweep<true, false>);
    run(static_cast<const int32_t*>(tile), static_cast<const int32_t*>(panels), count, dim, group, out,
        granules, static_cast<const char*>(next));
    for (int row = 0; row < ROWS; ++row) least[row] = Rows::least_of(out + row * granules, granules);
  }

  static double run_peak(int64_t rounds) {
    volatile int32_t nothing = 0;  // which the compiler may not know
    const M multiply;
    Integers token = M::broadcast(nothing);
    Sums sums;
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[row][v] = M::broadcast(nothing);
    }
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          M::renew(token);  // or the same products would be made once
          multiply.add(sums[row][v], token, token, token, token);
        }
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) nothing = M::first(sums[row][v]);
    }
    return 2.0 * 2 * WORD_DIM * LANES * ROWS * VECTORS * static_cast<double>(rounds);
  }

  static constexpr CoarsePass make_pass() {
    return {"byte",        sizeof(float), ROWS,       LANES,       VECTORS,
            0x1p120,       steps,         tile_words, panel_words, score_panels,
            fetched_bytes, nullptr,       nullptr,    nullptr,     Rows::find_scores,
            pack_panel,    pack_token,    run_peak};
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
