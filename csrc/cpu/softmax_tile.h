// The loops of softmax_table.h, written once over a pass P that the including unit defines in an anonymous
// namespace. Nothing from the standard library is instantiated here: a shared template compiled for AVX512
// could be the copy that the linker keeps for everyone.
//
// P: Word, Vector, LANES, VECTORS (of a panel), ROWS (of a register tile), TOKENS (of a tile of add_dx),
// load, store, broadcast, add, subtract, multiply, fma(a, b, c) = a * b + c, maximum(a, b) = a > b ? a : b,
// power(t) = 2^t for t <= 127, 0 where t <= LEAST, sum_of, largest_of;
// with 4 TOKENS also add_sums, which sums the lanes of many vectors at once.
#pragma once

#include "softmax_table.h"
#include "strips.h"

namespace vqkernels {
namespace cpu {
namespace {

template <class P>
struct SoftmaxTile {
  using Word = typename P::Word;
  using Vector = typename P::Vector;
  using Block = ScoreBlock<Word>;
  using Terms = TokenTerms<Word>;
  static constexpr int WIDTH = P::VECTORS * P::LANES;

  // ------------------------------------------------------------------------------------ products

  // Whole panels are turned 16 codes by 16 dimensions at a time.
  static constexpr bool IN_STRIPS = sizeof(Word) == sizeof(float) && WIDTH % STRIP == 0;

  static void pack_codes(const Word* rows,  // [count, D]
                         int64_t count, int64_t dim,
                         Word* panels) {  // [panels, D, WIDTH]
    const Word* end = rows + count * dim;
    for (int64_t base = 0; base < count; base += WIDTH, panels += dim * WIDTH) {
      const int64_t here = count - base < WIDTH ? count - base : WIDTH;
      if constexpr (IN_STRIPS) {
        for (int64_t j = 0; j < WIDTH; j += STRIP)
          pack_strips(rows + (base + j) * dim, here - j, dim, end, panels + j);
      } else {
        for (int64_t d = 0; d < dim; ++d) {
          Word* out = panels + d * WIDTH;
          for (int64_t j = 0; j < here; ++j) out[j] = rows[(base + j) * dim + d];
          for (int64_t j = here; j < WIDTH; ++j) out[j] = Word(0);
        }
      }
    }
  }

  static void pack_strips(const float* rows,  // [count, D]
                          int64_t count, int64_t dim,
                          const float* end,  // of what may be read
                          float* out) {      // [D, WIDTH], 16 columns of it
    IntStrip square[STRIP];
    for (int64_t d = 0; d < dim; d += STRIP) {
      for (int64_t j = 0; j < STRIP; ++j) {
        square[j] = j < count ? __builtin_bit_cast(IntStrip, load_strip(rows + j * dim + d, dim - d, end))
                              : IntStrip{};
      }
      transpose(square);
      for (int64_t i = 0; i < STRIP && d + i < dim; ++i) {
        store_vector(reinterpret_cast<int32_t*>(out + (d + i) * WIDTH), square[i]);
      }
    }
  }

  static void unpack_codes(const Word* panels,  // [panels, D, WIDTH]
                           int64_t count, int64_t dim, Word factor, bool add,
                           Word* rows) {  // [count, D]
    for (int64_t base = 0; base < count; base += WIDTH, panels += dim * WIDTH) {
      const int64_t here = count - base < WIDTH ? count - base : WIDTH;
      for (int64_t j = 0; j < here; j += STRIP) {
        const int64_t some = here - j < STRIP ? here - j : STRIP;
        if constexpr (IN_STRIPS) {
          unpack_strips(panels + j, some, dim, factor, add, rows + (base + j) * dim);
        } else {
          for (int64_t i = j; i < j + some; ++i) {
            Word* row = rows + (base + i) * dim;
            for (int64_t d = 0; d < dim; ++d)
              row[d] = factor * panels[d * WIDTH + i] + (add ? row[d] : Word(0));
          }
        }
      }
    }
  }

  static void unpack_strips(const float* panel,  // [D, WIDTH], 16 columns of it
                            int64_t count, int64_t dim, float factor, bool add,
                            float* rows) {  // [count, D]
    IntStrip square[STRIP];
    for (int64_t d = 0; d < dim; d += STRIP) {
      const int64_t width = dim - d < STRIP ? dim - d : STRIP;
      for (int64_t i = 0; i < STRIP; ++i)
        square[i] = i < width ? load_vector<IntStrip>(panel + (d + i) * WIDTH) : IntStrip{};
      transpose(square);
      for (int64_t j = 0; j < count; ++j) {
        write_strip(__builtin_bit_cast(FloatStrip, square[j]) * factor, width, add, rows + j * dim + d);
      }
    }
  }

  static inline __attribute__((always_inline)) void write_strip(FloatStrip value, int64_t width, bool add,
                                                                float* out) {  // [width]
    if (width == STRIP) {
      if (add) value += load_vector<FloatStrip>(out);
      store_vector(out, value);
      return;
    }
    float values[STRIP];
    __builtin_memcpy(values, &value, sizeof(value));
    for (int64_t i = 0; i < width; ++i) out[i] = add ? out[i] + values[i] : values[i];
  }

  // out[row] = start[row] + sum_step a[row, step] b[step]: rows x vectors sums stay in registers.
  template <int ROWS>
  static void multiply(const Word* a, int64_t a_row, int64_t a_step,  // [ROWS, steps]
                       const Word* b, int64_t b_step,                 // [steps, WIDTH]
                       int64_t steps, const Word* start, int64_t start_row, Word* out,
                       int64_t out_row) {  // [ROWS, WIDTH]
    Vector sums[ROWS][P::VECTORS];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) sums[row][v] = P::load(start + row * start_row + v * P::LANES);
    }
#pragma GCC unroll 1
    for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
      Vector columns[P::VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) columns[v] = P::load(b + v * P::LANES);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        const Vector value = P::broadcast(a[row * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < P::VECTORS; ++v) sums[row][v] = P::fma(value, columns[v], sums[row][v]);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) P::store(out + row * out_row + v * P::LANES, sums[row][v]);
    }
  }

  using Multiply = void (*)(const Word*, int64_t, int64_t, const Word*, int64_t, int64_t, const Word*,
                            int64_t, Word*, int64_t);

  // `multiply` for so many rows.
  template <int ROWS = P::ROWS>
  static Multiply choose_multiply(int64_t rows) {
    if constexpr (ROWS == 1) {
      return &multiply<1>;
    } else {
      return rows >= ROWS ? &multiply<ROWS> : choose_multiply<ROWS - 1>(rows);
    }
  }

  static void score(const Word* x,       // [tokens, D]
                    const Word* panels,  // [panels, D, WIDTH]
                    const Word* bias,    // [codes]
                    int64_t tokens, int64_t codes, int64_t dim,
                    Word* scores,  // [tokens, stride]
                    int64_t stride) {
    for (int64_t k = 0; k < codes; k += WIDTH, panels += dim * WIDTH) {
      for (int64_t n = 0; n < tokens; n += P::ROWS) {
        choose_multiply(tokens - n)(x + n * dim, dim, 1, panels, WIDTH, dim, bias + k, 0,
                                    scores + n * stride + k, stride);
      }
    }
  }

  static void add_dcodes(const Block& block,
                         const Word* x,  // [tokens, D]
                         int64_t dim,
                         Word* dpanels) {  // [panels, D, WIDTH]
    for (int64_t k = 0; k < block.codes; k += WIDTH, dpanels += dim * WIDTH) {
      for (int64_t d = 0; d < dim; d += P::ROWS) {
        Word* out = dpanels + d * WIDTH;
        choose_multiply(dim - d)(x + d, 1, dim, block.scores + k, block.stride, block.tokens, out, WIDTH, out,
                                 WIDTH);
      }
    }
  }

  // dx[n, d] += sum_k scores[n, k] codes[k, d] with codes along the lanes, which wastes none whatever D is.
  template <int DIMS>
  static void reduce(const Word* scores,  // [TOKENS, stride]
                     int64_t stride,
                     const Word* panels,  // [panels, D, WIDTH], at its dimension
                     int64_t codes, int64_t dim, int64_t tokens,
                     Word* dx) {  // [tokens, D], at its dimension
    Vector sums[DIMS][P::TOKENS];
#pragma GCC unroll 8
    for (int d = 0; d < DIMS; ++d) {
#pragma GCC unroll 4
      for (int n = 0; n < P::TOKENS; ++n) sums[d][n] = P::broadcast(Word(0));
    }
    for (int64_t k = 0; k < codes; k += WIDTH, panels += dim * WIDTH) {
#pragma GCC unroll 1
      for (int lane = 0; lane < WIDTH; lane += P::LANES) {
        Vector values[P::TOKENS];
#pragma GCC unroll 4
        for (int n = 0; n < P::TOKENS; ++n) values[n] = P::load(scores + n * stride + k + lane);
#pragma GCC unroll 8
        for (int d = 0; d < DIMS; ++d) {
          const Vector column = P::load(panels + d * WIDTH + lane);
#pragma GCC unroll 4
          for (int n = 0; n < P::TOKENS; ++n) sums[d][n] = P::fma(values[n], column, sums[d][n]);
        }
      }
    }
    if constexpr (P::TOKENS == 4) {
      P::add_sums(sums, tokens, dim, dx);
    } else {
#pragma GCC unroll 4
      for (int n = 0; n < P::TOKENS; ++n) {
        if (n >= tokens) break;
#pragma GCC unroll 8
        for (int d = 0; d < DIMS; ++d) dx[n * dim + d] += P::sum_of(sums[d][n]);
      }
    }
  }

  using Reduce = void (*)(const Word*, int64_t, const Word*, int64_t, int64_t, int64_t, Word*);

  template <int DIMS = P::ROWS>
  static Reduce choose_reduce(int64_t dims) {
    if constexpr (DIMS == 1) {
      return &reduce<1>;
    } else {
      return dims >= DIMS ? &reduce<DIMS> : choose_reduce<DIMS - 1>(dims);
    }
  }

  static void add_dx(const Block& block,
                     const Word* panels,  // [panels, D, WIDTH]
                     int64_t dim,
                     Word* dx) {  // [tokens, D]
    for (int64_t d = 0; d < dim; d += P::ROWS) {
      const Reduce reduce_rows = choose_reduce(dim - d);
      for (int64_t n = 0; n < block.tokens; n += P::TOKENS) {
        reduce_rows(block.scores + n * block.stride, block.stride, panels + d * WIDTH, block.codes, dim,
                    block.tokens - n, dx + n * dim + d);
      }
    }
  }

  // ----------------------------------------------------------------------------- along a token's codes

  // l - reference, no less than where its power of two is 0: a code with a bias of -inf counts as nothing.
  static inline __attribute__((always_inline)) Vector above(Vector score, Vector reference) {
    return P::maximum(P::broadcast(P::LEAST), P::subtract(score, reference));  // a NaN stays: it is second
  }

  static Word largest_score(const Word* scores, int64_t codes) {
    Vector largest[P::VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < P::VECTORS; ++v) largest[v] = P::load(scores + v * P::LANES);
    for (int64_t k = WIDTH; k < codes; k += WIDTH) {
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) {
        largest[v] = P::maximum(P::load(scores + k + v * P::LANES), largest[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 1; v < P::VECTORS; ++v) largest[0] = P::maximum(largest[v], largest[0]);
    return P::largest_of(largest[0]);
  }

  static void fold(const Block& block, double* maximum, double* sum, double* moment) {  // [tokens] each
    for (int64_t n = 0; n < block.tokens; ++n) {
      const Word* scores = block.scores + n * block.stride;
      const Word largest = largest_score(scores, block.codes);
      if (largest > maximum[n]) {
        const double step = maximum[n] - largest;
        if (sum[n] != 0.0) {  // else maximum may be -inf
          const double factor = __builtin_exp2(step);
          moment[n] = factor * (moment[n] + step * sum[n]);
          sum[n] *= factor;
        }
        maximum[n] = largest;
      }
      const Vector reference =
          P::broadcast(static_cast<Word>(maximum[n] > -__builtin_inf() ? maximum[n] : 0.0));
      Vector sums[P::VECTORS], moments[P::VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) sums[v] = moments[v] = P::broadcast(Word(0));
      for (int64_t k = 0; k < block.codes; k += WIDTH) {
#pragma GCC unroll 4
        for (int v = 0; v < P::VECTORS; ++v) {
          const Vector t = above(P::load(scores + k + v * P::LANES), reference);
          const Vector p = P::power(t);
          sums[v] = P::add(sums[v], p);
          moments[v] = P::fma(p, t, moments[v]);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) {
        sum[n] += P::sum_of(sums[v]);
        moment[n] += P::sum_of(moments[v]);
      }
    }
  }

  // A token's terms in every lane.
  struct Spread {
    Vector lse, entropy, weight, constant;
    Spread(const Terms& terms, int64_t n)
        : lse(P::broadcast(terms.lse[n])),
          entropy(P::broadcast(terms.entropy[n])),
          weight(P::broadcast(terms.weight[n])),
          constant(P::broadcast(terms.constant[n])) {}
  };

  // f of softmax_table.h
  template <bool ALONG>
  static inline __attribute__((always_inline)) Vector slope(const Spread& token, Vector t, Vector dcode_sums,
                                                            const Word* along) {
    const Vector f = P::fma(token.weight, dcode_sums, P::fma(token.entropy, t, token.constant));
    return ALONG ? P::add(f, P::load(along)) : f;
  }

  template <bool ALONG>
  static void sum_rows(const Block& block, const Terms& terms,
                       const Word* dcode_sums,          // [codes]
                       double* mass, double* moment) {  // [tokens] each
    for (int64_t n = 0; n < block.tokens; ++n) {
      const Word* scores = block.scores + n * block.stride;
      const Word* along = ALONG ? block.along + n * block.stride : nullptr;
      const Spread token(terms, n);
      Vector sums[P::VECTORS], moments[P::VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) sums[v] = moments[v] = P::broadcast(Word(0));
      for (int64_t k = 0; k < block.codes; k += WIDTH) {
#pragma GCC unroll 4
        for (int v = 0; v < P::VECTORS; ++v) {
          const int64_t at = k + v * P::LANES;
          const Vector t = above(P::load(scores + at), token.lse);
          const Vector p = P::power(t);
          sums[v] = P::add(sums[v], p);
          moments[v] = P::fma(
              p, slope<ALONG>(token, t, P::load(dcode_sums + at), ALONG ? along + at : nullptr), moments[v]);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) {
        mass[n] += P::sum_of(sums[v]);
        moment[n] += P::sum_of(moments[v]);
      }
    }
  }

  static void row_sums(const Block& block, const Terms& terms, const Word* dcode_sums, double* mass,
                       double* moment) {
    return block.along == nullptr ? sum_rows<false>(block, terms, dcode_sums, mass, moment)
                                  : sum_rows<true>(block, terms, dcode_sums, mass, moment);
  }

  static void probabilities(const Block& block, const Terms& terms) {
    for (int64_t n = 0; n < block.tokens; ++n) {
      Word* scores = block.scores + n * block.stride;
      const Vector lse = P::broadcast(terms.lse[n]);
      for (int64_t k = 0; k < block.codes; k += P::LANES) {
        P::store(scores + k, P::power(above(P::load(scores + k), lse)));
      }
    }
  }

  // ----------------------------------------------------------------------------- along a code's tokens

  static void add_panel(const Vector (&sums)[P::VECTORS], double* totals) {  // [WIDTH]
    Word words[WIDTH];
#pragma GCC unroll 4
    for (int v = 0; v < P::VECTORS; ++v) P::store(words + v * P::LANES, sums[v]);
    for (int j = 0; j < WIDTH; ++j) totals[j] += words[j];
  }

  static void code_sums(const Block& block, const Terms& terms, double* totals) {  // [codes]
    for (int64_t k = 0; k < block.codes; k += WIDTH) {
      Vector sums[P::VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) sums[v] = P::broadcast(Word(0));
      for (int64_t n = 0; n < block.tokens; ++n) {
        const Word* scores = block.scores + n * block.stride + k;
        const Vector lse = P::broadcast(terms.lse[n]), weight = P::broadcast(terms.weight[n]);
#pragma GCC unroll 4
        for (int v = 0; v < P::VECTORS; ++v) {
          sums[v] = P::fma(weight, P::power(above(P::load(scores + v * P::LANES), lse)), sums[v]);
        }
      }
      add_panel(sums, totals + k);
    }
  }

  template <bool ALONG>
  static void gradients_of(const Block& block, const Terms& terms,
                           const Word* dcode_sums,  // [codes]
                           double* totals) {        // [codes]
    for (int64_t k = 0; k < block.codes; k += WIDTH) {
      Vector sums[P::VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) sums[v] = P::broadcast(Word(0));
      for (int64_t n = 0; n < block.tokens; ++n) {
        Word* scores = block.scores + n * block.stride + k;
        const Word* along = ALONG ? block.along + n * block.stride + k : nullptr;
        const Spread token(terms, n);
#pragma GCC unroll 4
        for (int v = 0; v < P::VECTORS; ++v) {
          const int64_t at = v * P::LANES;
          const Vector t = above(P::load(scores + at), token.lse);
          const Vector f = slope<ALONG>(token, t, P::load(dcode_sums + k + at), ALONG ? along + at : nullptr);
          const Vector gradient = P::multiply(P::power(t), f);
          P::store(scores + at, gradient);
          sums[v] = P::add(sums[v], gradient);
        }
      }
      add_panel(sums, totals + k);
    }
  }

  static void gradients(const Block& block, const Terms& terms, const Word* dcode_sums, double* totals) {
    return block.along == nullptr ? gradients_of<false>(block, terms, dcode_sums, totals)
                                  : gradients_of<true>(block, terms, dcode_sums, totals);
  }

  static constexpr SoftmaxTable<Word> make_table(const char* name) {
    return {name,     WIDTH,     pack_codes,    unpack_codes, score,  fold,
            row_sums, code_sums, probabilities, gradients,    add_dx, add_dcodes};
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
