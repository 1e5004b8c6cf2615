#include <tuple>

#include "codebook_stats.cuh"
#include "ema_update.cuh"
#include "launcher.h"

namespace vqkernels::cuda {

std::tuple<Tensor, Tensor> codebook_stats_op(Tensor x,                 // [B, T, D]
                                             Tensor codes,             // [B, T]
                                             int64_t codebook_size) {  // -> counts [K], sums [K, D]
  check_tokens(x, "x");
  check_codes(codes, x);
  check(codebook_size >= 1, "codebook_size: expected at least 1, got ", codebook_size);
  Launcher launcher(x);
  Tensor flat = torch::stable::contiguous(codes);
  Tensor counts = torch::stable::new_empty(x, {codebook_size}, wide_type(x));
  Tensor sums = torch::stable::new_empty(x, {codebook_size, x.size(2)}, wide_type(x));
  dispatch(x, [&](auto type) {
    using T = typename decltype(type)::type;
    codebook_stats<T>(launcher, merge_batch(tokens_of<T>(x)), data_of<int64_t>(flat), codebook_size,
                      mutable_data_of<Scalar<T>>(counts), mutable_data_of<Scalar<T>>(sums));
  });
  return {counts, sums};
}

void check_statistics(const Tensor& tensor, const char* name, const Tensor& codebook, bool rows) {
  check_rank(tensor, name, rows ? 2 : 1, rows ? "[K, D]" : "[K]");
  check_like(tensor, name, codebook, "codebook");
  check_size(tensor, name, 0, codebook.size(0), "K of codebook");
  if (rows) check_size(tensor, name, 1, codebook.size(1), "D of codebook");
  check(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

void ema_update_op_(Tensor codebook,      // [K, D], written
                    Tensor cluster_size,  // [K], written
                    Tensor embed_sum,     // [K, D], written
                    Tensor counts,        // [K]
                    Tensor sums,          // [K, D]
                    Tensor revive,        // bool [K]
                    double decay, double eps, double revived_size, bool normalize, bool plain, bool consume) {
  check(!consume, "consume: expected false on CUDA, where the caller clears the statistics");
  bool wide = codebook.scalar_type() == ScalarType::Double;
  if (!wide) check_type(codebook, "codebook", ScalarType::Float);
  check_statistics(codebook, "codebook", codebook, true);
  check_statistics(cluster_size, "cluster_size", codebook, false);
  check_statistics(embed_sum, "embed_sum", codebook, true);
  check_statistics(counts, "counts", codebook, false);
  check_statistics(sums, "sums", codebook, true);
  check_rank(revive, "revive", 1, "[K]");
  check_type(revive, "revive", ScalarType::Bool);
  check_size(revive, "revive", 0, codebook.size(0), "K of codebook");
  if (codebook.size(0) == 0) return;
  Launcher launcher(codebook);
  Tensor marks = torch::stable::contiguous(revive);
  auto run = [&](auto type) {
    using S = typename decltype(type)::type;
    ema_update(launcher, EmaUpdate<S>{mutable_data_of<S>(codebook), mutable_data_of<S>(cluster_size),
                                      mutable_data_of<S>(embed_sum), data_of<S>(counts), data_of<S>(sums),
                                      data_of<bool>(marks), codebook.size(0), codebook.size(1), decay, eps,
                                      revived_size, normalize, plain});
  };
  wide ? run(Type<double>{}) : run(Type<float>{});
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_C, CUDA, m) {
  m.impl("codebook_stats", TORCH_BOX(&codebook_stats_op));
  m.impl("ema_update_", TORCH_BOX(&ema_update_op_));
}

}  // namespace vqkernels::cuda
