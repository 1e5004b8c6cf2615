// From the states of the coarse pass to codes: the best granule or code is scored in float64, which with the
// certificate settles most tokens; candidates that lie too close are scored as well. Tokens with very many of
// them, and those that float64 cannot settle, take the exact road of nearest_decide.cuh.
#pragma once

#include "nearest_decide.cuh"
#include "nearest_double.cuh"
#include "nearest_prepare.cuh"

namespace vqkernels::cuda {

// What the bound of a token's scores is computed from. gap(n, reach): scores further apart than this are in
// the right order, for all codes within `reach` of mu; the nearest code lies within |x'| + |x - c| of mu for
// any code c.
template <typename T>
struct Certificate {
  const TokenBound* tokens;  // [B * T]
  const CodebookBound* codebook;
  int64_t depth;

  // `far`: |x - c| of the code with the lowest score, at least.
  VQ_DEVICE double gap(const Search<T>& search, int64_t n, double far) const {
    TokenBound x = tokens[n];
    CodebookBound c = *codebook;
    double reach = search.cosine
                       ? INFINITY
                       : (x.norm / static_cast<double>(x.scale) + far * c.unit * c.unit2) * (1 + 0x1p-20);
    int64_t dim = search.x.dim;
    return splits_terms(dim) ? score_gap<true>(x, c, reach, dim, depth, search.cosine)
                             : score_gap<false>(x, c, reach, dim, depth, search.cosine);
  }
};
template <>
struct Certificate<double> {
  const double* gaps;  // [B * T]

  VQ_DEVICE double gap(const Search<double>&, int64_t n, double) const { return gaps[n]; }
};

constexpr int64_t kMostPerLane = 16;  // candidates that a lane scores, before the exact road takes the token

// Fewer threads where each has a token, since the block decides all that it could not settle.
constexpr int finish_threads(int lanes) { return lanes == 1 ? 64 : 256; }
constexpr int finish_tokens(int lanes) { return finish_threads(lanes) / lanes; }  // of a block
static_assert(finish_threads(32) <= kDecideThreads);

template <typename T, int LANES>
struct FinishMemory {
  Search<T> search;
  States<T> states;
  bool left[finish_tokens(LANES)];  // to decide
  double limit[finish_tokens(LANES)];
  DecideMemory decide;
};

template <typename T, int LANES>
VQ_DEVICE int64_t count_candidates(const States<T>& states, int64_t n, double limit) {
  int64_t count = 0, all = states.plan.states();
  for (int64_t i = team_lane<LANES>(); i < all; i += LANES) {
    count += candidates_of(states.best[n * all + i], states.plan, states.granule, i, limit).count;
  }
  return team_sum<LANES>(count);
}

// The lowest coarse score of a token and, as `second`, the lowest of all other states and runners-up.
template <typename T, int LANES>
VQ_DEVICE Best<Scalar<T>> merge_states(const States<T>& states, int64_t n) {
  int64_t all = states.plan.states();
  Best<Scalar<T>> best = no_best<Scalar<T>>();
  for (int64_t i = team_lane<LANES>(); i < all; i += LANES) best.merge(states.best[n * all + i]);
  for (int mask = LANES / 2; mask > 0; mask /= 2) best.merge(best.from_lane(mask));
  return best;
}

// LANES of a warp settle one token: 1 or 8, each scoring codes of its own, or all 32 together. Then the block
// decides what is left.
template <typename T, int LANES>
VQ_KERNEL(finish_threads(LANES), 512 / finish_threads(LANES))
finish_kernel(Search<T> search, States<T> states, Certificate<T> certificate, bool exact,
              int64_t* exact_road,  // [1], tokens that took it are added; null: nobody asks
              int64_t* codes,       // [B * T]
              float* distance) {    // [B * T]
  constexpr int kTokens = finish_tokens(LANES);
  FinishMemory<T, LANES>& memory = shared_memory<FinishMemory<T, LANES>>();
  if (thread_index() == 0) memory.search = search, memory.states = states;
  int64_t tokens = search.x.count();
  Crew crew = LANES == 32 ? Crew{team_lane<32>(), 32, 32} : Crew{0, 1, 1};
  int64_t number = LANES == 32 ? 0 : team_lane<LANES>(), crews = LANES == 32 ? 1 : LANES;
  int slot = thread_index() / LANES;
  int64_t base = block_index() * kTokens, index = base + slot;
  int64_t n = index < tokens ? index : tokens - 1;  // warps stay whole
  bool leads = index < tokens && team_lane<LANES>() == 0;
  const T* token = search.x.row(n);
  Best<Scalar<T>> coarse = merge_states<T, LANES>(states, n);
  Best<double> best = no_best<double>();
  double far = 0;
  auto offer = [&](int32_t k, double score) { best.offer(score, k); };
  bool found = coarse.code != kNoCode;
  int64_t first = coarse.code;
  for (int64_t i = number; i < states.granule; i += crews) {
    Candidates one{found ? 1 : 0, first + i, 0};
    visit_candidates(search, token, one, crew, [&](int32_t k, double score) {
      offer(k, score);
      far = std::fmax(far, score);
    });
  }
  double gap = certificate.gap(search, n, square_root(team_max<LANES>(far)));
  bool answerable = gap == gap;
  double limit = found && answerable ? static_cast<double>(coarse.first) + gap : INFINITY;
  bool open = answerable && static_cast<double>(coarse.second) <= limit;
  bool many = false;
  if (ballot(open) != 0) {
    double mine = open ? limit : -INFINITY;
    int64_t most = states.granule + kMostPerLane * LANES;
    many = exact && count_candidates<T, LANES>(states, n, mine) > most;
    for_each_candidate(search, token, states, n, many ? -INFINITY : mine, crew, number, crews,
                       [&](int32_t k, double score) {
                         if (k < first || k >= first + states.granule) offer(k, score);
                       });
  }
  for (int mask = LANES / 2; mask > 0; mask /= 2) best.merge(best.from_lane(mask));
  bool settled = !many && best.second > rough_limit<T>(best.first, search.x.dim, search.cosine);
  bool left = leads && exact && answerable && !settled;
  if (leads && !left) {
    codes[n] = answerable ? best.code : -1;
    distance[n] =
        !answerable ? NAN : static_cast<float>(search.cosine ? std::fmax(1.0 + best.first, 0.0) : best.first);
  }
  if (!exact) return;
  if (team_lane<LANES>() == 0) memory.left[slot] = left, memory.limit[slot] = limit;
  barrier();
  for (int i = 0; i < kTokens; ++i) {
    if (!memory.left[i]) continue;
    if (exact_road != nullptr && thread_index() == 0) atomic_increment(exact_road);
    decide(memory.search, memory.states, {base + i, memory.limit[i]}, memory.decide, codes, distance);
  }
}

}  // namespace vqkernels::cuda
