// The exact road, for tokens whose lowest scores lie too close together: float64 over the whole codebook, and
// arithmetic without rounding among the codes that float64 cannot tell apart.
#pragma once

#include "nearest_scores.cuh"

namespace vqkernels::cuda {

constexpr int kDecideThreads = 128;
constexpr int kDecideBlocks = 4;
constexpr int kDecideWarps = kDecideThreads / 32;

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
  const T* token;
  exact::ScaledVector scale;  // of the token, cosine only
  int group;

  VQ_DEVICE const T* code(int64_t k) const { return search.codebook + k * search.x.dim; }
};

VQ_DEVICE double group_sum(double value, int group) {
  for (int mask = group / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

VQ_DEVICE double group_max(double value, int group) {
  for (int mask = group / 2; mask > 0; mask /= 2) {
    double other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

template <typename T>
VQ_DEVICE double rough_distance(const Search<T>& search, const T* token, const T* code, int lane, int group) {
  double sum = 0;
  for (int64_t d = lane; d < search.x.dim; d += group) {
    double difference =
        static_cast<double>(widen(search.x.at(token, d))) - static_cast<double>(widen(code[d]));
    sum = std::fma(difference, difference, sum);
  }
  return group_sum(sum, group);
}

// Float inputs need none: their products neither overflow nor underflow in float64.
template <typename T>
VQ_DEVICE PowerOfTwo power_of_two(const T*, int64_t, int64_t, int, int) {
  return {1.0, 1.0};
}
VQ_DEVICE PowerOfTwo power_of_two(const double* row, int64_t stride, int64_t dim, int lane, int group) {
  double largest = 0;
  for (int64_t d = lane; d < dim; d += group) largest = std::fmax(largest, std::fabs(row[d * stride]));
  largest = group_max(largest, group);
  return power_of_two_for(largest);
}

// cos(x, c) in float64, 0 for a zero vector.
template <typename T>
VQ_DEVICE double rough_cosine(const Search<T>& search, const T* token, const T* code, int lane, int group) {
  int64_t dim = search.x.dim;
  PowerOfTwo x_scale = power_of_two(token, search.x.stride_d, dim, lane, group);
  PowerOfTwo c_scale = power_of_two(code, 1, dim, lane, group);
  double dot = 0, xx = 0, cc = 0;
  for (int64_t d = lane; d < dim; d += group) {
    double x = x_scale(widen(search.x.at(token, d))), c = c_scale(widen(code[d]));
    dot = std::fma(x, c, dot);
    xx = std::fma(x, x, xx);
    cc = std::fma(c, c, cc);
  }
  dot = group_sum(dot, group);
  xx = group_sum(xx, group);
  cc = group_sum(cc, group);
  return xx > 0 && cc > 0 ? dot * inverse_sqrt(xx) * inverse_sqrt(cc) : 0.0;
}

// What is minimised: |x - c|^2 or -cos(x, c). `group` adjacent lanes call it together.
template <typename T>
VQ_DEVICE double rough_score(const Search<T>& search, const T* token, const T* code, int lane, int group) {
  return search.cosine ? -rough_cosine(search, token, code, lane, group)
                       : rough_distance(search, token, code, lane, group);
}

// Calls visit(k, score) for this group's codes, in ascending order, in every lane; k is -1 past the end.
template <typename T, typename Visit>
VQ_DEVICE void for_each_code(const Contest<T>& contest, Visit visit) {
  int lane = thread_index() % contest.group;
  int64_t groups = block_threads() / contest.group, mine = thread_index() / contest.group;
  for (int64_t base = 0; base < contest.search.codebook_size; base += groups) {
    int64_t k = base + mine < contest.search.codebook_size ? base + mine : -1;
    double score =
        rough_score(contest.search, contest.token, contest.code(k < 0 ? 0 : k), lane, contest.group);
    visit(k, score);
  }
}

// The two lowest float64 scores of the whole codebook, in every thread.
template <typename T>
VQ_DEVICE Best<double> rough_best(const Contest<T>& contest, DecideMemory& memory) {
  Best<double> best = no_best<double>();
  bool leads = thread_index() % contest.group == 0;
  for_each_code(contest, [&](int64_t k, double score) {
    if (leads && k >= 0) best.offer(score, static_cast<int32_t>(k));
  });
  for (int mask = 16; mask > 0; mask /= 2) best.merge(best.from_lane(mask));
  barrier();  // the last token's readers are done
  if (thread_index() % 32 == 0) memory.best[thread_index() / 32] = best;
  barrier();
  best = memory.best[0];
  for (int warp = 1; warp < kDecideWarps; ++warp) best.merge(memory.best[warp]);
  return best;
}

// Scores up to here may belong to the true best. A sum of D float64 squares is off by (D + 4) units at most;
// squares of doubles can also underflow, or overflow, which makes the limit infinite.
template <typename T>
VQ_DEVICE double rough_limit(double lowest, int64_t dim, bool cosine) {
  double terms = static_cast<double>(dim + 8);
  if (cosine) return lowest + 8 * terms * kUnit;
  double limit = lowest * (1 + 4 * terms * kUnit);
  double hidden = std::is_same<T, double>::value ? terms * 0x1p-1000 : 0.0;
  return limit > hidden ? limit : hidden;
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
    int order = exact::compare_euclidean(contest.token, search.x.stride_d, contest.code(a), 1,
                                         contest.code(b), 1, search.x.dim);
    return order < 0 || (order == 0 && a < b);
  };
  bool leads = thread_index() % contest.group == 0;
  int32_t mine = kNoCode;
  for_each_code(contest, [&](int64_t k, double score) {
    if (!leads || k < 0 || !(score <= limit)) return;
    if (mine == kNoCode || before(static_cast<int32_t>(k), mine)) mine = static_cast<int32_t>(k);
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
  auto cosine = [&](int64_t k) {
    const T* code = contest.code(k);
    exact::ScaledVector scale = exact::scale_vector(code, 1, search.x.dim);
    return exact::cosine(contest.token, search.x.stride_d, contest.scale, code, 1, scale, search.x.dim);
  };
  bool leads = thread_index() % contest.group == 0;
  exact::DoubleDouble top{-2.0, 0.0};
  for_each_code(contest, [&](int64_t k, double score) {
    if (!leads || k < 0 || !(score <= limit)) return;
    exact::DoubleDouble value = cosine(k);
    if (exact::less(top, value)) top = value;
  });
  exact::DoubleDouble lowest_tie = exact::add(largest_cosine(memory, top), {-exact::cosine_tie(), 0.0});
  int32_t mine = kNoCode;
  for_each_code(contest, [&](int64_t k, double score) {
    if (!leads || k < 0 || mine != kNoCode || !(score <= limit)) return;
    if (!exact::less(cosine(k), lowest_tie)) mine = static_cast<int32_t>(k);
  });
  return lowest_code(memory, mine, [](int32_t a, int32_t b) { return a < b; });
}

// One block per listed token.
template <typename T>
VQ_KERNEL(kDecideThreads, kDecideBlocks)
decide_kernel(Search<T> search,
              const int64_t* listed,  // [*count], token numbers in any order
              const int64_t* count,
              int64_t* codes,     // [B * T]
              float* distance) {  // [B * T]
  DecideMemory& memory = shared_memory<DecideMemory>();
  int group = 1;
  while (group < 32 && group * 4 < search.x.dim) group *= 2;
  for (int64_t item = block_index(); item < *count; item += grid_blocks()) {
    int64_t n = listed[item];
    const T* token = search.x.row(n);
    Contest<T> contest{search, token, {1.0, 1.0, {0.0, 0.0}}, group};
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
}

}  // namespace vqkernels::cuda
