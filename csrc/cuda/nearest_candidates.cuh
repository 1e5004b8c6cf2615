// What the coarse pass leaves of a token: its states, the codes that they leave open, and a visit to each of
// these with its float64 score.
#pragma once

#include "search.cuh"

namespace vqkernels::cuda {

template <typename T>
struct States {
  const Best<Scalar<T>>* best;  // [B * T, plan.states()]
  CoarsePlan plan;
  int granule;  // codes that a state's code stands for: kGranule or 1
};

// The codes that a state leaves open under `limit`: none, its best granule or code, or all that it has
// covered.
struct Candidates {
  int64_t count;
  int64_t first;  // the i-th is code first + stride * (i / 8) + i % 8
  int64_t stride;

  VQ_DEVICE int64_t code(int64_t i) const { return first + stride * (i / kGranule) + i % kGranule; }
};

template <typename S>
VQ_DEVICE Candidates candidates_of(const Best<S>& state, const CoarsePlan& plan, int granule, int64_t index,
                                   double limit) {
  if (!(static_cast<double>(state.first) <= limit)) return {0, 0, 0};
  if (!(static_cast<double>(state.second) <= limit)) return {granule, state.code, 0};
  int64_t begin = index / plan.groups * plan.granules_per_split + index % plan.groups;
  int64_t end = smaller((index / plan.groups + 1) * plan.granules_per_split, plan.granules);
  int64_t granules = begin < end ? ceil_div(end - begin, plan.groups) : 0;
  return {granules * kGranule, begin * kGranule, plan.groups * kGranule};
}

// Lanes that score codes together, `group` of them each code.
struct Crew {
  int lane;
  int lanes;  // 1 or 32
  int group;
};

template <typename T, typename Visit>
VQ_DEVICE void visit_candidates(const Search<T>& search, const T* token, const Candidates& open,
                                const Crew& crew, Visit visit) {
  int64_t groups = crew.lanes / crew.group, mine = crew.lane / crew.group;
  for (int64_t base = 0; base < open.count; base += groups) {
    int64_t k = base + mine < open.count ? open.code(base + mine) : search.codebook_size;
    bool real = k < search.codebook_size;
    Pair<T> pair{token, search.x.stride_d, search.code(real ? k : 0), search.x.dim};
    double score = rough_score(pair, search.cosine, crew.lane % crew.group, crew.group);
    if (real && crew.lane % crew.group == 0) visit(static_cast<int32_t>(k), score);
  }
}

// Calls visit(k, score) once for each code that the token's states leave open. `crews` such crews share the
// states; lanes of a warp that is one crew call it together, others each for itself.
template <typename T, typename Visit>
VQ_DEVICE void for_each_candidate(const Search<T>& search, const T* token, const States<T>& states, int64_t n,
                                  double limit, const Crew& crew, int64_t number, int64_t crews,
                                  Visit visit) {
  const CoarsePlan& plan = states.plan;
  int64_t count = plan.states();
  const Best<Scalar<T>>* best = states.best + n * count;
  if (crew.lanes == 1) {
    for (int64_t i = number; i < count; i += crews) {
      visit_candidates(search, token, candidates_of(best[i], plan, states.granule, i, limit), crew, visit);
    }
    return;
  }
  for (int64_t base = 0; base < count; base += 32 * crews) {
    int64_t i = base + crew.lane * crews + number;
    bool open = i < count && static_cast<double>(best[i].first) <= limit;
    for (uint32_t left = ballot(open); left != 0; left &= left - 1) {
      int64_t at = base + lowest_bit(left) * crews + number;
      visit_candidates(search, token, candidates_of(best[at], plan, states.granule, at, limit), crew, visit);
    }
  }
}

}  // namespace vqkernels::cuda
