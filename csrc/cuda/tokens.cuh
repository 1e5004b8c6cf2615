// How kernels see tokens, and the sums that a team of lanes makes over one token.
#pragma once

#include "primitives.cuh"

namespace vqkernels::cuda {

// The type that scores and sums are computed in.
template <typename T>
struct ScalarOf {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};
template <typename T>
using Scalar = typename ScalarOf<T>::type;

// A [B, T, D] tensor with any strides (in elements); token n is (n / T, n % T).
template <typename T>
struct Tokens {
  T* data;
  int64_t batch;
  int64_t length;
  int64_t dim;
  int64_t stride_b;
  int64_t stride_t;
  int64_t stride_d;

  VQ_HOST_DEVICE int64_t count() const { return batch * length; }
  // Whether neighbouring lanes should take neighbouring tokens (a channels-first map) rather than
  // neighbouring dimensions.
  VQ_HOST_DEVICE bool tokens_adjacent() const { return stride_t == 1 && stride_d != 1 && length > 1; }

  VQ_DEVICE int64_t offset(int64_t n) const {
    if (batch == 1) return n * stride_t;  // spares the 64-bit division
    return n / length * stride_b + n % length * stride_t;
  }
  VQ_DEVICE T* row(int64_t n) const { return data + offset(n); }
  VQ_DEVICE T& at(T* row, int64_t d) const { return row[d * stride_d]; }
};

// [B, T, D] as [1, B * T, D] where the strides allow it.
template <typename T>
Tokens<T> merge_batch(Tokens<T> x) {
  bool one_stride = x.batch == 1 || x.length == 1 || x.stride_b == x.length * x.stride_t;
  if (!one_stride) return x;
  if (x.length == 1) x.stride_t = x.stride_b;
  x.length *= x.batch;
  x.batch = 1;
  return x;
}

// LANES adjacent threads (1 or a whole warp) work on one token: lane, first token and step of this thread.
template <int LANES>
VQ_DEVICE int team_lane() {
  return thread_index() % LANES;
}
template <int LANES>
VQ_DEVICE int64_t team_first() {
  return (block_index() * block_threads() + thread_index()) / LANES;
}
template <int LANES>
VQ_DEVICE int64_t team_step() {
  return grid_blocks() * block_threads() / LANES;
}

// Every lane of the team gets the sum; the order of additions is fixed.
template <int LANES, typename S>
VQ_DEVICE S team_sum(S value) {
  for (int mask = LANES / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <int LANES, typename S>
VQ_DEVICE S team_max(S value) {
  for (int mask = LANES / 2; mask > 0; mask /= 2) {
    S other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

constexpr int kTeamThreads = 256;
constexpr int kTeamBlocks = 3;
constexpr int64_t kMaxBlocks = 1 << 20;  // past it, blocks loop

VQ_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename S = int64_t>
VQ_HOST_DEVICE S smaller(S a, S b) {
  return a < b ? a : b;
}

// Blocks of kTeamThreads threads for `teams` teams of `lanes`.
inline int64_t team_blocks(int64_t teams, int lanes) {
  int64_t blocks = ceil_div(teams * lanes, kTeamThreads);
  return blocks < 1 ? 1 : (blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace vqkernels::cuda
