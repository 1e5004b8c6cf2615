// What every coarse kernel shares: its operands, how the work is split, what it writes, and the epilogue.
//
// The coarse pass is one fp16 matrix product with float32 sums, of which only the lowest scores are kept:
//   score[n, k] = tokens[n, :] . codes[k, :]              split codes (D <= 48)
//   score[n, k] = tokens[n, :] . codes[k, :] + bias * scale   plain
// Lower is nearer (the codes' operand is negated). nearest_prepare.cuh writes the operands, nearest_mma.cuh
// and nearest_hopper.cuh are the kernels, nearest_finish.cuh reads the states and proves or reranks.
//
// split: x = xh + xl, c = ch + cl in two fp16 terms each, [xh xh xl | 256 s, s, s] . -[ch cl ch | -h1 -h2
// -h3] with |c|^2 / 2 = 256 h1 + h2 + h3 and s the token's scale over the codebook's. Here the epilogue is
// the limit (search of 8 to 48 dimensions costs less than comparing its results), so that of every granule of
// eight codes only the lowest score is kept, and the granule is scored again afterwards, in float64.
// plain: one term, [x] . -[c]; the bias is |c|^2 / 2 in float32, and single codes are kept.
#pragma once

#include <cmath>
#include <cstdint>

#include "tokens.cuh"

namespace vqkernels::cuda {

constexpr int32_t kNoCode = INT32_MAX;
constexpr int kGranule = 8;         // codes that one lane meets side by side
constexpr int64_t kCodeRows = 256;  // the codes' operand is padded to a multiple of this: no tile is ragged
constexpr int64_t kDepthStep = 16;  // both operands' depth is a multiple of this, rows are 32-byte aligned
constexpr int64_t kMostSplitDims = 48;  // up to here two terms of fp16 cost less than the epilogue

VQ_HOST_DEVICE bool splits_terms(int64_t dim) { return dim <= kMostSplitDims; }

// Rows past N are to be read as zeros (or anything: nothing of theirs is written). Rows of `codes` past K,
// and codes beyond fp16's range, score +inf. Nothing here is NaN for a row < N.
struct Operands {
  const float16* tokens;  // [N, depth]
  const float16* codes;   // [code_rows, depth]; row p holds code code_of_row(p)
  const float* bias;      // [code_rows], of the code in row p; plain only
  const float* scale;     // [N], > 0; plain only
  int64_t token_count;    // N
  int64_t code_rows;      // K, rounded up to kCodeRows
  int64_t depth;
};

// In an mma or wgmma accumulator, lane 4 i + q of a warp holds columns 8 j + 2 q and 8 j + 2 q + 1 of every
// eight. Codes lie so in each 32 rows of the operand that these, for j = 0..3, are eight successive codes:
// row 32 w + 8 j + 2 q + e holds code 32 w + 8 q + 2 j + e, and lane q's granule is number 4 w + q.
VQ_HOST_DEVICE int64_t code_of_row(int64_t row) {
  int64_t j = row >> 3 & 3, q = row >> 1 & 3, e = row & 1;
  return (row & ~int64_t{31}) + 8 * q + 2 * j + e;
}

// The lowest score, its code, and the lowest score among all others: what a kernel keeps for one token of
// those granules that one lane meets. In split mode `code` is the first of its granule and `second` the
// lowest of the other granules.
template <typename S>
struct Best {
  S first;
  S second;
  int32_t code;

  VQ_DEVICE void offer(S score, int32_t k) {
    second = std::fmin(second, std::fmax(first, score));
    code = score < first ? k : code;
    first = std::fmin(first, score);
  }

  VQ_DEVICE void merge(const Best& other) {
    bool theirs = other.first < first || (other.first == first && other.code < code);
    S loser = theirs ? first : other.first;
    S second_best = theirs ? other.second : second;
    first = theirs ? other.first : first;
    code = theirs ? other.code : code;
    second = loser < second_best ? loser : second_best;
  }

  VQ_DEVICE Best from_lane(int mask) const {
    return {shuffle_xor(first, mask), shuffle_xor(second, mask), shuffle_xor(code, mask)};
  }
};

template <typename S>
VQ_DEVICE Best<S> no_best() {
  return {static_cast<S>(INFINITY), static_cast<S>(INFINITY), kNoCode};
}

// How the scores are shared out. Work item = split * token_tiles + token tile, so that blocks that run at the
// same time read the same codes. A split is `granules_per_split` successive granules (the last one may be
// shorter), a whole number of tiles; state (n, split, group) covers those granules g of the split that have
// g % groups == group. States lie at [(n * splits + split) * groups + group].
struct CoarsePlan {
  int64_t token_tiles;
  int64_t splits;
  int64_t granules_per_split;
  int64_t granules;  // of the whole codebook
  int64_t groups;

  VQ_HOST_DEVICE int64_t items() const { return token_tiles * splits; }
  VQ_HOST_DEVICE int64_t states() const { return splits * groups; }  // per token
  VQ_HOST_DEVICE int64_t state(int64_t n, int64_t split, int64_t group) const {
    return (n * splits + split) * groups + group;
  }
};

// The shape of one kernel: tokens and codes of a block's tile, groups of lanes per token, and how many of its
// blocks one multiprocessor holds. kCodeRows is a multiple of `codes`, codes / kGranule of `groups`.
struct CoarseTile {
  int64_t tokens, codes, groups, blocks;
};

// A state whose runner-up is too close has all its codes scored again, so that a state should not cover many:
// single fp16 terms leave several per cent of the tokens with two candidates, split ones hardly any. Nor
// should a token have many states: 12 bytes each.
constexpr int64_t kCodesPerState = 256;
constexpr int64_t kStatesPerToken = 64;

inline CoarsePlan plan_coarse(const CoarseTile& tile, int64_t tokens, int64_t code_rows, bool split,
                              int64_t processors) {
  int64_t token_tiles = ceil_div(tokens, tile.tokens), code_tiles = code_rows / tile.codes;
  int64_t to_fill = ceil_div(tile.blocks * processors, token_tiles);
  int64_t to_bound = ceil_div(code_rows, tile.groups * kCodesPerState * (split ? 16 : 1));
  to_bound = smaller(to_bound, kStatesPerToken / tile.groups);
  int64_t wanted = to_fill > to_bound ? to_fill : to_bound;
  int64_t tiles_per_split = ceil_div(code_tiles, smaller(wanted, code_tiles));
  return {token_tiles, ceil_div(code_tiles, tiles_per_split), tiles_per_split * tile.codes / kGranule,
          code_rows / kGranule, tile.groups};
}

// Adds one granule's eight scores to its group's state. `score(i)` is the sum for code `granule * 8 + i`, in
// an order that is the accumulator's own: i = 2 j + e for column 8 j + 2 q + e.
template <bool SPLIT, typename Score>
VQ_DEVICE void offer_granule(Best<float>& best, int64_t granule, Score score) {
  int32_t code = static_cast<int32_t>(granule) * kGranule;
  if constexpr (SPLIT) {
    float lowest = score(0);
#pragma unroll
    for (int i = 1; i < kGranule; ++i) lowest = std::fmin(lowest, score(i));
    best.offer(lowest, code);
  } else {
#pragma unroll
    for (int i = 0; i < kGranule; ++i) best.offer(score(i), code + i);
  }
}

}  // namespace vqkernels::cuda
