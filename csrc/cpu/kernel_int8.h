// The int8 pass: integers of 15 bits as two bytes each, multiplied on tiles of 16 x 64 bytes, where a CPU has
// them (Intel's AMX): three products of bytes for one of the integers, still 3.4 times as many as
// vpdpwssd's (512 codes of 256 dimensions against one core of a Sapphire Rapids).
//
// A token X = a (x - mu) and a code C = b (c - mu) are rounded to integers 128 h + l, where h and l are
// bytes, a is a token's own and b a panel's. Then X.C = 128 (128 hh' + hl' + lh') + ll', sums of int32 that
// cannot overflow up to LARGEST_INT8_DIM; ll' is left out, and bounded by norms as what rounding leaves is.
// With t for the sum in brackets the score h - x.c is |C|^2 / 2b^2 - 128 t / ab, in float32.
//
// A tile of tokens is two halves of 16 rows, each [k, 2, 64] bytes: of every 64 dimensions the high bytes,
// then the low. A panel is [64] biases, a line that begins with 128 / b, then [4, k, 2, 16, 16] words: of 16
// codes and 64 dimensions the high bytes of four dimensions a word, then the low.
#pragma once

#include "kernel_scores.h"
#include "strips.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t TILE_DIM = 64;  // dimensions of a tile
constexpr int TILE_ROWS = 16;     // of tokens, or codes
// 127 * 128: its bytes, and those of a number that rounds to it, fit.
constexpr float LARGEST_INTEGER = 16256;

struct HighAndLow {
  ByteStrip high, low;
  FloatStrip residual;  // squared
  FloatStrip low_square;
};

inline HighAndLow high_and_low(FloatStrip strip, float factor) {
  const FloatStrip value = strip * factor;
  const FloatStrip rounded = rounded_strip(value);
  const FloatStrip left = value - rounded;
  const IntStrip whole = __builtin_convertvector(rounded, IntStrip);
  const IntStrip high = (whole + 64) >> 7;
  const IntStrip low = whole - (high << 7);
  const FloatStrip low_value = __builtin_convertvector(low, FloatStrip);
  return {__builtin_convertvector(high, ByteStrip), __builtin_convertvector(low, ByteStrip), left * left,
          low_value * low_value};
}

// P: sixteen floats, as for kernel_scores.h, with columns. T: eight tiles.
template <class P, class T>
struct Int8 {
  using Vector = typename P::Vector;
  using Rows = Scores<P>;
  static constexpr int ROWS = 2 * TILE_ROWS, LANES = TILE_ROWS, VECTORS = 4, WIDTH = VECTORS * LANES;
  static constexpr int64_t HEAD = WIDTH + STRIP;  // words of a panel before its codes
  static constexpr int64_t TILE_WORDS = TILE_ROWS * TILE_DIM / 4;
  static_assert(P::LANES == LANES && P::VECTORS == VECTORS);

  static int64_t depth(int64_t dim) { return (dim + TILE_DIM - 1) / TILE_DIM; }
  static int64_t steps(int64_t dim) { return depth(dim) * 2 * TILE_DIM / 4; }
  static int64_t tile_words(int64_t dim) { return ROWS * (steps(dim) + 1); }
  static int64_t panel_words(int64_t dim) { return HEAD + VECTORS * depth(dim) * 2 * TILE_WORDS; }

  // ---------------------------------------------------------------------------------------------- packing

  static void pack_panel(const float* const* codes,    // [WIDTH] of [D]
                         const double* inverse_norms,  // [WIDTH] or null
                         const Packing& packing,
                         void* panel,  // [panel_words]
                         CodeBound* bound) {
    const auto strip_of = [&](int code, int64_t d) {
      return code_strip(codes, inverse_norms, code, packing, d);
    };
    float* biases = static_cast<float*>(panel);
    FloatStrip most{};
    const float largest = measure_panel<WIDTH>(
        strip_of, packing, biases, [&](const FloatStrip& strip) { most = larger(most, absolute(strip)); });
    const float factor = integer_factor(largest_of(most), LARGEST_INTEGER);
    const double inverse = 1.0 / factor;
    for (int i = 0; i < STRIP; ++i) biases[WIDTH + i] = i == 0 ? 128.0f / factor : 0.0f;
    IntStrip* out = reinterpret_cast<IntStrip*>(static_cast<int32_t*>(panel) + HEAD);
    float residual = 0.0f, low = 0.0f;
    for (int first = 0; first < WIDTH; first += LANES) {
      FloatStrip residuals[LANES] = {}, lows[LANES] = {};
      for (int64_t base = 0; base < packing.dim; base += TILE_DIM) {
        IntStrip words[2][LANES] = {};  // of a code a row, then of four dimensions
        for (int j = 0; j < LANES; ++j) {
          for (int64_t d = base; d < base + TILE_DIM && d < packing.dim; d += STRIP) {
            const HighAndLow bytes = high_and_low(strip_of(first + j, d), factor);
            __builtin_memcpy(reinterpret_cast<char*>(&words[0][j]) + (d - base), &bytes.high, STRIP);
            __builtin_memcpy(reinterpret_cast<char*>(&words[1][j]) + (d - base), &bytes.low, STRIP);
            residuals[j] += bytes.residual;
            lows[j] += bytes.low_square;
          }
        }
        for (auto& tile : words) {
          transpose(tile);
          for (int row = 0; row < TILE_ROWS; ++row) __builtin_memcpy(out++, &tile[row], sizeof(IntStrip));
        }
      }
      for (int j = 0; j < LANES; ++j) {
        const float left = sum_of(residuals[j]), square = sum_of(lows[j]);
        residual = left > residual ? left : residual;
        low = square > low ? square : low;
      }
    }
    raise_bound(packing, largest, residual, inverse, bound);
    raise(bound->low, norm_of(low) * inverse);
  }

  static void pack_token(const float* token,  // [D]
                         const Packing& packing, double norm, double /*largest*/, int row,
                         void* tile,  // [tile_words]
                         TokenBound* bound) {
    FloatStrip residuals{}, lows{};
    const float factor = integer_factor(largest_of(token, packing), LARGEST_INTEGER);
    const double inverse = 1.0 / factor;
    const int64_t words = steps(packing.dim);
    char* out = reinterpret_cast<char*>(static_cast<int32_t*>(tile) + row * words);
    for (int64_t d = 0; d < depth(packing.dim) * TILE_DIM; d += STRIP) {
      const HighAndLow bytes =
          d < packing.dim ? high_and_low(packed_strip(token, packing, d), factor) : HighAndLow{};
      char* at = out + d / TILE_DIM * 2 * TILE_DIM + d % TILE_DIM;
      __builtin_memcpy(at, &bytes.high, STRIP);
      __builtin_memcpy(at + TILE_DIM, &bytes.low, STRIP);
      residuals += bytes.residual;
      lows += bytes.low_square;
    }
    static_cast<float*>(tile)[ROWS * words + row] = static_cast<float>(-inverse);
    const double left = norm_of(sum_of(residuals)) * inverse + ROUNDING * norm + NOTHING;
    *bound = {1.0, norm + left, left + SCORE_ROUNDING * norm, 0.0, norm_of(sum_of(lows)) * inverse};
  }

  // ---------------------------------------------------------------------------------------------- scores

  // Of 32 tokens and 16 codes, sums of products: of high bytes, and mixed.
  using Sums = int32_t[2][ROWS * LANES];

  // Where their scores go.
  struct Place {
    const float* biases;   // [LANES]
    const float* factors;  // [ROWS]
    float* scores;         // [ROWS, stride]
    bool first;            // of its granules
    float* columns;        // [LANES], or null
  };

  // Rows [begin, end) made scores.
  template <bool FOLD, class Also>
  static inline __attribute__((always_inline)) void finish_rows(int64_t begin, int64_t end, const Sums& sums,
                                                                const Place& place, int64_t stride,
                                                                const Also& also,
                                                                typename Also::Least& least) {
    const Vector bias = P::load(place.biases);
    for (int64_t row = begin; row < end; ++row) {
      const IntStrip high = load_vector<IntStrip>(sums[0] + row * LANES);
      const IntStrip whole = (high << 7) + load_vector<IntStrip>(sums[1] + row * LANES);
      const Vector value = (Vector) __builtin_convertvector(whole, FloatStrip);
      Vector score = P::multiply_add(value, place.factors[row], bias);
      also.take(row, score, least);
      float* out = place.scores + row * stride;
      if (FOLD && !place.first) score = P::minimum(score, P::load(out));
      P::store(out, score);
    }
  }

  struct RowsAlone {
    struct Least {};
    static inline __attribute__((always_inline)) void take(int64_t /*row*/, Vector /*score*/,
                                                           Least& /*least*/) {}
    static inline __attribute__((always_inline)) void store(const Least& /*least*/, float* /*columns*/) {}
  };
  struct RowsAndColumns {
    const float* factors;  // [ROWS]
    const float* offsets;  // [ROWS]
    struct Least {
      Vector value = P::broadcast(__builtin_inff());
    };
    inline __attribute__((always_inline)) void take(int64_t row, Vector score, Least& least) const {
      least.value = P::least_values(P::values(score, factors[row], offsets[row]), least.value);
    }
    static inline __attribute__((always_inline)) void store(const Least& least, float* columns) {
      P::store(columns, least.value);
    }
  };

  // Adds 64 dimensions of 16 tokens and the codes in tiles 6 and 7.
  template <int HIGH>
  static inline __attribute__((always_inline)) void add_products(T& tiles, const char* tokens,
                                                                 int64_t row_bytes) {
    tiles.template load<4>(tokens, row_bytes);
    tiles.template multiply<HIGH, 4, 6>();
    tiles.template multiply<HIGH + 1, 4, 7>();
    tiles.template load<5>(tokens + TILE_DIM, row_bytes);
    tiles.template multiply<HIGH + 1, 5, 6>();
  }

  // While the tiles multiply, the sums before them are made scores.
  template <bool FOLD, class Also>
  static void sweep(const char* tile, const int32_t* panels, int64_t count, int64_t dim, int64_t group,
                    float* scores, int64_t stride, float* columns, const char* next, const Also& also) {
    static_assert(VECTORS % 2 == 0);
    alignas(64) Sums sums[2];
    alignas(64) float factors[2][ROWS];
    const int64_t deep = depth(dim), row_bytes = deep * 2 * TILE_DIM, share = ROWS / deep;
    const float* inverse = reinterpret_cast<const float*>(tile + ROWS * row_bytes);
    T tiles;
    Place before{};
    int64_t grouped = 0;
    for (int64_t panel = 0; panel < count; ++panel) {
      const float* biases = reinterpret_cast<const float*>(panels + panel * panel_words(dim));
      const int32_t* codes = panels + panel * panel_words(dim) + HEAD;
      float* own_factors = factors[panel % 2];
      for (int row = 0; row < ROWS; ++row) own_factors[row] = inverse[row] * biases[WIDTH];
      for (int v = 0; v < VECTORS; ++v) {
        const Sums& done = sums[(v + 1) % 2];
        const int64_t rows = before.scores != nullptr ? ROWS : 0;
        typename Also::Least least;
        tiles.template zero<0>();
        tiles.template zero<1>();
        tiles.template zero<2>();
        tiles.template zero<3>();
        const char* tokens = tile;
        for (int64_t k = 0, row = 0; k < deep; ++k, codes += 2 * TILE_WORDS, tokens += 2 * TILE_DIM) {
          const int64_t end = k + 1 < deep ? row + share : rows, middle = row + (end - row) / 2;
          tiles.template load<6>(codes, TILE_DIM);
          tiles.template load<7>(codes + TILE_WORDS, TILE_DIM);
          add_products<0>(tiles, tokens, row_bytes);
          if (rows > 0) finish_rows<FOLD>(row, middle, done, before, stride, also, least);
          add_products<2>(tiles, tokens + TILE_ROWS * row_bytes, row_bytes);
          if (rows > 0) finish_rows<FOLD>(middle, end, done, before, stride, also, least);
          if (next != nullptr) next = fetch(next);
          row = end;
        }
        if (rows > 0) also.store(least, before.columns);
        store(tiles, sums[v % 2]);
        before = {biases + v * LANES, own_factors, FOLD ? scores : scores + v * LANES, grouped == 0 && v == 0,
                  columns == nullptr ? nullptr : columns + panel * WIDTH + v * LANES};
      }
      ++grouped;
      if (FOLD && grouped < group) continue;
      grouped = 0;
      scores += FOLD ? LANES : WIDTH;
    }
    typename Also::Least least;
    finish_rows<FOLD>(0, ROWS, sums[(VECTORS - 1) % 2], before, stride, also, least);
    also.store(least, before.columns);
  }

  static inline __attribute__((always_inline)) void store(T& tiles, Sums& sums) {
    tiles.template store<0>(sums[0]);
    tiles.template store<1>(sums[1]);
    tiles.template store<2>(sums[0] + TILE_WORDS);
    tiles.template store<3>(sums[1] + TILE_WORDS);
  }

  // Lines of the next panels for each 16 codes by 64 dimensions: with these a block comes in over two tiles
  // of tokens.
  static constexpr int64_t LINES = 16, LINE = 64;
  static int64_t fetched_bytes(int64_t count, int64_t dim) {
    return count * VECTORS * depth(dim) * LINES * LINE;
  }
  static inline __attribute__((always_inline)) const char* fetch(const char* next) {
    for (int64_t line = 0; line < LINES; ++line, next += LINE) __builtin_prefetch(next, 0, 2);
    return next;
  }

  template <class Also>
  static void score(const void* tile, const void* panels, int64_t count, int64_t dim, int64_t group,
                    void* granule_scores, double* least, float* columns, const void* next, const Also& also) {
    const char* tokens = static_cast<const char*>(tile);
    const int32_t* codes = static_cast<const int32_t*>(panels);
    const char* fetched = static_cast<const char*>(next);
    float* out = static_cast<float*>(granule_scores);
    const int64_t granules = group == 0 ? count * WIDTH : (count + group - 1) / group * LANES;
    if (group == 0) {
      sweep<false>(tokens, codes, count, dim, group, out, granules, columns, fetched, also);
    } else {
      sweep<true>(tokens, codes, count, dim, group, out, granules, columns, fetched, also);
    }
    for (int row = 0; row < ROWS; ++row) least[row] = Rows::least_of(out + row * granules, granules);
  }

  static void score_panels(const void* tile, const void* panels, int64_t count, int64_t dim, int64_t group,
                           void* granule_scores, double* least, const void* next) {
    score(tile, panels, count, dim, group, granule_scores, least, nullptr, next, RowsAlone());
  }
  static void score_both(const void* tile, const void* panels, int64_t count, int64_t dim, int64_t group,
                         void* granule_scores, double* least, const float* factors, const float* offsets,
                         float* columns) {
    score(tile, panels, count, dim, group, granule_scores, least, columns, nullptr,
          RowsAndColumns{factors, offsets});
  }

  // Of the pass's multiply-adds, three of bytes each.
  static double run_peak(int64_t rounds) {
    T tiles;
    tiles.clear();
    const int64_t fewer = rounds / 8;  // products of tiles take longer than those of registers
    for (int64_t round = 0; round < fewer; ++round) {
      tiles.template multiply<0, 4, 6>();
      tiles.template multiply<1, 4, 7>();
      tiles.template multiply<1, 5, 6>();
      tiles.template multiply<2, 4, 6>();
      tiles.template multiply<3, 4, 7>();
      tiles.template multiply<3, 5, 6>();
    }
    return 2.0 * 2 * TILE_ROWS * LANES * TILE_DIM * static_cast<double>(fewer);
  }

  static constexpr CoarsePass make_pass() {
    return {"int8",
            sizeof(float),
            ROWS,
            LANES,
            VECTORS,
            0x1p120,
            steps,
            tile_words,
            panel_words,
            score_panels,
            fetched_bytes,
            score_both,
            Rows::lower_columns,
            Rows::find_columns,
            Rows::find_scores,
            pack_panel,
            pack_token,
            run_peak};
  }
};

// Tiles in plain loops, for CPUs without them: to test the pass, not to be quick.
struct PlainTiles {
  int8_t bytes[8][TILE_ROWS][TILE_DIM];

  void clear() { __builtin_memset(bytes, 0, sizeof(bytes)); }
  template <int TILE>
  void zero() {
    __builtin_memset(bytes[TILE], 0, sizeof(bytes[TILE]));
  }
  template <int TILE>
  void load(const void* from, int64_t stride) {
    for (int row = 0; row < TILE_ROWS; ++row)
      __builtin_memcpy(bytes[TILE][row], static_cast<const char*>(from) + row * stride, TILE_DIM);
  }
  template <int TILE>
  void store(int32_t* to) const {
    __builtin_memcpy(to, bytes[TILE], sizeof(bytes[TILE]));
  }
  template <int SUM, int A, int B>
  void multiply() {
    for (int row = 0; row < TILE_ROWS; ++row) {
      int32_t sums[TILE_ROWS];
      __builtin_memcpy(sums, bytes[SUM][row], sizeof(sums));
      for (int k = 0; k < TILE_DIM; ++k) {
        const int8_t* codes = bytes[B][k / 4] + k % 4;
        for (int j = 0; j < TILE_ROWS; ++j) sums[j] += bytes[A][row][k] * codes[4 * j];
      }
      __builtin_memcpy(bytes[SUM][row], sums, sizeof(sums));
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
