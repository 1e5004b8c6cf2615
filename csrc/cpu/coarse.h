// The codebook prepared for the float32 pass: centred, scaled by a power of two, packed in panels, with the
// norms that bound the pass's error. Made anew in every call.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "parallel.h"

namespace vqkernels {
namespace cpu {

// Panels that are searched while they stay in the cache, and what the error bound needs of them.
struct CoarseBlock {
  int64_t first_panel;
  int64_t count;
  double largest_square;  // of |c| among its codes, after centring and scaling
};

struct CoarseBook {
  const KernelTable* table;
  const float* rows;           // [K, D]
  const double* inverse_norm;  // [K] for cosine, else null
  int64_t size;
  int64_t dim;
  int64_t width;              // codes in a panel
  std::vector<float> centre;  // [D]; zeros for cosine
  int exponent;               // codes and tokens are multiplied by 2^exponent
  std::vector<CoarseBlock> blocks;
  Buffer<float> panels;  // [panels, 1 + D, width]

  int64_t panel_size() const { return (1 + dim) * width; }
  const float* panel(int64_t index) const { return panels.get() + index * panel_size(); }
};

// Everything but the packing itself.
CoarseBook plan_coarse(const KernelTable& table,
                       const float* rows,           // [K, D]
                       const double* inverse_norm,  // [K] for cosine, else null
                       int64_t size, int64_t dim);

// Packs all panels into the book. Throws where the codebook holds NaN or Inf.
void pack_coarse(CoarseBook& book);

// Packs one block's panels and returns its largest |c|^2; NaN where an entry is not finite.
double pack_block(const CoarseBook& book, const CoarseBlock& block,
                  float* panels);  // [block.count, 1 + D, width]

// 2^exponent as two factors, since 2^exponent itself may lie outside float.
struct ScalePair {
  float first;
  float second;
};
ScalePair scale_pair(int exponent);

void check_codebook_finite(bool finite);

}  // namespace cpu
}  // namespace vqkernels
