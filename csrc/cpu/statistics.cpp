// Counts and sums of the tokens of every code, and the codebook's moving average over them. All sums run in a
// fixed order in float64, so that thread count and run do not show in any bit.
#include <cmath>
#include <cstdint>
#include <vector>

#include "../checks.h"
#include "ops.h"
#include "parallel.h"
#include "tokens.h"

namespace vqkernels {
namespace cpu {
namespace {

// Tokens sorted by code, in their order within a code; tokens without a code are left out.
struct Grouping {
  std::vector<int64_t> start;  // [K + 1]
  Buffer<int64_t> order;       // [tokens with a code]
};

std::vector<int64_t> count_codes(const int64_t* codes, int64_t count, int64_t codebook_size) {
  std::vector<int64_t> counts(codebook_size, 0);
  for (int64_t n = 0; n < count; ++n) {
    check(codes[n] < codebook_size, "codes: expected values below codebook_size = ", codebook_size, ", got ",
          codes[n]);
    if (codes[n] >= 0) ++counts[codes[n]];
  }
  return counts;
}

Grouping group_by_code(const int64_t* codes, int64_t count, const std::vector<int64_t>& counts) {
  Grouping groups{std::vector<int64_t>(counts.size() + 1, 0), Buffer<int64_t>(count)};
  for (size_t k = 0; k < counts.size(); ++k) groups.start[k + 1] = groups.start[k] + counts[k];
  std::vector<int64_t> next(groups.start.begin(), groups.start.end() - 1);
  for (int64_t n = 0; n < count; ++n) {
    if (codes[n] >= 0) groups.order[next[codes[n]]++] = n;
  }
  return groups;
}

// The next row lies anywhere in memory; the processor would not guess it.
template <class T>
void prefetch_row(const Tokens<const T>& x, int64_t n) {
  constexpr int64_t PER_LINE = 64 / sizeof(T);
  if (x.dim_stride != 1) return;
  const T* row = x.row(n);
  for (int64_t d = 0; d < x.dim; d += PER_LINE) __builtin_prefetch(row + d);
}

// One code after another, its tokens in order.
template <class T>
void sum_by_code(const Tokens<const T>& x, const Grouping& groups, int64_t codebook_size, Wide<T>* sums) {
  const int64_t dim = x.dim, stride = x.dim_stride;
  const int64_t codes_per_item = 1 + 8192 / dim;
  for_each_item<std::vector<double>>(
      ceil_div(codebook_size, codes_per_item), 4.0 * (x.count() + codebook_size) * dim,
      [&] { return std::vector<double>(dim); },
      [&](int64_t item, std::vector<double>& sum) {
        const int64_t first = item * codes_per_item;
        for (int64_t k = first; k < codebook_size && k < first + codes_per_item; ++k) {
          double* __restrict total = sum.data();
          for (int64_t d = 0; d < dim; ++d) total[d] = 0.0;
          for (int64_t i = groups.start[k]; i < groups.start[k + 1]; ++i) {
            const T* row = x.row(groups.order[i]);
            if (i + 1 < groups.start.back()) prefetch_row(x, groups.order[i + 1]);
            if (stride == 1) {
              for (int64_t d = 0; d < dim; ++d) total[d] += static_cast<Wide<T>>(row[d]);
            } else {
              for (int64_t d = 0; d < dim; ++d) total[d] += static_cast<Wide<T>>(row[d * stride]);
            }
          }
          for (int64_t d = 0; d < dim; ++d) sums[k * dim + d] = static_cast<Wide<T>>(total[d]);
        }
      });
}

// One dimension after another, all tokens in order: for maps whose neighbouring tokens lie side by side. The
// additions are those of sum_by_code, so the result is the same to the last bit.
template <class T>
void sum_by_dimension(const Tokens<const T>& x, const int64_t* codes, int64_t codebook_size, Wide<T>* sums) {
  const int64_t dim = x.dim;
  for_each_item<std::vector<double>>(
      dim, 4.0 * (x.count() + codebook_size) * dim, [&] { return std::vector<double>(codebook_size); },
      [&](int64_t d, std::vector<double>& sum) {
        for (double& total : sum) total = 0.0;
        x.for_runs(0, x.count(), [&](const T* first, int64_t position, int64_t count) {
          for (int64_t i = 0; i < count; ++i) {
            const int64_t k = codes[position + i];
            if (k >= 0) sum[k] += static_cast<Wide<T>>(first[i * x.length_stride + d * x.dim_stride]);
          }
        });
        for (int64_t k = 0; k < codebook_size; ++k) sums[k * dim + d] = static_cast<Wide<T>>(sum[k]);
      });
}

template <class T>
void statistics_into(const Tokens<const T>& x, const int64_t* codes, int64_t codebook_size, Wide<T>* counts,
                     Wide<T>* sums) {
  const std::vector<int64_t> number = count_codes(codes, x.count(), codebook_size);
  for (int64_t k = 0; k < codebook_size; ++k) counts[k] = static_cast<Wide<T>>(number[k]);
  const bool side_by_side = x.length_stride < x.dim_stride && x.length > 1;
  if (side_by_side) {
    sum_by_dimension(x, codes, codebook_size, sums);
  } else {
    sum_by_code(x, group_by_code(codes, x.count(), number), codebook_size, sums);
  }
}

// ---------------------------------------------------------------------------------------------- EMA

template <class W>
struct Ema {
  W* codebook;         // [K, D]
  W* cluster_size;     // [K]
  W* embed_sum;        // [K, D]
  const W* counts;     // [K]
  const W* sums;       // [K, D]
  const bool* revive;  // [K]
  int64_t size;
  int64_t dim;
  double decay;
  double eps;
  double revived_size;
  bool normalize;

  // Sum over codes of value(k): eight partial sums, added in a fixed order.
  template <class Value>
  double total(const Value& value) const {
    double parts[8] = {};
    for (int64_t k = 0; k < size; ++k) parts[k % 8] += value(k);
    double sum = 0.0;
    for (const double part : parts) sum += part;
    return sum;
  }

  double norm_divisor(const W* row) const {
    double square = 0.0;
    for (int64_t d = 0; d < dim; ++d) square += static_cast<double>(row[d]) * row[d];
    const double norm = std::sqrt(square);
    return norm > 1e-12 ? norm : 1e-12;
  }

  void revive_code(int64_t k) const {
    const W* sampled = sums + k * dim;
    const double divisor = normalize ? norm_divisor(sampled) : 1.0;
    for (int64_t d = 0; d < dim; ++d) {
      const double value = sampled[d] / divisor;
      codebook[k * dim + d] = static_cast<W>(value);
      embed_sum[k * dim + d] = static_cast<W>(value * revived_size);
    }
  }

  // codebook row = smoothed mean of the code's tokens (Laplace smoothing, van den Oord et al. 2017, appendix
  // A.1).
  void move_code(int64_t k, double n) const {
    W* sum = embed_sum + k * dim;
    W* row = codebook + k * dim;
    for (int64_t d = 0; d < dim; ++d) {
      sum[d] = static_cast<W>(decay * sum[d] + (1.0 - decay) * sums[k * dim + d]);
    }
    const double smoothed = (cluster_size[k] + eps) / (n + static_cast<double>(size) * eps) * n;
    for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<W>(sum[d] / smoothed);
    if (!normalize) return;
    const double divisor = norm_divisor(row);
    for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<W>(row[d] / divisor);
  }

  void update() const {
    const bool any =
        total([&](int64_t k) { return revive[k] ? 0.0 : static_cast<double>(counts[k]); }) != 0.0;
    for (int64_t k = 0; k < size; ++k) {
      if (revive[k]) {
        cluster_size[k] = static_cast<W>(revived_size);
      } else if (any) {
        cluster_size[k] = static_cast<W>(decay * cluster_size[k] + (1.0 - decay) * counts[k]);
      }
    }
    const double n = total([&](int64_t k) { return static_cast<double>(cluster_size[k]); });
    for_each_range(size, 1 + 16384 / dim, 8.0 * size * dim, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        if (revive[k]) {
          revive_code(k);
        } else if (any) {
          move_code(k, n);
        }
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
void ema_update(const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_sum,
                const Tensor& counts, const Tensor& sums, const Tensor& revive, double decay, double eps,
                double revived_size, bool normalize) {
  const Ema<W> ema{static_cast<W*>(codebook.mutable_data_ptr()),
                   static_cast<W*>(cluster_size.mutable_data_ptr()),
                   static_cast<W*>(embed_sum.mutable_data_ptr()),
                   static_cast<const W*>(counts.const_data_ptr()),
                   static_cast<const W*>(sums.const_data_ptr()),
                   static_cast<const bool*>(revive.const_data_ptr()),
                   codebook.size(0),
                   codebook.size(1),
                   decay,
                   eps,
                   revived_size,
                   normalize};
  ema.update();
}

}  // namespace

std::tuple<Tensor, Tensor> codebook_stats(Tensor x, Tensor codes, int64_t codebook_size) {
  check_tokens(x, "x");
  check_codes(codes, x);
  check(codebook_size >= 1, "codebook_size: expected at least 1, got ", codebook_size);
  codes = torch::stable::contiguous(codes);
  const ScalarType type = wide_type(x);
  Tensor counts = torch::stable::new_empty(x, {codebook_size}, type);
  Tensor sums = torch::stable::new_empty(x, {codebook_size, x.size(2)}, type);
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    statistics_into<T>(tokens_of<T>(x), static_cast<const int64_t*>(codes.const_data_ptr()), codebook_size,
                       static_cast<Wide<T>*>(counts.mutable_data_ptr()),
                       static_cast<Wide<T>*>(sums.mutable_data_ptr()));
  });
  return {counts, sums};
}

void ema_update_(Tensor codebook, Tensor cluster_size, Tensor embed_sum, Tensor counts, Tensor sums,
                 Tensor revive, double decay, double eps, double revived_size, bool normalize) {
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
  const Tensor flags = torch::stable::contiguous(revive);
  const auto update = type == ScalarType::Double ? ema_update<double> : ema_update<float>;
  update(codebook, cluster_size, embed_sum, counts, sums, flags, decay, eps, revived_size, normalize);
}

}  // namespace cpu
}  // namespace vqkernels
