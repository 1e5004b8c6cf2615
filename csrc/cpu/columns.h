// The columns of a search: the nearest token of every code, out of the same scores.
//
//   sweep    of every code and tile of tokens the least value = score / unit + |x|^2 / 2, which stands for
//            |x - c|^2 / 2 (cosine: score / unit / |x|, for -cos) within an error that is known: {value -
//            error <= least (value + error)} holds every true minimiser
//   decide   float64 values of the tokens inside the bound, then error-free arithmetic where those tie
//   rest     codes that too many tiles are near, and all of them where a valid token has no scores: the
//            search with the roles exchanged
//
// What a thread keeps is its own until the end, and which tokens it met cannot change an index.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "coarse.h"
#include "coarse_tokens.h"
#include "decide.h"
#include "kernel_table.h"
#include "parallel.h"

namespace vqkernels {
namespace cpu {

constexpr int64_t COLUMN_BYTES = 512 * 1024;       // of the least values that some tiles leave of a block
constexpr uint8_t COLUMN_CAPACITY = 32;            // tiles that a thread keeps of a code
constexpr double COLUMN_ROUNDING = 8.0 * 0x1p-24;  // float32's, of a value and of sums with its error

// A tile whose tokens may be the nearest of a code.
struct ColumnCandidate {
  int64_t first;  // of its tokens, in the thread's `tokens`
  int32_t slot;
  float lower;  // none of them has a lower real value
};

// What one thread knows.
struct ColumnState {
  std::vector<float> upper;   // [slots]: the least real value is not above this
  std::vector<float> lost;    // [slots]: the least `lower` that there was no room for
  std::vector<uint8_t> kept;  // [slots]
  std::vector<ColumnCandidate> candidates;
  std::vector<int64_t> tokens;  // in the order of the tiles, whole ones; -1: none that may be chosen
  bool complete = true;         // no token without scores

  // Of the tokens at hand.
  int64_t first = 0;           // of `tokens`
  std::vector<float> factors;  // [tokens], in the order of the tiles, as the next
  std::vector<float> offsets;  // [tokens]
  std::vector<double> errors;  // [tiles] of the span at hand, below 0 where there is no token
  Buffer<float> least;         // [tiles of the span, slots of the block]
  int64_t span_first = 0;      // token
  std::vector<int32_t> found;  // [slots of the block]
  double relative = 0.0;       // error of the tokens' squares

  void add(int64_t tile, int32_t slot, float lower) {
    if (kept[slot] == COLUMN_CAPACITY) {
      lost[slot] = std::min(lost[slot], lower);
    } else {
      ++kept[slot];
      candidates.push_back({tile, slot, lower});
    }
  }
};

class Columns {
 public:
  // `first` is the lowest token that may be chosen.
  Columns(const CoarseBook& coarse, const uint8_t* allowed, int64_t first)
      : coarse_(coarse), allowed_(allowed), first_(first) {
    for (const CoarseBlock& block : coarse.blocks) {
      slots_ = std::max(slots_, (block.first_panel + block.count) * coarse.width);
      most_ = std::max(most_, block.count * coarse.width);
    }
  }

  // State for one more thread, whose blocks have up to `tokens` tokens. It stays until the end.
  ColumnState* add_state(int64_t tokens) {
    auto state = std::make_unique<ColumnState>();
    const int64_t rows = coarse_.pass->rows, tiles = ceil_div(tokens, rows);
    state->upper.assign(slots_, std::numeric_limits<float>::infinity());
    state->lost.assign(slots_, std::numeric_limits<float>::infinity());
    state->kept.assign(slots_, 0);
    state->factors.resize(tiles * rows);
    state->offsets.resize(tiles * rows);
    state->errors.resize(tiles);
    state->least = Buffer<float>(std::max(COLUMN_BYTES / FLOAT_BYTES, most_));
    state->found.resize(most_);
    state->relative = square_error(coarse_.dim);
    const std::lock_guard<std::mutex> guard(mutex_);
    states_.push_back(std::move(state));
    return states_.back().get();
  }

  // Tokens [first, first + count) are packed next, in the order given.
  void start_tokens(int64_t first, const int32_t* order, int64_t count, ColumnState& state) const {
    state.first = static_cast<int64_t>(state.tokens.size());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = first + order[i];
      state.tokens.push_back(allowed_[token] != 0 ? token : -1);
    }
    state.tokens.resize(state.first + ceil_div(count, coarse_.pass->rows) * coarse_.pass->rows, -1);
    std::fill(state.factors.begin(), state.factors.end(), 0.0f);
    std::fill(state.offsets.begin(), state.offsets.end(), std::numeric_limits<float>::infinity());
  }

  // The token at `position` of the order: `unit` makes real scores of its own.
  void pack_token(int64_t position, float square, double unit, ColumnState& state) const {
    if (state.tokens[state.first + position] < 0) return;
    const double norm = std::sqrt(static_cast<double>(square));
    const double factor = !coarse_.cosine ? 1.0 / unit : norm > 0.0 ? 1.0 / (unit * norm) : 0.0;
    state.factors[position] = static_cast<float>(factor);
    state.offsets[position] = coarse_.cosine ? 0.0f : 0.5f * square;
  }

  // A token without scores.
  void leave_out(int64_t position, ColumnState& state) const {
    if (state.tokens[state.first + position] >= 0) state.complete = false;
  }

  // Tokens whose tiles are looked at together, against one block of codes.
  int64_t span(const CoarseBlock& block) const {
    const int64_t tiles = COLUMN_BYTES / (block.count * coarse_.width * FLOAT_BYTES);
    return std::max(tiles, int64_t{1}) * coarse_.pass->rows;
  }

  void start_span(int64_t first, ColumnState& state) const {
    state.span_first = first;
    std::fill(state.errors.begin(), state.errors.end(), -1.0);
  }

  // [slots of the block], of the tile that has the token at `position`
  float* least_of(const CoarseBlock& block, int64_t position, ColumnState& state) const {
    return state.least.get() + tile_of(position, state) * block.count * coarse_.width;
  }

  // The token's values are right within what `error` in score units makes of them.
  void note_error(int64_t position, const TokenBound& token, const CodeBound& code, double error,
                  ColumnState& state) const {
    if (state.tokens[state.first + position] < 0) return;
    const double score = (token.norm + code.largest) * code.largest;
    const double relative = COLUMN_ROUNDING + (coarse_.cosine ? state.relative : 0.0);
    const double of_score = state.factors[position] * (error + relative * score);
    const double of_square = state.offsets[position] * (COLUMN_ROUNDING + state.relative);
    const double sum = (of_score + of_square) * (1.0 + COLUMN_ROUNDING) + 0x1p-100;
    double& most = state.errors[tile_of(position, state)];
    most = std::max(most, sum);
  }

  // The candidates that the span leaves, which ends before the token at `end`.
  void finish_span(const CoarseBlock& block, int64_t end, ColumnState& state) const;

  // Decides the codes; returns those that it cannot. `tokens` are the rows of x, without norms; `codes` those
  // of the sweep.
  std::vector<int64_t> decide(Book<float> tokens, const Book<float>& codes, const Outputs& out) const;

 private:
  static constexpr int64_t FLOAT_BYTES = sizeof(float);

  struct Found {
    const ColumnState* state;
    const ColumnCandidate* candidate;
  };
  // What no thread has beaten: of slot s those in [starts[s], starts[s + 1]).
  struct Candidates {
    std::vector<int64_t> starts;  // [slots + 1]
    std::vector<Found> found;
  };

  int64_t tile_of(int64_t position, const ColumnState& state) const {
    return (position - state.span_first) / coarse_.pass->rows;
  }
  Candidates gather() const;
  // Calls f(token) for those of a candidate that may be chosen.
  template <class F>
  void for_tokens(const Found& found, const F& f) const {
    const int64_t* tokens = found.state->tokens.data() + found.candidate->first;
    for (int row = 0; row < coarse_.pass->rows; ++row) {
      if (tokens[row] >= 0) f(tokens[row]);
    }
  }
  std::vector<double> inverse_norms(const Candidates& left, const Book<float>& tokens) const;
  bool decide_slot(int64_t slot, const Candidates& left, const Book<float>& tokens, const Book<float>& codes,
                   DecideScratch<float>& scratch, const Outputs& out) const;
  float merged(std::vector<float> ColumnState::* values, int64_t slot) const {
    float least = std::numeric_limits<float>::infinity();
    for (const auto& state : states_) least = std::min(least, ((*state).*values)[slot]);
    return least;
  }

  const CoarseBook& coarse_;
  const uint8_t* allowed_;  // [N]
  int64_t first_;
  int64_t slots_ = 0;  // of all blocks
  int64_t most_ = 0;   // of a block
  std::mutex mutex_;
  std::vector<std::unique_ptr<ColumnState>> states_;
};

}  // namespace cpu
}  // namespace vqkernels
