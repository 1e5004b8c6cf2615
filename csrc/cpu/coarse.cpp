// Packing of the codebook for a coarse pass.
#include "coarse.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "../checks.h"

namespace vqkernels {
namespace cpu {
namespace {

// Of a block of panels in the L2 cache. With small codes fewer, larger blocks pay; with large ones the room
// that is left for the candidates' own numbers does (measured on a Zen 5 core with 1 MiB: 1 to 3 % each).
constexpr int64_t BLOCK_BYTES = 384 * 1024;
constexpr int64_t SMALL_DIM_BLOCK_BYTES = 576 * 1024;
constexpr int64_t BLOCK_PANELS = 256;  // bounds the granule scores that a tile leaves per block
constexpr int64_t SAMPLE = 64;         // codes looked at to choose centre and scale
constexpr int64_t SMALL_DIM =
    48;  // up to here granules take several panels: minima would cost as much as products
constexpr int64_t PANELS_A_GRANULE = 4;
constexpr int64_t LARGE_DIM = 96;    // from here on, and for few codes, it pays to keep every code's score:
constexpr int64_t FEW_CODES = 2048;  // there is less to rerank
constexpr double SAME_SCALE = 8.0;   // norms this far apart may share a scale
constexpr int64_t FEW_SMALL = 64;    // codes that are smaller still share it, too
constexpr int SMALLEST_SCALES =
    12;  // factors of SAME_SCALE below the middle norm that get a scale of their own

double squared_norm(const float* row, const std::vector<float>& centre, int64_t dim) {
  double square = 0.0;
  for (int64_t d = 0; d < dim; ++d) {
    const double value = static_cast<double>(row[d]) - centre[d];
    square += value * value;
  }
  return std::isfinite(square) ? square : 0.0;  // the packing finds what is not finite
}

double middle_of(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

std::vector<float> mean_of(const CodeRows& codes, const std::vector<int64_t>& sample) {
  std::vector<double> sum(codes.dim, 0.0);
  for (const int64_t k : sample) {
    for (int64_t d = 0; d < codes.dim; ++d) sum[d] += codes.rows[k * codes.dim + d];
  }
  std::vector<float> mean(codes.dim);
  for (int64_t d = 0; d < codes.dim; ++d) mean[d] = static_cast<float>(sum[d] / sample.size());
  return mean;
}

// Any centre and scale give right codes; good ones only make the error bound small. Codes that lie far from
// the first mean are left out of the second.
struct Centre {
  std::vector<float> value;  // [D]
  double square;             // a middling |c - centre|^2
};

Centre choose_centre(const CodeRows& codes) {
  std::vector<int64_t> sample;
  for (int64_t k = 0; k < codes.size; k += ceil_div(codes.size, SAMPLE)) sample.push_back(k);
  Centre centre;
  for (int round = 0; round < 3; ++round) {
    centre.value =
        codes.inverse_norm == nullptr ? mean_of(codes, sample) : std::vector<float>(codes.dim, 0.0f);
    std::vector<double> squares;
    for (const int64_t k : sample)
      squares.push_back(squared_norm(codes.rows + k * codes.dim, centre.value, codes.dim));
    centre.square = codes.inverse_norm == nullptr ? middle_of(squares) : 1.0;
    if (codes.inverse_norm != nullptr) break;
    std::vector<int64_t> near;
    for (size_t i = 0; i < sample.size(); ++i) {
      if (squares[i] <= 16.0 * centre.square) near.push_back(sample[i]);
    }
    if (near.size() == sample.size() || near.empty()) break;
    sample = near;
  }
  for (float& value : centre.value) {
    if (!std::isfinite(value)) value = 0.0f;
  }
  centre.value.resize((codes.dim / 16 + 1) * 16, 0.0f);
  return centre;
}

int exponent_for(double square) {
  return square > 0.0 && std::isfinite(square) ? std::clamp(-(std::ilogb(square) / 2), -140, 140) : 0;
}

// |c - centre|^2 of every code, not scaled; throws where one is not finite.
std::vector<double> measure(const KernelTable& table, const CoarseBook& book, const CodeRows& codes,
                            int exponent) {
  std::vector<double> squares(codes.size);
  std::atomic<bool> finite{true};
  const Packing packing = book.packing({exponent, 0.0, 0.0}, codes.rows + codes.size * codes.dim);
  const double unit = std::ldexp(1.0, -2 * exponent);
  for_each_range(codes.size, 256, 4.0 * codes.size * codes.dim, [&](int64_t begin, int64_t end) {
    float scaled[256];
    table.measure_rows(codes.rows + begin * codes.dim, end - begin, packing, scaled);
    for (int64_t k = begin; k < end; ++k) {
      squares[k] = scaled[k - begin] * unit;
      if (scaled[k - begin] > 0x1p-40f && scaled[k - begin] < 0x1p80f) continue;
      const float* row = codes.rows + k * codes.dim;
      if (!all_finite(row, codes.dim)) finite = false;
      squares[k] = squared_norm(row, book.centre, codes.dim);
    }
  });
  check_codebook_finite(finite);
  return squares;
}

// Which scale a code has: 0 for the bulk, others for codes far out or, if they are many, far in.
std::vector<int32_t> sort_by_norm(const std::vector<double>& squares, double middle) {
  std::vector<int32_t> scale_of(squares.size());
  const double step = SAME_SCALE * SAME_SCALE;
  int64_t small = 0;
  for (size_t k = 0; k < squares.size(); ++k) {
    if (squares[k] <= middle * step && squares[k] * step >= middle) continue;
    const double steps = std::log(squares[k] / middle) / std::log(step);
    scale_of[k] = static_cast<int32_t>(std::clamp(std::trunc(steps), -1.0 * SMALLEST_SCALES, 1000.0));
    small += scale_of[k] < 0;
  }
  if (small <= FEW_SMALL) {
    for (int32_t& scale : scale_of) scale = std::max(scale, 0);
  }
  return scale_of;
}

// `codes` codes in slots from `first_panel` on.
void cut_blocks(CoarseBook& book, int32_t scale, int64_t first_panel, int64_t codes) {
  const int64_t block_bytes = book.dim <= SMALL_DIM ? SMALL_DIM_BLOCK_BYTES : BLOCK_BYTES;
  const int64_t most = std::clamp<int64_t>(block_bytes / book.panel_bytes(), 1, BLOCK_PANELS);
  const int64_t group = std::max(book.group, int64_t{1});
  const int64_t step = std::max(most / group, int64_t{1}) * group;
  const int64_t panels = ceil_div(codes, book.width);
  for (int64_t first = 0; first < panels; first += step) {
    const int64_t count = std::min(step, panels - first);
    const int64_t held = std::min(count * book.width, codes - first * book.width);
    book.blocks.push_back({scale, first_panel + first, count, held, CodeBound{}});
  }
}

double largest_norm(const std::vector<double>& squares) {
  return std::sqrt(*std::max_element(squares.begin(), squares.end()));
}

// The reach is that of the packed float32 values, which are rounded.
CoarseScale make_scale(double norm) {
  const int exponent = exponent_for(norm * norm);
  return {exponent, std::ldexp(1.0, 2 * exponent), std::ldexp(norm, exponent) * (1.0 + 1e-4)};
}

void plan_one_scale(CoarseBook& book, double norm) {
  book.scales = {make_scale(norm)};
  cut_blocks(book, 0, 0, book.size);
}

// Slots in the order of their scales, each beginning a new panel.
void plan_scales(CoarseBook& book, const std::vector<double>& squares, const std::vector<int32_t>& scale_of) {
  std::vector<int64_t> codes(book.size);
  std::iota(codes.begin(), codes.end(), int64_t{0});
  std::stable_sort(codes.begin(), codes.end(),
                   [&](int64_t a, int64_t b) { return scale_of[a] < scale_of[b]; });
  for (int64_t begin = 0; begin < book.size;) {
    int64_t end = begin;
    double largest = 0.0;
    for (; end < book.size && scale_of[codes[end]] == scale_of[codes[begin]]; ++end) {
      largest = std::max(largest, squares[codes[end]]);
    }
    const int64_t first_panel = static_cast<int64_t>(book.order.size()) / book.width;
    // all at the centre: any reach holds for them, and that of the next codes keeps their bound small
    if (largest == 0.0 && end < book.size) largest = squares[codes[end]];
    book.scales.push_back(make_scale(std::sqrt(largest)));
    const int64_t panels = ceil_div(end - begin, book.width);
    cut_blocks(book, static_cast<int32_t>(book.scales.size()) - 1, first_panel, end - begin);
    for (int64_t slot = 0; slot < panels * book.width; ++slot) {
      book.order.push_back(codes[begin + slot % (end - begin)]);
    }
    begin = end;
  }
}

CoarseBook start_book(const CoarsePass& pass, const CodeRows& codes, std::vector<float> centre) {
  const int64_t width = pass.vectors * pass.lanes;
  const bool apart = codes.dim >= LARGE_DIM || codes.size <= FEW_CODES;
  const int64_t group = apart ? 0 : codes.dim <= SMALL_DIM ? PANELS_A_GRANULE : 1;
  return {&pass, codes.size, codes.dim, codes.inverse_norm != nullptr, width, group, std::move(centre), {},
          {},    {},         Panels()};
}

}  // namespace

ScalePair scale_pair(int exponent) {
  return {std::ldexp(1.0f, exponent / 2), std::ldexp(1.0f, exponent - exponent / 2)};
}

bool all_finite(const float* values, int64_t count) {
  int bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= !(values[i] - values[i] == 0.0f);
  return bad == 0;
}
bool all_finite(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double value) { return std::isfinite(value); });
}

void check_codebook_finite(bool finite) { check(finite, "codebook: expected finite values, got NaN or Inf"); }

Packing CoarseBook::packing(const CoarseScale& scale, const float* end) const {
  const ScalePair factors = scale_pair(scale.exponent);
  const double target = 32764.0 - std::sqrt(static_cast<double>(dim));  // rounding adds to a norm of 2^15
  const double code_factor = scale.reach > 0.0 ? target / scale.reach : 1.0;
  return {centre.data(), factors.first, factors.second, dim, cosine, end, target, code_factor};
}

CodeBound pack_block(const CoarseBook& book, const CodeRows& codes, const CoarseBlock& block,
                     char* panels) {  // [block.count, panel_words]
  constexpr int64_t MOST_WIDTH = 64;
  const float* rows[MOST_WIDTH];
  double inverse_norms[MOST_WIDTH];
  const Packing packing = book.packing(book.scales[block.scale], codes.rows + codes.size * codes.dim);
  CodeBound bound{};
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t slot = (block.first_panel + i) * book.width;
    for (int64_t j = 0; j < book.width; ++j) {
      const int64_t k = book.code_of(slot + j);
      rows[j] = codes.rows + k * codes.dim;
      if (book.cosine) inverse_norms[j] = codes.inverse_norm[k];
    }
    book.pass->pack_panel(rows, book.cosine ? inverse_norms : nullptr, packing,
                          panels + i * book.panel_bytes(), &bound);
  }
  return bound;
}

CoarseBook plan_coarse(const CoarsePass& pass, const CodeRows& codes) {
  const Centre centre = choose_centre(codes);
  CoarseBook book = start_book(pass, codes, centre.value);
  plan_one_scale(book, std::sqrt(centre.square));
  return book;
}

void restrict_codes(CoarseBook& book, const std::vector<int64_t>& codes) {
  book.size = static_cast<int64_t>(codes.size());
  book.order = codes;
  for (int64_t slot = book.size; slot < ceil_div(book.size, book.width) * book.width; ++slot) {
    book.order.push_back(codes[slot % book.size]);
  }
  book.blocks.clear();
  cut_blocks(book, 0, 0, book.size);
}

CoarseBook pack_coarse(const KernelTable& table, const CoarsePass& pass, const CodeRows& codes,
                       Panels spare) {
  const Centre centre = choose_centre(codes);
  CoarseBook book = start_book(pass, codes, centre.value);
  if (book.cosine) {
    check_codebook_finite(all_finite(codes.rows, codes.size * codes.dim));
    plan_one_scale(book, 1.0);
  } else {
    const std::vector<double> squares = measure(table, book, codes, exponent_for(centre.square));
    const std::vector<int32_t> scale_of = sort_by_norm(squares, centre.square);
    const auto [least, most] = std::minmax_element(scale_of.begin(), scale_of.end());
    if (*least == 0 && *most == 0) {
      plan_one_scale(book, largest_norm(squares));
    } else {
      plan_scales(book, squares, scale_of);
    }
  }
  const CoarseBlock& last = book.blocks.back();
  const int64_t bytes = (last.first_panel + last.count) * book.panel_bytes();
  book.panels = spare.bytes == bytes ? std::move(spare) : Panels{bytes, Buffer<char>(bytes)};
  for_each_range(
      static_cast<int64_t>(book.blocks.size()), 1, 8.0 * book.size * book.dim, [&](int64_t i, int64_t) {
        CoarseBlock& block = book.blocks[i];
        block.bound =
            pack_block(book, codes, block, book.panels.memory.get() + block.first_panel * book.panel_bytes());
      });
  return book;
}

}  // namespace cpu
}  // namespace vqkernels
