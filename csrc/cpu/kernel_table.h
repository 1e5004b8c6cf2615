// The inner loops of `nearest`, one table of functions for each instruction set, chosen at run time.
#pragma once

#include <cstdint>

namespace vqkernels {
namespace cpu {

// What is done to rows before a pass rounds them to its own words.
struct Packing {
  const float* centre;  // [D], subtracted first
  float scale, scale2;  // then multiplied, one after the other
  int64_t dim;
  bool cosine;       // no bias: the score is -x.c
  const float* end;  // rows may be read up to here, beyond their own last number
  // Of the int16 pass: norms are brought to `target` or less, those of codes by this factor.
  double target;
  double code_factor;
};

// What the score of a packed token and a packed code is: real score = score / unit, within
//   token.residual * code.largest + token.norm * code.residual + token.low * code.low
//     + token.offset + code.offset   (in score units)
struct TokenBound {
  double unit;
  double norm;
  double residual;
  double offset;
  double low;  // of the part whose product with the codes' is left out
};
struct CodeBound {
  double largest;   // |code|
  double residual;  // |code - packed code|
  double offset;
  double low;
};

// One way to score tokens against codes at low precision. A *tile* is `rows` tokens, [rows, steps] words and
// then what they share; a *panel* is WIDTH = vectors * lanes codes, a row of biases and then their numbers
// transposed, [1 + steps, WIDTH] words (kernel_int8.h and kernel_byte.h have orders of their own). A
// *granule* is one lane of `group` neighbouring panels: vectors * group codes, or a single code where `group`
// is 0. The score of a token and a code stands for h - x.c with h = |c|^2 / 2 (0 for cosine). Words are 32
// bits wide, 64 in the float64 pass.
struct CoarsePass {
  const char* name;
  int word_bytes;
  int rows;  // tokens scored at a time
  int lanes;
  int vectors;
  double largest_score;  // below which scores are sure not to overflow
  int64_t (*steps)(int64_t dim);
  int64_t (*tile_words)(int64_t dim);
  int64_t (*panel_words)(int64_t dim);

  // Scores of `rows` tokens against panels; of every granule only the least is kept. Meanwhile
  // fetched_bytes(count, dim) from `next` on are asked for, into the second cache, where it is not null.
  void (*score_panels)(const void* tile,    // [tile_words]
                       const void* panels,  // [count, panel_words]
                       int64_t count, int64_t dim, int64_t group,
                       void* granule_scores,  // [rows, granules]
                       double* least,         // [rows]
                       const void* next);
  int64_t (*fetched_bytes)(int64_t count, int64_t dim);

  // The same, and the least value of every code over the tile's tokens into `columns`, where that is less
  // than what is there: value = score * factor + offset, by row. Null in the byte and float64 passes, as the
  // next two.
  void (*score_both)(const void* tile,    // [tile_words]
                     const void* panels,  // [count, panel_words]
                     int64_t count, int64_t dim, int64_t group,
                     void* granule_scores,  // [rows, granules]
                     double* least,         // [rows]
                     const float* factors,  // [rows]
                     const float* offsets,  // [rows]
                     float* columns);       // [count, WIDTH]

  // upper = min(upper, columns + error)
  void (*lower_columns)(const float* columns,  // [count], count a multiple of WIDTH
                        int64_t count, float error,
                        float* upper);  // [count]

  // Positions of columns <= upper + error, in order; returns how many.
  int64_t (*find_columns)(const float* columns,  // [count], count a multiple of WIDTH
                          const float* upper,    // [count]
                          int64_t count, float error,
                          int32_t* found);  // [count]

  // Positions and values of the scores <= limit, in order; returns how many there are, or some number above
  // `capacity` if more, and writes at most `capacity`.
  int64_t (*find_scores)(const void* scores,  // [count], count a multiple of lanes
                         int64_t count, double limit,
                         int32_t* found,        // [capacity]
                         double* found_scores,  // [capacity]
                         int64_t capacity);

  // Packs WIDTH codes.
  void (*pack_panel)(const float* const* codes,    // [WIDTH] rows of [D]
                     const double* inverse_norms,  // [WIDTH] for cosine, else null
                     const Packing& packing,
                     void* panel,        // [panel_words]
                     CodeBound* bound);  // raised to hold for these codes too

  // Packs one token into its row of a tile, and the word that the tile's tokens share.
  void (*pack_token)(const float* token,  // [D]
                     const Packing& packing,
                     double norm,     // of the token after centring and scaling, at least
                     double largest,  // of the tile's norms
                     int row,
                     void* tile,  // [tile_words]
                     TokenBound* bound);

  // Multiply-adds on registers alone; returns how many operations these were, two a multiply-add.
  double (*run_peak)(int64_t rounds);
};

struct KernelTable {
  const char* name;
  const CoarsePass* float32;
  const CoarsePass* float64;
  const CoarsePass* int16;  // null where the instruction set has nothing faster than float32's
  const CoarsePass* int8;   // null where this CPU has no tiles
  const CoarsePass* byte;   // null where this CPU multiplies no bytes; in plain loops of the portable table
  bool byte_is_quicker;     // than int16, as measured: `nearest` begins with it

  // squares[j] = |(rows[j] - centre) * scale * scale2|^2, with a relative error below (D / 16 + 10) 2^-24;
  // NaN or infinity where some entry is not finite, or a square overflows.
  void (*measure_rows)(const float* rows,  // [count, D]
                       int64_t count, const Packing& packing,
                       float* squares);  // [count]

  // Sums of a hash over words, 16 of them; see prepared.cpp.
  void (*hash_words)(const uint64_t* words,  // [count]
                     int64_t count,
                     const uint64_t* keys,  // [count rounded up to 8, and 8]
                     uint64_t* sums);       // [16]

  // sum_d (x - c)^2 in float32 for the chosen rows of a codebook, with measure_rows' error; infinity or NaN
  // where one overflows.
  void (*float_distances)(const float* x,         // [D]
                          const float* rows,      // [K, D]
                          int64_t size,           // K
                          const int64_t* chosen,  // [count]
                          int64_t count, int64_t dim,
                          float* out);  // [count]

  // sum_d (x - c)^2 and sum_d x * c in float64 for the chosen rows of a codebook, or the first `count`.
  void (*squared_distances_float)(const float* x,         // [D]
                                  const float* rows,      // [K, D]
                                  const int64_t* chosen,  // [count] or null
                                  int64_t count, int64_t dim,
                                  double* out);            // [count]
  void (*squared_distances_double)(const double* x,        // [D]
                                   const double* rows,     // [K, D]
                                   const int64_t* chosen,  // [count] or null
                                   int64_t count, int64_t dim,
                                   double* out);     // [count]
  void (*dot_products_float)(const float* x,         // [D]
                             const float* rows,      // [K, D]
                             const int64_t* chosen,  // [count] or null
                             int64_t count, int64_t dim,
                             double* out);            // [count]
  void (*dot_products_double)(const double* x,        // [D]
                              const double* rows,     // [K, D]
                              const int64_t* chosen,  // [count] or null
                              int64_t count, int64_t dim,
                              double* out);  // [count]
};

// One a unit; null where the unit was not compiled for this machine's architecture.
const KernelTable* avx512_kernels();
const CoarsePass* avx512_vnni_int16();
const CoarsePass* avx512_vnni_byte();
const CoarsePass* avx512_amx_int8();
const KernelTable* avx2_kernels();
const KernelTable* portable_kernels();
const CoarsePass* portable_int8();  // in plain loops: to test the pass anywhere

// The best table this CPU can run, or the one that VQKERNELS_CPU_ISA names; throws where that cannot run.
const KernelTable& kernels();

}  // namespace cpu
}  // namespace vqkernels
