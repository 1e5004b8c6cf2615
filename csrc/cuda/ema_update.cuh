// The exponential-moving-average update of a codebook, in place: decay, Laplace smoothing (van den Oord et
// al. 2017, appendix A.1), revival of dead codes. All scalars stay on the device; both sums over K run in a
// fixed order.
#pragma once

#include "tokens.cuh"

namespace vqkernels::cuda {

template <typename S>
struct EmaUpdate {
  S* codebook;         // [K, D]
  S* cluster_size;     // [K]
  S* embed_sum;        // [K, D]
  const S* counts;     // [K]
  const S* sums;       // [K, D]
  const bool* revive;  // [K]
  int64_t codebook_size;
  int64_t dim;
  double decay;
  double eps;
  double revived_size;
  bool normalize;
  bool plain;  // smoothing without the term that keeps the sum of sizes
};

constexpr double kSmallestNorm = 1e-12;
constexpr int64_t kMostSizeBlocks = 256;

struct EmaMemory {
  double warps[kTeamThreads / 32];
};

// The sum of the block's values, in every thread, in a fixed order.
VQ_DEVICE double block_sum(EmaMemory& memory, double value) {
  value = team_sum<32>(value);
  barrier();  // readers of the last sum are done
  if (thread_index() % 32 == 0) memory.warps[thread_index() / 32] = value;
  barrier();
  double sum = 0;
  for (int warp = 0; warp < block_threads() / 32; ++warp) sum += memory.warps[warp];
  return sum;
}

VQ_DEVICE double total_of(EmaMemory& memory, const double* partial, int64_t blocks) {
  double sum = 0;
  for (int64_t i = thread_index(); i < blocks; i += block_threads()) sum += partial[i];
  return block_sum(memory, sum);
}

// The codes of this block: contiguous, so that the sums do not depend on anything but K.
struct CodeRange {
  int64_t begin, end;
};
VQ_DEVICE CodeRange code_range(int64_t codebook_size) {
  int64_t share = ceil_div(codebook_size, grid_blocks());
  int64_t begin = block_index() * share, end = begin + share;
  return {begin, end < codebook_size ? end : codebook_size};
}

// Partial sums of the counts that will be learned from; their total 0 means that nothing is learned.
template <typename S>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
sum_counts_kernel(EmaUpdate<S> update,
                  double* partial) {  // [blocks]
  EmaMemory& memory = shared_memory<EmaMemory>();
  CodeRange codes = code_range(update.codebook_size);
  double sum = 0;
  for (int64_t k = codes.begin + thread_index(); k < codes.end; k += block_threads()) {
    if (!update.revive[k]) sum += update.counts[k];
  }
  sum = block_sum(memory, sum);
  if (thread_index() == 0) partial[block_index()] = sum;
}

template <typename S>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
update_sizes_kernel(EmaUpdate<S> update,
                    const double* counted,  // [blocks]
                    double* partial) {      // [blocks], of the new sizes
  EmaMemory& memory = shared_memory<EmaMemory>();
  bool learns = total_of(memory, counted, grid_blocks()) > 0;
  CodeRange codes = code_range(update.codebook_size);
  double sum = 0;
  for (int64_t k = codes.begin + thread_index(); k < codes.end; k += block_threads()) {
    double size = update.cluster_size[k];
    if (update.revive[k]) {
      size = update.revived_size;
    } else if (learns) {
      size = update.decay * size + (1 - update.decay) * static_cast<double>(update.counts[k]);
    }
    update.cluster_size[k] = static_cast<S>(size);
    sum += static_cast<double>(static_cast<S>(size));
  }
  sum = block_sum(memory, sum);
  if (thread_index() == 0) partial[block_index()] = sum;
}

// A warp per code; `scale` turns embed_sum into the code.
template <typename S>
VQ_DEVICE void learn_row(const EmaUpdate<S>& update, int64_t k, double scale) {
  const S* sums = update.sums + k * update.dim;
  S *embed = update.embed_sum + k * update.dim, *code = update.codebook + k * update.dim;
  double square = 0;
  for (int64_t d = team_lane<32>(); d < update.dim; d += 32) {
    double value =
        update.decay * static_cast<double>(embed[d]) + (1 - update.decay) * static_cast<double>(sums[d]);
    embed[d] = static_cast<S>(value);
    value = static_cast<double>(embed[d]) * scale;
    code[d] = static_cast<S>(value);
    square = std::fma(value, value, square);
  }
  if (!update.normalize) return;
  double norm = std::sqrt(team_sum<32>(square));
  double inverse = 1 / (norm > kSmallestNorm ? norm : kSmallestNorm);
  for (int64_t d = team_lane<32>(); d < update.dim; d += 32) {
    code[d] = static_cast<S>(static_cast<double>(embed[d]) * scale * inverse);
  }
}

// The code becomes the token in `sums`, with the weight of `revived_size` tokens.
template <typename S>
VQ_DEVICE void revive_row(const EmaUpdate<S>& update, int64_t k) {
  const S* token = update.sums + k * update.dim;
  double square = 0;
  for (int64_t d = team_lane<32>(); d < update.dim; d += 32) {
    square = std::fma(static_cast<double>(token[d]), static_cast<double>(token[d]), square);
  }
  double norm = std::sqrt(team_sum<32>(square));
  double divisor = update.normalize ? (norm > kSmallestNorm ? norm : kSmallestNorm) : 1.0;
  for (int64_t d = team_lane<32>(); d < update.dim; d += 32) {
    S value = static_cast<S>(static_cast<double>(token[d]) / divisor);
    update.codebook[k * update.dim + d] = value;
    update.embed_sum[k * update.dim + d] = static_cast<S>(static_cast<double>(value) * update.revived_size);
  }
}

template <typename S>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
update_rows_kernel(EmaUpdate<S> update,
                   const double* counted,  // [size_blocks]
                   const double* sizes,    // [size_blocks]
                   int64_t size_blocks) {
  EmaMemory& memory = shared_memory<EmaMemory>();
  bool learns = total_of(memory, counted, size_blocks) > 0;
  double total = total_of(memory, sizes, size_blocks);
  double smoothing =
      update.plain ? 1 : (total + static_cast<double>(update.codebook_size) * update.eps) / total;
  for (int64_t k = team_first<32>(); k < update.codebook_size; k += team_step<32>()) {
    if (update.revive[k]) {
      revive_row(update, k);
    } else if (learns) {
      learn_row(update, k, smoothing / (static_cast<double>(update.cluster_size[k]) + update.eps));
    }
  }
}

template <typename S, typename Launcher>
void ema_update(Launcher& launcher, EmaUpdate<S> update) {
  int64_t size_blocks = ceil_div(update.codebook_size, 4 * kTeamThreads);
  size_blocks = size_blocks < kMostSizeBlocks ? size_blocks : kMostSizeBlocks;
  double* counted = launcher.template allocate<double>(size_blocks);
  double* sizes = launcher.template allocate<double>(size_blocks);
  launcher.launch(sum_counts_kernel<S>, size_blocks, kTeamThreads, update, counted);
  launcher.launch(update_sizes_kernel<S>, size_blocks, kTeamThreads, update, counted, sizes);
  launcher.launch(update_rows_kernel<S>, team_blocks(update.codebook_size, 32), kTeamThreads, update, counted,
                  sizes, size_blocks);
}

}  // namespace vqkernels::cuda
