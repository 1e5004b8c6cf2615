// Scores of tokens against panels, written once over a pass P that the including unit defines in an anonymous
// namespace. Nothing from the standard library is instantiated here: a shared template compiled for AVX512
// could be the copy that the linker keeps for everyone.
//
// P: Word, Vector, ROWS, LANES, VECTORS, DEPTH (multiply-adds of a lane of accumulate), steps(dim), load,
// store, broadcast, start(biases, shared) (where sums begin), accumulate(sum, token, code), minimum,
// least(v), limit_of(double) (no word above it stands for a score that is not above the limit), below(v,
// limit) (which lanes are not above it, as bits).
// Where columns can be had also: Values (floats, one a lane), values(sum, factor, offset), least_values(a, b)
// (b where a is NaN), load_values, store_values, not_above(values, limits) (as bits).
#pragma once

#include "kernel_table.h"

namespace vqkernels {
namespace cpu {
namespace {

template <class P>
struct Scores {
  using Word = typename P::Word;
  using Vector = typename P::Vector;
  static constexpr int WIDTH = P::VECTORS * P::LANES;
  static constexpr int64_t LINE = 64;  // bytes

  static int64_t tile_words(int64_t dim) {
    return (P::ROWS * P::steps(dim) + 16) / 16 * 16;
  }  // whole cache lines
  static int64_t panel_words(int64_t dim) { return (1 + P::steps(dim)) * WIDTH; }

  using Sums = Vector[P::ROWS][P::VECTORS];

  static inline __attribute__((always_inline)) void add_step(
      const Word* tile,  // [ROWS, steps], at its column
      int64_t steps,
      const Word* panel,  // [WIDTH]
      Sums& sums) {
    Vector codes[P::VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < P::VECTORS; ++v) {
      codes[v] = P::load(panel + v * P::LANES);
    }
#pragma GCC unroll 16
    for (int row = 0; row < P::ROWS; ++row) {
      const Vector token = P::broadcast(tile[row * steps]);
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) P::accumulate(sums[row][v], token, codes[v]);
    }
  }

  // What else is done at every step, and made of the sums, row by row: nothing, the next panels brought into
  // the cache, or the columns.
  struct RowsAlone {
    struct Least {};
    static inline __attribute__((always_inline)) void step(int64_t /*number*/) {}
    static inline __attribute__((always_inline)) void take(int /*row*/, const Vector* /*sums*/,
                                                           Least& /*least*/) {}
    static inline __attribute__((always_inline)) void store(const Least& /*least*/, int64_t /*panel*/) {}
  };
  struct RowsAndNext : RowsAlone {
    const char* next;

    explicit RowsAndNext(const void* from) : next(static_cast<const char*>(from)) {}
    inline __attribute__((always_inline)) void step(int64_t number) const {
      __builtin_prefetch(next + number * LINE, 0, 2);  // all at once they would hold up the panel's own lines
    }
  };
  struct RowsAndColumns {
    const float* factors;  // [ROWS]
    const float* offsets;  // [ROWS]
    float* columns;        // [panels, WIDTH]
    static inline __attribute__((always_inline)) void step(int64_t /*number*/) {}
    struct Least {
      decltype(P::load_values(nullptr)) values[P::VECTORS];

      inline __attribute__((always_inline)) Least() {
#pragma GCC unroll 4
        for (auto& each : values) each = decltype(P::load_values(nullptr)){} + __builtin_inff();
      }
    };

    inline __attribute__((always_inline)) void take(int row, const Vector* sums, Least& least) const {
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) {
        least.values[v] = P::least_values(P::values(sums[v], factors[row], offsets[row]), least.values[v]);
      }
    }
    inline __attribute__((always_inline)) void store(const Least& least, int64_t panel) const {
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v)
        P::store_values(columns + panel * WIDTH + v * P::LANES, least.values[v]);
    }
  };

  // One tile against one panel: rows x vectors sums stay in registers. STEPS = 0: not known to the compiler.
  // FOLD: of every lane only the least.
  template <int STEPS, bool FOLD, class Also>
  static inline __attribute__((always_inline)) void score_panel(const Word* tile,   // [ROWS, steps] and one
                                                                const Word* panel,  // [1 + steps, WIDTH]
                                                                int64_t run_time_steps, bool first,
                                                                Word* granule_scores,  // [ROWS, stride]
                                                                int64_t stride, const Also& also,
                                                                int64_t number) {
    const Vector shared = P::broadcast(tile[P::ROWS * (STEPS > 0 ? STEPS : run_time_steps)]);
    Sums sums;
#pragma GCC unroll 4
    for (int v = 0; v < P::VECTORS; ++v) {
      const Vector start = P::start(P::load(panel + v * P::LANES), shared);
#pragma GCC unroll 16
      for (int row = 0; row < P::ROWS; ++row) sums[row][v] = start;
    }
    panel += WIDTH;
    if constexpr (STEPS > 0) {
#pragma GCC unroll 32
      for (int64_t step = 0; step < STEPS; ++step) add_step(tile + step, STEPS, panel + step * WIDTH, sums);
    } else {
#pragma GCC unroll 1
      for (int64_t step = 0; step < run_time_steps; ++step) {  // unrolled further, GCC 12 spills the sums
        add_step(tile + step, run_time_steps, panel + step * WIDTH, sums);
        also.step(number * run_time_steps + step);
      }
    }
    typename Also::Least least_values;
#pragma GCC unroll 16
    for (int row = 0; row < P::ROWS; ++row) {
      Word* out = granule_scores + row * stride;
      if constexpr (FOLD) {
        Vector least = sums[row][0];
#pragma GCC unroll 4
        for (int v = 1; v < P::VECTORS; ++v) least = P::minimum(least, sums[row][v]);
        if (!first) least = P::minimum(least, P::load(out));
        P::store(out, least);
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < P::VECTORS; ++v) P::store(out + v * P::LANES, sums[row][v]);
      }
      also.take(row, sums[row], least_values);
    }
    also.store(least_values, number);
  }

  template <int STEPS, class Also>
  static void sweep(const Word* tile, const Word* panels, int64_t count, int64_t dim, int64_t group,
                    Word* granule_scores, int64_t stride, Also also) {
    const int64_t words = panel_words(dim), steps = P::steps(dim);
    for (int64_t base = 0; base < count; base += group, granule_scores += P::LANES) {
      const int64_t end = count - base < group ? count : base + group;
      for (int64_t panel = base; panel < end; ++panel) {
        score_panel<STEPS, true>(tile, panels + panel * words, steps, panel == base, granule_scores, stride,
                                 also, panel);
      }
    }
  }

  // With few steps the loop over them would cost as much as its body: it is unrolled for these numbers.
  template <class Also, int... STEPS>
  static auto choose_sweep(int64_t steps) {
    auto chosen = &sweep<0, Also>;
    ((chosen = steps == STEPS ? &sweep<STEPS, Also> : chosen), ...);
    return chosen;
  }
  template <class Also>
  static auto sweep_for(const Also& /*also*/, int64_t steps) {
    return choose_sweep<Also, 1, 2, 3, 4, 6, 8, 9, 16, 32>(steps);
  }
  static auto sweep_for(const RowsAndNext& /*also*/, int64_t /*steps*/) { return &sweep<0, RowsAndNext>; }

  static int64_t fetched_bytes(int64_t count, int64_t dim) { return count * P::steps(dim) * LINE; }

  template <class Also>
  static void sweep_apart(const Word* tile, const Word* panels, int64_t count, int64_t dim, Word* scores,
                          int64_t stride, Also also) {
    const int64_t words = panel_words(dim), steps = P::steps(dim);
    for (int64_t panel = 0; panel < count; ++panel) {
      score_panel<0, false>(tile, panels + panel * words, steps, true, scores + panel * WIDTH, stride, also,
                            panel);
    }
  }

  // Four running minima, so that one does not wait for the other.
  static double least_of(const Word* scores, int64_t count) {
    constexpr int CHAINS = 4;
    Vector best[CHAINS];
    for (int i = 0; i < CHAINS; ++i) best[i] = P::load(scores);
    int64_t i = 0;
    for (; i + CHAINS * P::LANES <= count; i += CHAINS * P::LANES) {
#pragma GCC unroll 4
      for (int j = 0; j < CHAINS; ++j) best[j] = P::minimum(best[j], P::load(scores + i + j * P::LANES));
    }
    for (; i < count; i += P::LANES) best[0] = P::minimum(best[0], P::load(scores + i));
    return static_cast<double>(
        P::least(P::minimum(P::minimum(best[0], best[1]), P::minimum(best[2], best[3]))));
  }

  template <class Also>
  static inline __attribute__((always_inline)) void score(const void* tile,    // [tile_words]
                                                          const void* panels,  // [count, panel_words]
                                                          int64_t count, int64_t dim, int64_t group,
                                                          void* granule_scores,  // [ROWS, granules]
                                                          double* least,         // [ROWS]
                                                          Also also) {
    const Word* tokens = static_cast<const Word*>(tile);
    const Word* codes = static_cast<const Word*>(panels);
    Word* out = static_cast<Word*>(granule_scores);
    const int64_t granules = group == 0 ? count * WIDTH : (count + group - 1) / group * P::LANES;
    if (group == 0) {
      sweep_apart(tokens, codes, count, dim, out, granules, also);
    } else {
      sweep_for(also, P::steps(dim))(tokens, codes, count, dim, group, out, granules, also);
    }
    for (int row = 0; row < P::ROWS; ++row) least[row] = least_of(out + row * granules, granules);
  }

  static void score_panels(const void* tile, const void* panels, int64_t count, int64_t dim, int64_t group,
                           void* granule_scores, double* least, const void* next) {
    if (next == nullptr) {
      score(tile, panels, count, dim, group, granule_scores, least, RowsAlone());
    } else {
      score(tile, panels, count, dim, group, granule_scores, least, RowsAndNext(next));
    }
  }

  static void score_both(const void* tile, const void* panels, int64_t count, int64_t dim, int64_t group,
                         void* granule_scores, double* least, const float* factors, const float* offsets,
                         float* columns) {
    score(tile, panels, count, dim, group, granule_scores, least, RowsAndColumns{factors, offsets, columns});
  }

  static void lower_columns(const float* columns,  // [count]
                            int64_t count, float error,
                            float* upper) {  // [count]
    for (int64_t i = 0; i < count; i += P::LANES) {
      const auto raised = P::load_values(columns + i) + error;
      P::store_values(upper + i, P::least_values(raised, P::load_values(upper + i)));
    }
  }

  static int64_t find_columns(const float* columns,  // [count]
                              const float* upper,    // [count]
                              int64_t count, float error,
                              int32_t* found) {  // [count]
    static_assert(WIDTH <= 64);                  // bits of a word
    int64_t number = 0;
    for (int64_t base = 0; base < count; base += WIDTH) {
      uint64_t lanes = 0;  // as in find_scores, bits instead of branches
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) {
        const int64_t i = base + v * P::LANES;
        const uint64_t near = P::not_above(P::load_values(columns + i), P::load_values(upper + i) + error);
        lanes |= near << (v * P::LANES);
      }
      for (; lanes != 0; lanes &= lanes - 1)
        found[number++] = static_cast<int32_t>(base) + __builtin_ctzll(lanes);
    }
    return number;
  }

  static int64_t find_scores(const void* words,  // [count]
                             int64_t count, double limit,
                             int32_t* found,        // [capacity]
                             double* found_scores,  // [capacity]
                             int64_t capacity) {
    constexpr int QUADS = 4, GROUP = QUADS * P::LANES;
    constexpr int64_t SPAN = 64 * GROUP;  // groups of a span fit into the bits of a word
    const Word* scores = static_cast<const Word*>(words);
    const Word most = P::limit_of(limit);
    int64_t number = 0;
    for (int64_t span = 0; span < count; span += SPAN) {
      const int64_t end = count - span < SPAN ? count : span + SPAN;
      // where they are cannot be predicted, that it is mostly one of them can: bits instead of branches
      uint64_t groups = 0;
      for (int64_t base = span, bit = 0; base < end; base += GROUP, ++bit) {
        Vector least = P::load(scores + base);
        const int64_t last = end - base < GROUP ? end : base + GROUP;
        for (int64_t i = base + P::LANES; i < last; i += P::LANES)
          least = P::minimum(least, P::load(scores + i));
        groups |= static_cast<uint64_t>(P::below(least, most) != 0) << bit;
      }
      for (; groups != 0; groups &= groups - 1) {
        const int64_t base = span + __builtin_ctzll(groups) * GROUP;
        const int64_t last = end - base < GROUP ? end : base + GROUP;
        uint64_t lanes = 0;
        for (int64_t i = base; i < last; i += P::LANES)
          lanes |= static_cast<uint64_t>(P::below(P::load(scores + i), most)) << (i - base);
        for (; lanes != 0; lanes &= lanes - 1) {
          const int64_t i = base + __builtin_ctzll(lanes);
          if (number < capacity) {
            found[number] = static_cast<int32_t>(i);
            found_scores[number] = static_cast<double>(scores[i]);
          }
          ++number;
        }
        if (number > capacity) return number;
      }
    }
    return number;
  }

  // Another value to the compiler, which would multiply the same ones only once.
  static inline void renew(Vector& vector) {
#if defined(__x86_64__)
    __asm__ volatile("" : "+x"(vector));
#endif
  }

  static double run_peak(int64_t rounds) {
    volatile Word nothing = 0;  // which the compiler may not know: all sums are different to it
    Vector token = P::broadcast(nothing);
    Vector sums[P::ROWS][P::VECTORS];
#pragma GCC unroll 16
    for (int row = 0; row < P::ROWS; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) sums[row][v] = P::broadcast(nothing);
    }
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
      for (int row = 0; row < P::ROWS; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < P::VECTORS; ++v) {
          renew(token);
          P::accumulate(sums[row][v], token, token);
        }
      }
    }
    Word out[P::LANES];
#pragma GCC unroll 16
    for (int row = 0; row < P::ROWS; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < P::VECTORS; ++v) {
        P::store(out, sums[row][v]);
        nothing = out[0];
      }
    }
    return 2.0 * P::DEPTH * P::LANES * P::ROWS * P::VECTORS * static_cast<double>(rounds);
  }

  static constexpr CoarsePass make_pass(const char* name, double largest_score,
                                        decltype(CoarsePass::pack_panel) pack_panel,
                                        decltype(CoarsePass::pack_token) pack_token) {
    CoarsePass pass{name,     sizeof(Word), P::ROWS,     P::LANES,     P::VECTORS,    largest_score,
                    P::steps, tile_words,   panel_words, score_panels, fetched_bytes, nullptr,
                    nullptr,  nullptr,      find_scores, pack_panel,   pack_token,    run_peak};
    if constexpr (requires { typename P::Values; }) {
      pass.score_both = score_both;
      pass.lower_columns = lower_columns;
      pass.find_columns = find_columns;
    }
    return pass;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
