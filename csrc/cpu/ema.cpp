// The codebook's moving average over the statistics of a step, in place. Sums over the codes run in a fixed
// order.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "ops.h"
#include "parallel.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {
namespace {

template <class W>
struct Ema {
  W* codebook;      // [K, D]
  W* cluster_size;  // [K]
  W* embed_sum;     // [K, D]
  W* counts;        // [K]
  W* sums;          // [K, D]
  bool* revive;     // [K]
  int64_t size;
  int64_t dim;
  double decay;
  double eps;
  double revived_size;
  bool normalize;
  bool plain;    // smoothing without the term that keeps the sum of sizes
  bool consume;  // leave zeros in counts, sums and revive; rows of `sums` whose count is 0 are 0, and not
                 // visited

  // Sum over codes of value(k): partial sums of blocks, added in order.
  template <class Value>
  double total(const Value& value) const {
    constexpr int64_t BLOCK = 4096, PARTS = 8;
    std::vector<double> blocks(ceil_div(size, BLOCK));
    for_each_range(size, BLOCK, 2.0 * size, [&](int64_t begin, int64_t end) {
      double parts[PARTS] = {};
      int64_t k = begin;
      for (; k + PARTS <= end; k += PARTS) {
        for (int64_t i = 0; i < PARTS; ++i) parts[i] += value(k + i);
      }
      double sum = 0.0;
      for (; k < end; ++k) sum += value(k);
      for (const double part : parts) sum += part;
      blocks[begin / BLOCK] = sum;
    });
    double sum = 0.0;
    for (const double block : blocks) sum += block;
    return sum;
  }

  // The code becomes the token in its row of `sums`, with the weight of `revived_size` tokens.
  void revive_code(int64_t k) const {
    const W* sampled = sums + k * dim;
    double square = 0.0;
    for (int64_t d = 0; d < dim; ++d) square += static_cast<double>(sampled[d]) * sampled[d];
    const double norm = std::sqrt(square);
    const double divisor = !normalize ? 1.0 : norm > 1e-12 ? norm : 1e-12;
    for (int64_t d = 0; d < dim; ++d) {
      const double value = sampled[d] / divisor;
      codebook[k * dim + d] = static_cast<W>(value);
      embed_sum[k * dim + d] = static_cast<W>(value * revived_size);
    }
  }

  void clear(int64_t k) const {
    counts[k] = 0;
    revive[k] = false;
    for (int64_t d = k * dim; d < (k + 1) * dim; ++d) sums[d] = 0;
  }

  void update_code(const TrainingLoops<W>& loops, int64_t k, double preserve) const {
    const bool counted = !consume || counts[k] != W(0);
    if (revive[k]) {
      revive_code(k);
    } else {
      const EmaRow step{decay, 1.0 - decay, preserve / (cluster_size[k] + eps), normalize};
      loops.learn_row(step, counted ? sums + k * dim : nullptr, dim, embed_sum + k * dim, codebook + k * dim);
    }
    if (consume && (counted || revive[k])) clear(k);
  }

  // New cluster sizes; returns their sum.
  double update_sizes(bool learns) const {
    return total([&](int64_t k) {
      if (revive[k]) {
        cluster_size[k] = static_cast<W>(revived_size);
      } else if (learns) {
        cluster_size[k] = static_cast<W>(decay * cluster_size[k] + (1.0 - decay) * counts[k]);
      }
      return static_cast<double>(cluster_size[k]);
    });
  }

  void update() const {
    const TrainingLoops<W>& loops = training_loops<W>();
    const double learned = total([&](int64_t k) { return revive[k] ? 0.0 : static_cast<double>(counts[k]); });
    const bool revived = std::memchr(revive, true, size) != nullptr;
    if (learned == 0.0 && !revived) return;
    const double n = update_sizes(learned != 0.0);
    const double preserve =
        plain ? 1.0 : (n + static_cast<double>(size) * eps) / n;  // the sum of smoothed sizes
    for_each_range(size, 1 + 16384 / dim, 8.0 * size * dim, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        if (learned != 0.0 || revive[k]) update_code(loops, k, preserve);
      }
    });
  }
};

void check_state(const Tensor& tensor, const char* name, const Tensor& codebook, int64_t rank) {
  check_rank(tensor, name, rank, rank == 2 ? "[K, D]" : "[K]");
  check_like(tensor, name, codebook, "codebook");
  for (int64_t axis = 0; axis < rank; ++axis)
    check_size(tensor, name, axis, codebook.size(axis), "as codebook");
  check(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

template <class W>
W* rows_of(const Tensor& tensor) {
  return static_cast<W*>(tensor.mutable_data_ptr());
}

}  // namespace

void ema_update_(Tensor codebook, Tensor cluster_size, Tensor embed_sum, Tensor counts, Tensor sums,
                 Tensor revive, double decay, double eps, double revived_size, bool normalize, bool plain,
                 bool consume) {
  check_rank(codebook, "codebook", 2, "[K, D]");
  const ScalarType type = codebook.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double,
        "codebook: expected float32 or float64, got ", type);
  check_state(codebook, "codebook", codebook, 2);
  check_state(cluster_size, "cluster_size", codebook, 1);
  check_state(embed_sum, "embed_sum", codebook, 2);
  check_state(counts, "counts", codebook, 1);
  check_state(sums, "sums", codebook, 2);
  check_rank(revive, "revive", 1, "[K]");
  check_type(revive, "revive", ScalarType::Bool);
  check_size(revive, "revive", 0, codebook.size(0), "K of codebook");
  check(!consume || revive.is_contiguous(), "revive: expected a contiguous tensor");
  const Tensor flags = torch::stable::contiguous(revive);
  const auto update = [&](auto number) {
    using W = decltype(number);
    Ema<W>{rows_of<W>(codebook),
           rows_of<W>(cluster_size),
           rows_of<W>(embed_sum),
           rows_of<W>(counts),
           rows_of<W>(sums),
           rows_of<bool>(flags),
           codebook.size(0),
           codebook.size(1),
           decay,
           eps,
           revived_size,
           normalize,
           plain,
           consume}
        .update();
  };
  type == ScalarType::Double ? update(double{}) : update(float{});
}

}  // namespace cpu
}  // namespace vqkernels
