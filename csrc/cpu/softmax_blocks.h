// How the streaming softmax is cut into work, and what a thread holds of it.
//
// Tokens are taken in *strips*; a strip's *groups* of tokens meet the codebook's *chunks*, and each pair is
// an item for some thread, which goes over the chunk's blocks of codes and, within, over the group's blocks
// of tokens. Sums over tokens are kept by group, sums over codes by chunk, and added in their order
// afterwards. The cut depends on the shapes alone, so neither threads nor their timing show in any bit. What
// is kept apart for the additions is at most PARTIAL numbers for a strip's tokens, and ITEMS blocks of the
// codebook where it has fewer blocks than that.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../checks.h"
#include "parallel.h"
#include "softmax_table.h"
#include "tokens.h"

namespace vqkernels {
namespace cpu {

constexpr int64_t ITEMS = 32;         // of a strip, so that threads end together
constexpr int64_t PARTIAL = 8 << 20;  // numbers of [chunks, tokens, D]
constexpr int64_t STRIP_TOKENS = 170 * BLOCK_TOKENS;
constexpr int64_t PANEL_WORDS = 64 * 1024;  // of a block of codes; it lies in the L2 cache
// A backward pass that goes over the logits twice keeps them for the second time, a strip of them, where this
// saves more than it costs: above some D, below some K. (N, K, D) = (1024, 16384, 256) and (16384, 1024,
// 256): the whole of an entropy loss, forward and backward, takes 4 to 10% less; D = 64: 0 to 6% (Zen 5).
constexpr int64_t KEPT = 4 << 20;  // numbers
constexpr int64_t KEPT_TOKENS = 4 * BLOCK_TOKENS;
constexpr int64_t KEPT_DIM = 64;
constexpr double LOG_2 = 0.693147180559945309417232121458;

inline int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }
inline int64_t clamp(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

struct SoftmaxPlan {
  int64_t block;  // codes
  int64_t chunk;  // codes, whole blocks
  int64_t chunks;
  int64_t strip;   // tokens, whole groups
  int64_t group;   // tokens, whole blocks
  int64_t groups;  // of a strip, at most
  bool keep;       // a strip's logits

  int64_t stride() const { return block + STRIDE_PADDING; }
};

inline SoftmaxPlan plan_softmax(int64_t tokens, int64_t codes, int64_t dim, bool twice) {
  SoftmaxPlan plan;
  plan.block = clamp(PANEL_WORDS / dim / CODES_UNIT * CODES_UNIT, CODES_UNIT, LARGEST_BLOCK);
  plan.chunk = round_up(ceil_div(codes, ITEMS), plan.block);
  plan.chunks = ceil_div(codes, plan.chunk);
  const int64_t kept = KEPT / (ceil_div(codes, plan.block) * plan.stride());
  plan.keep = twice && dim >= KEPT_DIM && kept >= KEPT_TOKENS;
  const int64_t most = plan.keep ? clamp(kept, BLOCK_TOKENS, STRIP_TOKENS) : STRIP_TOKENS;
  const int64_t fitting = clamp(PARTIAL / (plan.chunks * dim), BLOCK_TOKENS, most);
  const int64_t strip = clamp(tokens, 1, fitting);
  plan.group = round_up(ceil_div(strip, ceil_div(ITEMS, plan.chunks)), BLOCK_TOKENS);
  plan.groups = ceil_div(strip, plan.group);
  plan.strip = plan.group * plan.groups;
  return plan;
}

// Tokens [begin, begin + count) of a call, packed.
template <class Word>
struct TokenStrip {
  int64_t begin, count;
  Buffer<Word> x;                               // [count, D], times scale / log 2
  Buffer<Word> direction;                       // [count, D], or nothing
  Buffer<Word> lse, entropy, weight, constant;  // [count]: see TokenTerms
  Buffer<bool> finite;                          // [count]
  Word* scores = nullptr;  // [code blocks, token blocks, BLOCK_TOKENS, stride] where they are kept
  Word* along = nullptr;   // likewise
  bool scored = false;     // these are

  TokenTerms<Word> terms(int64_t n) const {
    return {lse.get() + n, entropy.get() + n, weight.get() + n, constant.get() + n};
  }
};

template <class Word>
struct SoftmaxScratch {
  Buffer<Word> panels;            // [block / width, D, width]
  Buffer<Word> dpanels;           // likewise, or nothing
  Buffer<Word> bias, dcode_sums;  // [block]
  Buffer<Word> zeros;             // [block]
  Buffer<Word> scores, along;     // [BLOCK_TOKENS, stride]; along or nothing
  Buffer<double> totals;          // [block]
};

// One block, where it lies, and its logits.
template <class Word>
struct SoftmaxVisit {
  SoftmaxScratch<Word>& scratch;
  int64_t chunk, group;
  int64_t code, codes;    // first, and how many without the padding
  int64_t token, tokens;  // first in the strip, and how many
  ScoreBlock<Word> block;
};

template <class Word>
struct SoftmaxCall {
  const SoftmaxTable<Word>& table;
  Tokens<const Word> x;    // [B, T, D]
  const Word* codebook;    // [K, D]
  const Word* bias;        // [K] or null
  const Word* dcode_sums;  // [K] or null
  int64_t codes;
  double scale;
  SoftmaxPlan plan;

  int64_t dim() const { return x.dim; }
  int64_t padded_codes() const { return round_up(codes, CODES_UNIT); }
  double operations(int64_t tokens, double products) const {
    return static_cast<double>(tokens) * codes * (products * x.dim + 20.0);
  }

  template <class F>
  void for_strips(const F& f) const {
    for (int64_t begin = 0; begin < x.count(); begin += plan.strip) {
      f(begin, x.count() - begin < plan.strip ? x.count() - begin : plan.strip);
    }
  }

  // A token with a number that is not finite has x = 0 and no part in any sum: its lse is infinite.
  TokenStrip<Word> pack_tokens(int64_t begin, int64_t count, const Word* lse) const {
    TokenStrip<Word> strip{begin,
                           count,
                           Buffer<Word>(count * dim()),
                           Buffer<Word>(),
                           Buffer<Word>(count),
                           Buffer<Word>(count),
                           Buffer<Word>(count),
                           Buffer<Word>(count),
                           Buffer<bool>(count)};
    const Word factor = static_cast<Word>(scale / LOG_2);
    for_each_range(count, BLOCK_TOKENS, 4.0 * count * dim(), [&](int64_t first, int64_t last) {
      load_rows(x, begin + first, begin + last, strip.x.get() + first * dim());
      for (int64_t n = first; n < last; ++n) {
        Word* row = strip.x.get() + n * dim();
        bool finite = true;
        for (int64_t d = 0; d < dim(); ++d) {
          finite = finite && std::isfinite(row[d]);
          row[d] *= factor;
        }
        for (int64_t d = 0; d < dim() && !finite; ++d) row[d] = Word(0);
        strip.finite[n] = finite;
        strip.lse[n] = lse != nullptr && finite ? static_cast<Word>(lse[begin + n] / LOG_2)
                                                : std::numeric_limits<Word>::infinity();
        strip.entropy[n] = strip.weight[n] = strip.constant[n] = Word(0);
      }
    });
    return strip;
  }

  SoftmaxScratch<Word> make_scratch(bool along, bool gradient) const {
    const int64_t words = plan.block * dim(), scores = BLOCK_TOKENS * plan.stride();
    SoftmaxScratch<Word> scratch{Buffer<Word>(words),
                                 Buffer<Word>(gradient ? words : 0),
                                 Buffer<Word>(plan.block),
                                 Buffer<Word>(plan.block),
                                 Buffer<Word>(plan.block),
                                 Buffer<Word>(scores),
                                 Buffer<Word>(along ? scores : 0),
                                 Buffer<double>(plan.block)};
    for (int64_t k = 0; k < plan.block; ++k) scratch.zeros[k] = Word(0);
    for (int64_t i = 0; i < scores; ++i) scratch.scores[i] = Word(0);  // rows of padding are read, not used
    return scratch;
  }

  // The panels, biases and sums' gradients of codes [first, first + count).
  void open_block(int64_t first, int64_t count, SoftmaxScratch<Word>& scratch) const {
    table.pack_codes(codebook + first * dim(), count, dim(), scratch.panels.get());
    for (int64_t k = 0; k < plan.block; ++k) {
      const bool code = k < count;
      scratch.bias[k] = !code             ? -std::numeric_limits<Word>::infinity()
                        : bias == nullptr ? Word(0)
                                          : static_cast<Word>(bias[first + k] / LOG_2);
      scratch.dcode_sums[k] = code && dcode_sums != nullptr ? dcode_sums[first + k] : Word(0);
    }
  }

  // Calls begin(first token, tokens, chunk) for every item, open(visit) and close(visit) for every block of
  // codes and visit(visit) for its blocks of tokens.
  template <class Begin, class Open, class Visit, class Close>
  void for_blocks(const TokenStrip<Word>& strip, double products, bool along, bool gradient,
                  const Begin& begin, const Open& open, const Visit& visit, const Close& close) const {
    const int64_t groups = ceil_div(strip.count, plan.group);
    for_each_item<SoftmaxScratch<Word>>(
        groups * plan.chunks, operations(strip.count, products),
        [&] { return make_scratch(along, gradient); },
        [&](int64_t item, SoftmaxScratch<Word>& scratch) {
          const int64_t chunk = item / groups, group = item % groups;
          const int64_t first = group * plan.group;
          const int64_t last = first + plan.group < strip.count ? first + plan.group : strip.count;
          const int64_t end = (chunk + 1) * plan.chunk < codes ? (chunk + 1) * plan.chunk : codes;
          begin(first, last - first, chunk);
          for (int64_t code = chunk * plan.chunk; code < end; code += plan.block) {
            const int64_t count = end - code < plan.block ? end - code : plan.block;
            open_block(code, count, scratch);
            SoftmaxVisit<Word> place{scratch, chunk, group, code, count, first, 0, {}};
            place.block = {scratch.scores.get(), along ? scratch.along.get() : nullptr, plan.stride(), 0,
                           round_up(count, table.width)};
            open(place);
            for (int64_t token = first; token < last; token += BLOCK_TOKENS) {
              place.token = token;
              place.tokens = place.block.tokens = last - token < BLOCK_TOKENS ? last - token : BLOCK_TOKENS;
              if (plan.keep) use_kept(strip, along, place);
              if (!strip.scored) score(strip, place);
              visit(place);
            }
            close(place);
          }
        });
  }

  // The same where items and blocks need nothing of their own.
  template <class Visit>
  void for_blocks(const TokenStrip<Word>& strip, double products, bool along, const Visit& visit) const {
    const auto nothing = [](const SoftmaxVisit<Word>&) {};
    for_blocks(strip, products, along, false, [](int64_t, int64_t, int64_t) {}, nothing, visit, nothing);
  }

  int64_t kept_numbers(int64_t count) const {
    return ceil_div(codes, plan.block) * ceil_div(count, BLOCK_TOKENS) * BLOCK_TOKENS * plan.stride();
  }

  void use_kept(const TokenStrip<Word>& strip, bool along, SoftmaxVisit<Word>& place) const {
    const int64_t token_blocks = ceil_div(strip.count, BLOCK_TOKENS);
    const int64_t number = place.code / plan.block * token_blocks + place.token / BLOCK_TOKENS;
    const int64_t at = number * BLOCK_TOKENS * plan.stride();
    place.block.scores = strip.scores + at;
    if (along) place.block.along = strip.along + at;
  }

  void score(const TokenStrip<Word>& strip, const SoftmaxVisit<Word>& place) const {
    const ScoreBlock<Word>& block = place.block;
    const SoftmaxScratch<Word>& scratch = place.scratch;
    table.score(strip.x.get() + place.token * dim(), scratch.panels.get(), scratch.bias.get(), block.tokens,
                block.codes, dim(), block.scores, block.stride);
    if (block.along == nullptr) return;
    table.score(strip.direction.get() + place.token * dim(), scratch.panels.get(), scratch.zeros.get(),
                block.tokens, block.codes, dim(), block.along, block.stride);
  }
};

}  // namespace cpu
}  // namespace vqkernels
