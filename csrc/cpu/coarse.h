// The codebook prepared for a coarse pass: centred, scaled, packed in panels, with the norms that bound the
// pass's error.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "parallel.h"

namespace vqkernels {
namespace cpu {

// Codes of like norm share a scale, so that one far outlier costs the others no precision. Nearly always one.
struct CoarseScale {
  int exponent;   // codes and tokens are multiplied by 2^exponent
  double square;  // 4^exponent: of a score's unit
  double reach;   // the largest norm of its codes after that
};

// Panels that are searched while they stay in the cache, and what the error bound needs of them.
struct CoarseBlock {
  int32_t scale;
  int64_t first_panel;
  int64_t count;
  int64_t codes;  // in its slots; those of the last panel that are left over hold some codes again
  CodeBound bound;
};

struct Panels {
  int64_t bytes = 0;
  Buffer<char> memory{0};
};

struct CoarseBook {
  const CoarsePass* pass;
  int64_t size;
  int64_t dim;
  bool cosine;
  int64_t width;              // codes in a panel
  int64_t group;              // panels that share granules; 0: every code is a granule
  std::vector<float> centre;  // [D], zeros for cosine; then zeros to the next multiple of 16
  std::vector<CoarseScale> scales;
  std::vector<CoarseBlock> blocks;
  std::vector<int64_t> order;  // code of every slot, a panel's column; empty where slot k is code k
  Panels panels;               // [panels, panel_words]; empty where blocks are packed where they are searched

  int64_t panel_bytes() const { return pass->panel_words(dim) * pass->word_bytes; }
  int64_t tile_bytes() const { return pass->tile_words(dim) * pass->word_bytes; }
  int64_t row_bytes() const { return pass->steps(dim) * pass->word_bytes; }  // of a tile
  int64_t granules(const CoarseBlock& block) const {
    return group == 0 ? block.count * width : ceil_div(block.count, group) * pass->lanes;
  }

  int64_t code_of(int64_t slot) const {
    if (!order.empty()) return order[slot];
    return slot < size ? slot : (slot - size) % size;
  }
  Packing packing(const CoarseScale& scale, const float* end) const;

  // Calls f(code) for every code of a granule; some may come twice.
  template <class F>
  void for_codes(const CoarseBlock& block, int64_t granule, const F& f) const {
    if (group == 0) return f(code_of(block.first_panel * width + granule));
    const int64_t first = granule / pass->lanes * group, lane = granule % pass->lanes;
    const int64_t end = block.count - first < group ? block.count : first + group;
    for (int64_t panel = first; panel < end; ++panel) {
      const int64_t slot = (block.first_panel + panel) * width + lane;
      for (int v = 0; v < pass->vectors; ++v) f(code_of(slot + v * pass->lanes));
    }
  }
};

// The error of a token's scores against a block of codes, in score units; NaN or infinite where nothing is
// known.
inline double error_of(const TokenBound& token, const CodeBound& code) {
  return token.residual * code.largest + token.norm * code.residual + token.low * code.low + token.offset +
         code.offset;
}

// What decides the tokens that a pass cannot; null where that is float64's.
inline const CoarsePass* finer_pass(const KernelTable& table, const CoarsePass& pass) {
  if (&pass != table.byte) return nullptr;
  return table.int16 != nullptr ? table.int16 : table.float32;
}

// Rows of a codebook as they are packed.
struct CodeRows {
  const float* rows;           // [K, D]
  const double* inverse_norm;  // [K] for cosine, else null
  int64_t size;
  int64_t dim;
};

// The whole codebook, packed. Throws where it holds NaN or Inf.
// `spare` is memory that may be used again: touching new pages costs as much as the packing.
CoarseBook pack_coarse(const KernelTable& table, const CoarsePass& pass, const CodeRows& codes, Panels spare);

// Everything but the panels: each block is packed where it is searched. float64 only.
CoarseBook plan_coarse(const CoarsePass& pass, const CodeRows& codes);

// Leaves the book with `codes` alone, in that order.
void restrict_codes(CoarseBook& book, const std::vector<int64_t>& codes);

// Packs one block's panels and returns what bounds it.
CodeBound pack_block(const CoarseBook& book, const CodeRows& codes, const CoarseBlock& block,
                     char* panels);  // [block.count, panel_words]

// 2^exponent as two factors, since 2^exponent itself may lie outside float.
struct ScalePair {
  float first;
  float second;
};
ScalePair scale_pair(int exponent);

bool all_finite(const float* values, int64_t count);
bool all_finite(const double* values, int64_t count);
void check_codebook_finite(bool finite);

}  // namespace cpu
}  // namespace vqkernels
