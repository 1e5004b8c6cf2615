// Candidates of the columns, and the decision between them.
#include "columns.h"

namespace vqkernels {
namespace cpu {

void Columns::finish_span(const CoarseBlock& block, int64_t end, ColumnState& state) const {
  const CoarsePass& pass = *coarse_.pass;
  const int64_t slots = block.count * coarse_.width, first_slot = block.first_panel * coarse_.width;
  float* upper = state.upper.data() + first_slot;
  const auto each_tile = [&](const auto& work) {
    for (int64_t first = state.span_first; first < end; first += pass.rows) {
      const double error = state.errors[tile_of(first, state)];
      if (error >= 0.0) work(first, least_of(block, first, state), static_cast<float>(error));
    }
  };
  each_tile(
      [&](int64_t, const float* least, float error) { pass.lower_columns(least, slots, error, upper); });
  each_tile([&](int64_t first, const float* least, float error) {
    const int64_t number = pass.find_columns(least, upper, slots, error, state.found.data());
    for (int64_t i = 0; i < number; ++i) {
      const int32_t slot = state.found[i];
      if (slot >= block.codes) break;  // the same codes again
      state.add(state.first + first, static_cast<int32_t>(first_slot) + slot, least[slot] - error);
    }
  });
}

Columns::Candidates Columns::gather() const {
  Candidates left;
  std::vector<float> upper(slots_);
  for (int64_t slot = 0; slot < slots_; ++slot) upper[slot] = merged(&ColumnState::upper, slot);
  const auto each = [&](const auto& take) {
    for (const auto& state : states_) {
      for (const ColumnCandidate& candidate : state->candidates) {
        if (candidate.lower <= upper[candidate.slot]) take(Found{state.get(), &candidate});
      }
    }
  };
  left.starts.assign(slots_ + 1, 0);
  each([&](const Found& one) { ++left.starts[one.candidate->slot + 1]; });
  for (int64_t slot = 0; slot < slots_; ++slot) left.starts[slot + 1] += left.starts[slot];
  left.found.resize(left.starts[slots_]);
  std::vector<int64_t> next = left.starts;
  each([&](const Found& one) { left.found[next[one.candidate->slot]++] = one; });
  return left;
}

// Of the candidates alone.
std::vector<double> Columns::inverse_norms(const Candidates& left, const Book<float>& tokens) const {
  std::vector<uint8_t> wanted(tokens.size, 0);
  for (const Found& found : left.found) for_tokens(found, [&](int64_t token) { wanted[token] = 1; });
  std::vector<double> inverse(tokens.size);
  for_each_range(tokens.size, 256, 8.0 * tokens.size * tokens.dim, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (wanted[n] != 0) inverse[n] = inverse_norm_of(*tokens.table, tokens.row(n), tokens.dim);
    }
  });
  return inverse;
}

bool Columns::decide_slot(int64_t slot, const Candidates& left, const Book<float>& tokens,
                          const Book<float>& codes, DecideScratch<float>& scratch, const Outputs& out) const {
  const int64_t k = coarse_.code_of(slot);
  if (codes.cosine && codes.inverse_norm[k] == 0.0) {  // every cosine is 0
    write(out, k, tokens, {first_, 0.0});
    return true;
  }
  if (merged(&ColumnState::lost, slot) <= merged(&ColumnState::upper, slot)) return false;
  scratch.codes.count = 0;
  for (int64_t i = left.starts[slot]; i < left.starts[slot + 1]; ++i) {
    for_tokens(left.found[i], [&](int64_t token) { scratch.codes.add(token); });
  }
  if (scratch.codes.count == 0) return false;
  decide_token(tokens, codes.row(k), scratch, out, k);
  return true;
}

std::vector<int64_t> Columns::decide(Book<float> tokens, const Book<float>& codes, const Outputs& out) const {
  constexpr int64_t SLOTS = 64;  // decided as one piece of work
  std::vector<uint8_t> decided(codes.size, 0);
  const bool complete =
      std::all_of(states_.begin(), states_.end(), [](const auto& state) { return state->complete; });
  if (complete) {
    const Candidates left = gather();
    const std::vector<double> inverse = codes.cosine ? inverse_norms(left, tokens) : std::vector<double>();
    tokens.inverse_norm = codes.cosine ? inverse.data() : nullptr;
    for (const CoarseBlock& block : coarse_.blocks) {
      const int64_t first_slot = block.first_panel * coarse_.width;
      for_each_item<DecideScratch<float>>(
          ceil_div(block.codes, SLOTS), 64.0 * block.codes * codes.dim, [] { return DecideScratch<float>(); },
          [&](int64_t item, DecideScratch<float>& scratch) {
            const int64_t end = first_slot + std::min(block.codes, (item + 1) * SLOTS);
            for (int64_t slot = first_slot + item * SLOTS; slot < end; ++slot)
              decided[coarse_.code_of(slot)] = decide_slot(slot, left, tokens, codes, scratch, out);
          });
    }
  }
  std::vector<int64_t> rest;
  for (int64_t k = 0; k < codes.size; ++k) {
    if (decided[k] == 0) rest.push_back(k);
  }
  return rest;
}

}  // namespace cpu
}  // namespace vqkernels
