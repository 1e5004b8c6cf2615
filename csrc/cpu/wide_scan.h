// Tokens that the coarse pass could not decide: all codes in float64, then error-free arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "candidates.h"
#include "coarse.h"
#include "decide.h"
#include "parallel.h"
#include "prepared.h"
#include "tokens.h"

namespace vqkernels {
namespace cpu {

constexpr int64_t CROWD = 4096;  // candidates that it keeps of a token
constexpr int MOST_ROWS = 32;    // of a tile

class WideScan {
 public:
  WideScan(const Book<float>& book, const PreparedCodebook& prepared, const Outputs& out)
      : book_(book), prepared_(prepared), out_(out) {}

  // All undecided tokens of a block against all distinct codes, in float64.
  void decide(const std::vector<int64_t>& undecided,  // of the block
              RowBlock<const float> given, int64_t first, DecideScratch<float>& scratch) {
    const CoarseBook& wide = wide_book();
    const CoarsePass& pass = *wide.pass;
    const int64_t count = static_cast<int64_t>(undecided.size());
    const Buffer<char> tiles(ceil_div(count, pass.rows) * wide.tile_bytes());
    const Buffer<char> panels(wide.blocks[0].count * wide.panel_bytes());
    std::vector<TokenBound> bounds(count);
    std::vector<Crowd> crowds(count);
    std::fill_n(tiles.get() + count / pass.rows * wide.tile_bytes(),
                count % pass.rows > 0 ? wide.tile_bytes() : 0, char{0});
    for (int64_t i = 0; i < count; ++i) {
      const float* row = given[undecided[i]];
      Packing packing = wide.packing(wide.scales[0], row + book_.dim);
      if (book_.cosine) packing.scale = packing.scale2 = 1.0f;
      char* tile = tiles.get() + i / pass.rows * wide.tile_bytes();
      pass.pack_token(row, packing, 0.0, 0.0, static_cast<int>(i % pass.rows), tile, &bounds[i]);
    }
    const TileScores tile_scores(pass.rows, wide.granules(wide.blocks[0]));  // no block has more
    for (size_t b = 0; b < wide.blocks.size(); ++b) {
      CoarseBlock block = wide.blocks[b];
      block.bound = pack_block(wide, book_.code_rows(), block, panels.get());
      for (int64_t base = 0; base < count; base += pass.rows) {
        scan_tile(static_cast<int32_t>(b), block, tiles.get(), panels.get(), base, bounds, crowds,
                  tile_scores);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* row = given[undecided[i]];
      const int64_t n = first + undecided[i];
      if (crowds[i].overfull) {
        scan(book_, row, scratch, out_, n);
        continue;
      }
      CodeList& codes = scratch.codes;
      codes.count = 0;
      crowds[i].drop_beaten();
      for (const Candidate& candidate : crowds[i].candidates) {
        wide.for_codes(wide.blocks[candidate.block], candidate.granule, [&](int64_t k) { codes.add(k); });
      }
      decide_token(book_, row, scratch, out_, n);
    }
  }

 private:
  // What the float64 pass leaves of a token: as many candidates as there are, up to CROWD.
  struct Crowd {
    double upper = std::numeric_limits<double>::infinity();
    bool overfull = false;
    std::vector<Candidate> candidates;

    void drop_beaten() {
      std::erase_if(candidates, [&](const Candidate& candidate) { return !(candidate.lower <= upper); });
    }
  };

  // What the float64 pass makes of one tile of tokens and one block of codes.
  struct TileScores {
    TileScores(int64_t rows, int64_t granules) : scores(rows * granules), values(granules), found(granules) {}

    Buffer<double> scores;  // [rows, granules]
    Buffer<double> values;  // of those of a row that are low enough
    Buffer<int32_t> found;  // their granules
  };

  void scan_tile(int32_t b, const CoarseBlock& block, const char* tiles, const char* panels, int64_t base,
                 const std::vector<TokenBound>& bounds, std::vector<Crowd>& crowds, const TileScores& made) {
    const CoarseBook& wide = wide_book();
    const CoarsePass& pass = *wide.pass;
    const int64_t granules = wide.granules(block);
    double least[MOST_ROWS];
    pass.score_panels(tiles + base / pass.rows * wide.tile_bytes(), panels, block.count, wide.dim, wide.group,
                      made.scores.get(), least, nullptr);
    const int64_t rows = std::min<int64_t>(pass.rows, static_cast<int64_t>(bounds.size()) - base);
    for (int64_t i = 0; i < rows; ++i) {
      Crowd& crowd = crowds[base + i];
      const double error = error_of(bounds[base + i], block.bound);
      if (!std::isfinite(error)) crowd.overfull = true;
      if (crowd.overfull) continue;
      crowd.upper = std::min(crowd.upper, least[i] + error);
      const double limit = crowd.upper + error;
      const int64_t number =
          pass.find_scores(&made.scores[i * granules], granules, limit + std::fabs(limit) * 0x1p-50,
                           made.found.get(), made.values.get(), granules);
      for (int64_t j = 0; j < number; ++j) {
        crowd.candidates.push_back({made.values[j] - error, b, made.found[j]});
      }
      if (static_cast<int64_t>(crowd.candidates.size()) > CROWD) crowd.drop_beaten();
      crowd.overfull = static_cast<int64_t>(crowd.candidates.size()) > CROWD;
    }
  }

  const CoarseBook& wide_book() {
    std::call_once(wide_once_, [&] {
      CodeRows codes = book_.code_rows();
      wide_ = std::make_unique<CoarseBook>(plan_coarse(*book_.table->float64, codes));
      const std::vector<int64_t>& distinct = prepared_.distinct(book_.rows);
      if (static_cast<int64_t>(distinct.size()) < book_.size) restrict_codes(*wide_, distinct);
    });
    return *wide_;
  }

  const Book<float>& book_;
  const PreparedCodebook& prepared_;
  const Outputs& out_;
  std::once_flag wide_once_;
  std::unique_ptr<CoarseBook> wide_;
};

}  // namespace cpu
}  // namespace vqkernels
