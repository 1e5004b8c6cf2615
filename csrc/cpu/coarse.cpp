// Packing of the codebook for the float32 pass.
#include "coarse.h"

#include <algorithm>
#include <cmath>

#include "../checks.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t BLOCK_BYTES =
    384 * 1024;  // of the L2 cache: 262 GFLOP/s with 128 to 512 KiB alike on a Zen 5 core
constexpr int64_t BLOCK_PANELS = 128;  // bounds the granule scores that a tile leaves per block
constexpr int64_t SAMPLE = 256;        // codes looked at to choose centre and scale

// Any centre and scale give right codes; good ones only make the error bound small.
void choose_centre(CoarseBook& book, const float* rows) {
  const int64_t step = ceil_div(book.size, SAMPLE);
  std::vector<double> sum(book.dim, 0.0);
  double count = 0.0;
  for (int64_t k = 0; k < book.size; k += step, count += 1.0) {
    for (int64_t d = 0; d < book.dim; ++d) sum[d] += rows[k * book.dim + d];
  }
  for (int64_t d = 0; d < book.dim; ++d) book.centre[d] = static_cast<float>(sum[d] / count);
}

double largest_offset(const CoarseBook& book, const float* rows, int64_t step) {
  double largest = 0.0;
  for (int64_t k = 0; k < book.size; k += step) {
    for (int64_t d = 0; d < book.dim; ++d) {
      largest = std::max(largest, std::fabs(static_cast<double>(rows[k * book.dim + d]) - book.centre[d]));
    }
  }
  return largest;
}

int exponent_for(double largest) {
  return largest > 0.0 && std::isfinite(largest) ? -std::ilogb(largest) : 0;
}

bool all_finite(const float* values, int64_t count) {
  int bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= !(values[i] - values[i] == 0.0f);
  return bad == 0;
}

// Codes of unit length; what float32 rounds off is in the bound.
void normalize_rows(const float* rows, const double* inverse_norm, int64_t count, int64_t dim, float* out) {
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t d = 0; d < dim; ++d)
      out[k * dim + d] = static_cast<float>(rows[k * dim + d] * inverse_norm[k]);
  }
}

double pack_panel(const CoarseBook& book, int64_t index, float* unit, float* panel) {
  const int64_t first = index * book.width;
  const int64_t count = std::min(book.width, book.size - first);
  const float* codes = book.rows + first * book.dim;
  if (!all_finite(codes, count * book.dim)) return std::nan("");
  const ScalePair scale = scale_pair(book.exponent);
  if (book.inverse_norm != nullptr) {
    normalize_rows(codes, book.inverse_norm + first, count, book.dim, unit);
    codes = unit;
  }
  const double largest =
      book.table->pack_panel(codes, book.centre.data(), scale.first, scale.second, count, book.dim, panel);
  if (book.inverse_norm != nullptr) std::fill(panel, panel + count, 0.0f);  // the score is -x.c
  return largest;
}

// Returns the largest |c|^2 of all; NaN where an entry is not finite.
double pack_blocks(CoarseBook& book) {
  for_each_range(static_cast<int64_t>(book.blocks.size()), 1, 8.0 * book.size * book.dim,
                 [&](int64_t begin, int64_t) {
                   CoarseBlock& block = book.blocks[begin];
                   float* panels = book.panels.get() + block.first_panel * book.panel_size();
                   block.largest_square = pack_block(book, block, panels);
                 });
  double largest = 0.0;
  for (const CoarseBlock& block : book.blocks) {
    if (!(block.largest_square <= largest)) largest = block.largest_square;
    if (std::isnan(largest)) break;
  }
  return largest;
}

void cut_blocks(CoarseBook& book) {
  const int64_t panels = ceil_div(book.size, book.width);
  const int64_t panel_bytes = book.panel_size() * static_cast<int64_t>(sizeof(float));
  const int64_t step = std::clamp<int64_t>(BLOCK_BYTES / panel_bytes, 1, BLOCK_PANELS);
  for (int64_t first = 0; first < panels; first += step) {
    book.blocks.push_back({first, std::min(step, panels - first), 0.0});
  }
}

}  // namespace

ScalePair scale_pair(int exponent) {
  return {std::ldexp(1.0f, exponent / 2), std::ldexp(1.0f, exponent - exponent / 2)};
}

void check_codebook_finite(bool finite) { check(finite, "codebook: expected finite values, got NaN or Inf"); }

CoarseBook plan_coarse(const KernelTable& table,
                       const float* rows,           // [K, D]
                       const double* inverse_norm,  // [K] or null
                       int64_t size, int64_t dim) {
  const int64_t width = table.vectors * table.lanes;
  const std::vector<float> zeros(dim, 0.0f);
  CoarseBook book{&table, rows, inverse_norm, size, dim, width, zeros, 0, {}, Buffer<float>()};
  cut_blocks(book);
  if (inverse_norm == nullptr) {
    choose_centre(book, rows);
    book.exponent = exponent_for(largest_offset(book, rows, ceil_div(size, SAMPLE)));
  }
  return book;
}

double pack_block(const CoarseBook& book, const CoarseBlock& block,
                  float* panels) {  // [block.count, 1 + D, width]
  const Buffer<float> unit(book.inverse_norm != nullptr ? book.width * book.dim : 0);
  double largest = 0.0;
  for (int64_t i = 0; i < block.count; ++i) {
    const double square = pack_panel(book, block.first_panel + i, unit.get(), panels + i * book.panel_size());
    if (!(square <= largest)) largest = square;
    if (std::isnan(square)) break;
  }
  return largest;
}

void pack_coarse(CoarseBook& book) {
  book.panels = Buffer<float>(ceil_div(book.size, book.width) * book.panel_size());
  double largest = pack_blocks(book);
  if (largest > 0x1p80) {  // the sample was no guide to the largest code
    book.exponent = exponent_for(largest_offset(book, book.rows, 1));
    largest = pack_blocks(book);
  }
  check_codebook_finite(!std::isnan(largest));
}

}  // namespace cpu
}  // namespace vqkernels
