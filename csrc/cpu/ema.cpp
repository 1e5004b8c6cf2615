// The codebook's moving average over the statistics of a step, in place. Sums over the codes run in a fixed
// order.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../checks.h"
#include "ema.h"
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

  // Whether a code that is not revived has a token.
  bool any_counted() const {
    for (int64_t k = 0; k < size; ++k) {
      if (counts[k] != W(0) && !revive[k]) return true;
    }
    return false;
  }

  // New cluster sizes; returns their sum.
  double update_sizes(const EmaStep& step) const {
    return sum_of_blocks(size, [&](int64_t begin, int64_t end) {
      return training_loops<W>().learn_sizes(step, counts + begin, revive + begin, end - begin,
                                             cluster_size + begin);
    });
  }

  // Runs of codes between revived ones.
  void update_rows(const EmaStep& step, bool learns, int64_t begin, int64_t end) const {
    const TrainingLoops<W>& loops = training_loops<W>();
    W* consumed = consume ? counts : nullptr;
    for (int64_t k = begin; k < end;) {
      const void* found = std::memchr(revive + k, true, end - k);
      const int64_t revived = found == nullptr ? end : static_cast<const bool*>(found) - revive;
      if (learns) {
        loops.learn_rows(step, cluster_size, consumed, sums, k, revived, dim, embed_sum, codebook);
      }
      if (revived < end) revive_code(revived);
      if (revived < end && consume) clear(revived);
      k = revived + 1;
    }
  }

  void update() const {
    const bool learns = any_counted();
    if (!learns && std::memchr(revive, true, size) == nullptr) return;
    EmaStep step{learns ? decay : 1.0, eps, 1.0, revived_size, normalize};
    step.preserve = preserved(update_sizes(step), size, eps, plain);
    for_each_range(size, 1 + 16384 / dim, 8.0 * size * dim,
                   [&](int64_t begin, int64_t end) { update_rows(step, learns, begin, end); });
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

void check_codebook_state(const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_sum) {
  check_rank(codebook, "codebook", 2, "[K, D]");
  const ScalarType type = codebook.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double,
        "codebook: expected float32 or float64, got ", type);
  check_state(codebook, "codebook", codebook, 2);
  check_state(cluster_size, "cluster_size", codebook, 1);
  check_state(embed_sum, "embed_sum", codebook, 2);
}

void ema_update_(Tensor codebook, Tensor cluster_size, Tensor embed_sum, Tensor counts, Tensor sums,
                 Tensor revive, double decay, double eps, double revived_size, bool normalize, bool plain,
                 bool consume) {
  check_codebook_state(codebook, cluster_size, embed_sum);
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
  codebook.scalar_type() == ScalarType::Double ? update(double{}) : update(float{});
}

}  // namespace cpu
}  // namespace vqkernels
