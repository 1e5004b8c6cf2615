// The inner loops of the streaming softmax, one table of functions for each instruction set.
//
// A *block* is up to BLOCK_TOKENS tokens against up to block_codes(D) codes. Its logits lie in `scores`
// [tokens, stride], in units of log 2, so that exp is a power of two; codes are rounded up to whole panels. A
// *panel* is `width` codes transposed, [D, width].
#pragma once

#include <cstdint>

namespace vqkernels {
namespace cpu {

constexpr int64_t BLOCK_TOKENS = 48;    // a multiple of every pass's rows and tokens
constexpr int64_t LARGEST_BLOCK = 512;  // codes; 48 x 512 logits are 96 KiB, in any L2 cache of today
constexpr int64_t CODES_UNIT = 64;      // blocks and chunks are multiples of it: of every width
constexpr int64_t STRIDE_PADDING = 16;  // of a row of logits: rows a power of two apart share few cache sets

// What a token's logits are compared with and weighted by, after the packing: one number a token each.
template <class Word>
struct TokenTerms {
  const Word* lse;       // log-sum-exp, in units of log 2
  const Word* entropy;   // factor of (logit - lse), in units of log 2
  const Word* weight;    // factor of dcode_sums
  const Word* constant;  // added to f
};

// One block of logits.
template <class Word>
struct ScoreBlock {
  Word* scores;  // [tokens, stride]
  Word* along;   // [tokens, stride]: <direction, code>, or null
  int64_t stride;
  int64_t tokens;
  int64_t codes;  // a multiple of width
};

template <class Word>
struct SoftmaxTable {
  const char* name;
  int64_t width;

  // Codes to panels, zeros after the last.
  void (*pack_codes)(const Word* rows,  // [count, D]
                     int64_t count, int64_t dim,
                     Word* panels);  // [count rounded up to panels, D, width]

  // Panels, times a factor, to rows, or added to them.
  void (*unpack_codes)(const Word* panels,  // [panels, D, width]
                       int64_t count, int64_t dim, Word factor, bool add,
                       Word* rows);  // [count, D]

  // scores = x . codes + bias
  void (*score)(const Word* x,       // [tokens, D]
                const Word* panels,  // [panels, D, width]
                const Word* bias,    // [codes]
                int64_t tokens, int64_t codes, int64_t dim,
                Word* scores,  // [tokens, stride]
                int64_t stride);

  // Running over blocks: m = max l, s = sum 2^(l - m), u = sum 2^(l - m) (l - m).
  void (*fold)(const ScoreBlock<Word>& block, double* maximum, double* sum, double* moment);  // [tokens] each

  // mass += sum_k p and moment += sum_k p f, with p = 2^(l - lse),
  // f = entropy (l - lse) + weight dcode_sums_k + along + constant.
  void (*row_sums)(const ScoreBlock<Word>& block, const TokenTerms<Word>& terms,
                   const Word* dcode_sums,         // [codes]
                   double* mass, double* moment);  // [tokens] each

  // sums_k += sum_n weight_n p_nk
  void (*code_sums)(const ScoreBlock<Word>& block, const TokenTerms<Word>& terms, double* sums);  // [codes]

  // scores = p, or p f; sums_k += sum_n of it
  void (*probabilities)(const ScoreBlock<Word>& block, const TokenTerms<Word>& terms);
  void (*gradients)(const ScoreBlock<Word>& block, const TokenTerms<Word>& terms,
                    const Word* dcode_sums,  // [codes]
                    double* sums);           // [codes]

  // dx += scores codes
  void (*add_dx)(const ScoreBlock<Word>& block,
                 const Word* panels,  // [panels, D, width]
                 int64_t dim,
                 Word* dx);  // [tokens, D]

  // dpanels += scores^T x
  void (*add_dcodes)(const ScoreBlock<Word>& block,
                     const Word* x,  // [tokens, D]
                     int64_t dim,
                     Word* dpanels);  // [panels, D, width]
};

// One a unit; null where the unit was not compiled for this machine's architecture.
const SoftmaxTable<float>* avx512_softmax();
const SoftmaxTable<float>* avx2_softmax();
const SoftmaxTable<float>* portable_softmax();
const SoftmaxTable<double>* float64_softmax();

}  // namespace cpu
}  // namespace vqkernels
