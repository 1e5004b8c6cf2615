// From the states of the coarse pass to codes: the best granule or code is scored in float64, which with the
// certificate settles most tokens; candidates that lie too close are scored as well. Tokens with very many of
// them, and those that float64 cannot settle, are listed for the exact road of nearest_decide.cuh.
#pragma once

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

template <typename T>
struct States {
  const Best<Scalar<T>>* best;  // [B * T, plan.states()]
  CoarsePlan plan;
  int granule;  // codes that a state's code stands for: kGranule or 1
};

// A token that is not settled, and the coarse scores up to which a code may be its nearest.
struct Listed {
  int64_t token;
  double limit;
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

constexpr int kFinishBlocks = 2;
constexpr int64_t kMostPerLane =
    16;  // candidates that a lane scores here, before the token is listed instead

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

// LANES of a warp settle one token: 1 or 8, each scoring codes of its own, or all 32 together.
template <typename T, int LANES>
VQ_KERNEL(kTeamThreads, kFinishBlocks)
finish_kernel(Search<T> search, States<T> states, Certificate<T> certificate, bool exact,
              Listed* listed,  // [B * T]
              int64_t* count,
              int64_t* codes,     // [B * T]
              float* distance) {  // [B * T]
  int64_t tokens = search.x.count();
  Crew crew = LANES == 32 ? Crew{team_lane<32>(), 32, 32} : Crew{0, 1, 1};
  int64_t number = LANES == 32 ? 0 : team_lane<LANES>(), crews = LANES == 32 ? 1 : LANES;
  int team = thread_index() % 32 / LANES;
  for (int64_t index = team_first<LANES>(); index - team < tokens;
       index += team_step<LANES>()) {  // warps stay whole
    int64_t n = index < tokens ? index : tokens - 1;
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
    if (!leads) continue;
    bool settled = !many && best.second > rough_limit<T>(best.first, search.x.dim, search.cosine);
    if (exact && answerable && !settled) listed[atomic_increment(count)] = {n, limit};
    codes[n] = answerable ? best.code : -1;
    distance[n] =
        !answerable ? NAN : static_cast<float>(search.cosine ? std::fmax(1.0 + best.first, 0.0) : best.first);
  }
}

}  // namespace vqkernels::cuda
