// The exact road, for tokens that float64 has not settled in time or not at all: a block scores all of a
// token's candidates in float64, and arithmetic without rounding decides among those that float64 cannot tell
// apart.
#pragma once

#include "nearest_candidates.cuh"

namespace vqkernels::cuda {

constexpr int kDecideThreads = 256;  // at most
constexpr int kDecideWarps = kDecideThreads / 32;

// A token that is not settled, and the coarse scores up to which a code may be its nearest.
struct Undecided {
  int64_t token;
  double limit;
};

struct DecideMemory {
  Best<double> best[kDecideWarps];
  int32_t codes[kDecideThreads];
  exact::DoubleDouble cosines[kDecideThreads];
};

// One token with what the road needs of it. `group` lanes share a code, so that short rows do not leave lanes
// idle.
template <typename T>
struct Contest {
  const Search<T>& search;
  const States<T>& states;
  const T* token;
  int64_t n;
  double coarse_limit;
  exact::ScaledVector scale;  // of the token, cosine only
  int group;

  // Calls visit(k, score) in one thread for each candidate; all threads call it together.
  template <typename Visit>
  VQ_DEVICE void for_each(Visit visit) const {
    Crew crew{thread_index() % 32, 32, group};
    for_each_candidate(search, token, states, n, coarse_limit, crew, thread_index() / 32,
                       block_threads() / 32, visit);
  }
};

// The two lowest float64 scores of the candidates, in every thread.
template <typename T>
VQ_DEVICE Best<double> rough_best(const Contest<T>& contest, DecideMemory& memory) {
  Best<double> best = no_best<double>();
  contest.for_each([&](int32_t k, double score) { best.offer(score, k); });
  for (int mask = 16; mask > 0; mask /= 2) best.merge(best.from_lane(mask));
  barrier();  // the last token's readers are done
  if (thread_index() % 32 == 0) memory.best[thread_index() / 32] = best;
  barrier();
  best = memory.best[0];
  for (int warp = 1; warp < block_threads() / 32; ++warp) best.merge(memory.best[warp]);
  return best;
}

// Lowest of the codes that the threads found, by `before(a, b)`; every thread gets it.
template <typename Before>
VQ_DEVICE int32_t lowest_code(DecideMemory& memory, int32_t mine, Before before) {
  barrier();
  memory.codes[thread_index()] = mine;
  barrier();
  if (thread_index() == 0) {
    for (int i = 1; i < block_threads(); ++i) {
      int32_t other = memory.codes[i];
      if (other != kNoCode && (mine == kNoCode || before(other, mine))) mine = other;
    }
    memory.codes[0] = mine;
  }
  barrier();
  return memory.codes[0];
}

template <typename T>
VQ_DEVICE int32_t closest_exactly(const Contest<T>& contest, DecideMemory& memory, double limit) {
  const Search<T>& search = contest.search;
  auto before = [&](int32_t a, int32_t b) {
    int order = exact::compare_euclidean(contest.token, search.x.stride_d, search.code(a), 1, search.code(b),
                                         1, search.x.dim);
    return order < 0 || (order == 0 && a < b);
  };
  int32_t mine = kNoCode;
  contest.for_each([&](int32_t k, double score) {
    if (!(score <= limit)) return;
    if (mine == kNoCode || before(k, mine)) mine = k;
  });
  return lowest_code(memory, mine, before);
}

// The largest of the threads' cosines.
VQ_DEVICE exact::DoubleDouble largest_cosine(DecideMemory& memory, exact::DoubleDouble mine) {
  barrier();
  memory.cosines[thread_index()] = mine;
  barrier();
  for (int i = 0; i < block_threads(); ++i) {
    if (exact::less(mine, memory.cosines[i])) mine = memory.cosines[i];
  }
  return mine;
}

template <typename T>
VQ_DEVICE int32_t most_parallel_exactly(const Contest<T>& contest, DecideMemory& memory, double limit) {
  const Search<T>& search = contest.search;
  auto cosine = [&](int32_t k) {
    const T* code = search.code(k);
    exact::ScaledVector scale = exact::scale_vector(code, 1, search.x.dim);
    return exact::cosine(contest.token, search.x.stride_d, contest.scale, code, 1, scale, search.x.dim);
  };
  exact::DoubleDouble top{-2.0, 0.0};
  contest.for_each([&](int32_t k, double score) {
    if (!(score <= limit)) return;
    exact::DoubleDouble value = cosine(k);
    if (exact::less(top, value)) top = value;
  });
  exact::DoubleDouble lowest_tie = exact::add(largest_cosine(memory, top), {-exact::cosine_tie(), 0.0});
  int32_t mine = kNoCode;
  contest.for_each([&](int32_t k, double score) {
    if (k > mine || !(score <= limit)) return;
    if (!exact::less(cosine(k), lowest_tie)) mine = k;
  });
  return lowest_code(memory, mine, [](int32_t a, int32_t b) { return a < b; });
}

// All threads of a block call it together. `search` and `states` lie in shared memory, so that a call copies
// neither.
template <typename T>
VQ_CALLED void decide(const Search<T>& search, const States<T>& states, Undecided undecided,
                      DecideMemory& memory,
                      int64_t* codes,     // [B * T]
                      float* distance) {  // [B * T]
  int group = 1;
  while (group < 32 && group * 4 < search.x.dim) group *= 2;
  int64_t n = undecided.token;
  const T* token = search.x.row(n);
  Contest<T> contest{search, states, token, n, undecided.limit, {1.0, 1.0, {0.0, 0.0}}, group};
  if (search.cosine) contest.scale = exact::scale_vector(token, search.x.stride_d, search.x.dim);
  Best<double> best = rough_best(contest, memory);
  double limit = rough_limit<T>(best.first, search.x.dim, search.cosine);
  int32_t code = best.code;
  bool zero_direction = search.cosine && contest.scale.square.hi == 0.0;  // every cosine is 0
  if (zero_direction) {
    code = 0;
  } else if (best.second <= limit || code == kNoCode) {
    code = search.cosine ? most_parallel_exactly(contest, memory, limit)
                         : closest_exactly(contest, memory, limit);
  }
  if (thread_index() == 0) {
    codes[n] = code;
    distance[n] = static_cast<float>(search.cosine ? std::fmax(1.0 + best.first, 0.0) : best.first);
  }
}

}  // namespace vqkernels::cuda
