#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>

#include "launcher.h"
#ifdef VQKERNELS_SM90A
#include "launcher_hopper.h"
#endif
#include "nearest.cuh"

namespace vqkernels::cuda {

std::tuple<Tensor, Tensor> nearest_op(Tensor x,         // [B, T, D]
                                      Tensor codebook,  // [K, D]
                                      bool cosine,
                                      bool exact) {  // -> codes [B, T], distance [B, T]
  check_tokens(x, "x");
  check_codebook(codebook, x);
  check(codebook.size(0) < std::numeric_limits<int32_t>::max(), "codebook: expected K < 2^31, got shape ",
        shape_of(codebook));
#ifndef VQKERNELS_SM90A
  const char* choice = std::getenv("VQKERNELS_CUDA_COARSE");
  check(choice == nullptr || *choice == 0 || std::strcmp(choice, "mma") == 0,
        "VQKERNELS_CUDA_COARSE: expected mma, the only kernel of this build, got ", choice);
#endif
  Launcher launcher(x);
  Tensor contiguous = torch::stable::contiguous(codebook);
  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
  dispatch(x, [&](auto type) {
    using T = typename decltype(type)::type;
    nearest(launcher, merge_batch(tokens_of<T>(x)), data_of<T>(contiguous), codebook.size(0), cosine, exact,
            mutable_data_of<int64_t>(codes), mutable_data_of<float>(distance));
  });
  return {codes, distance};
}

Tensor zeros(Launcher& launcher, const Tensor& like, int64_t count, ScalarType type) {
  Tensor made = torch::stable::new_empty(like, {count}, type);
  int64_t bytes = count * (type == ScalarType::Double ? sizeof(double) : sizeof(float));
  launcher.zero(made.mutable_data_ptr(), bytes);
  return made;
}

// What a search needs of the codes: operand, bias, bound, centre; of float64 the codes of length 1 (cosine
// only), half norms, summary, nothing.
std::tuple<Tensor, Tensor, Tensor, Tensor> prepare_operands_op(Tensor codebook,  // [K, D], contiguous
                                                               bool cosine) {
  check_rank(codebook, "codebook", 2, "[K, D]");
  check_floating(codebook, "codebook");
  check(codebook.is_contiguous(), "codebook: expected a contiguous tensor");
  int64_t size = codebook.size(0), dim = codebook.size(1);
  check(size >= 1 && dim >= 1 && size < std::numeric_limits<int32_t>::max(),
        "codebook: expected 1 <= K < 2^31 and D >= 1, got shape ", shape_of(codebook));
  Launcher launcher(codebook);
  auto empty = [&](int64_t count, ScalarType type) {
    return torch::stable::new_empty(codebook, {count}, type);
  };
  if (codebook.scalar_type() == ScalarType::Double) {
    Tensor unit = empty(cosine ? size * dim : 0, ScalarType::Double),
           half_norm = empty(size, ScalarType::Double);
    Tensor summary = zeros(launcher, codebook, sizeof(DoubleSummary) / sizeof(double), ScalarType::Double);
    prepare_codes(launcher,
                  Search<double>{{nullptr, 0, 0, dim, 0, 0, 1}, data_of<double>(codebook), size, cosine},
                  KeptDoubles{mutable_data_of<double>(unit), mutable_data_of<double>(half_norm),
                              mutable_data_of<DoubleSummary>(summary)});
    return {unit, half_norm, summary, empty(0, ScalarType::Double)};
  }
  bool split = splits_terms(dim);
  KeptFloats kept = split ? plan_codes<true>(size, dim, launcher.processors())
                          : plan_codes<false>(size, dim, launcher.processors());
  Tensor codes = empty(kept.code_rows * kept.depth, ScalarType::Half);
  Tensor bias = empty(split ? 0 : kept.code_rows, ScalarType::Float);
  Tensor bound = zeros(launcher, codebook, sizeof(CodebookBound) / sizeof(float), ScalarType::Float);
  Tensor centres = empty(kept.code_blocks * dim, ScalarType::Float);
  kept.codes = mutable_data_of<float16>(codes), kept.bias = mutable_data_of<float>(bias);
  kept.bound = mutable_data_of<CodebookBound>(bound), kept.centres = mutable_data_of<float>(centres);
  dispatch(codebook, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      Search<T> search{{nullptr, 0, 0, dim, 0, 0, 1}, data_of<T>(codebook), size, cosine};
      split ? prepare_codes<true>(launcher, search, kept) : prepare_codes<false>(launcher, search, kept);
    }
  });
  return {codes, bias, bound, centres};
}

std::tuple<Tensor, Tensor> nearest_of_operands_op(Tensor x,         // [B, T, D]
                                                  Tensor codebook,  // [K, D], contiguous
                                                  Tensor operand, Tensor bias, Tensor bound, Tensor centre,
                                                  bool cosine,
                                                  bool exact) {  // -> codes [B, T], distance [B, T]
  check_tokens(x, "x");
  check_codebook(codebook, x);
  check(codebook.is_contiguous(), "codebook: expected a contiguous tensor");
  Launcher launcher(x);
  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
  int64_t size = codebook.size(0), dim = codebook.size(1);
  dispatch(x, [&](auto type) {
    using T = typename decltype(type)::type;
    Kept<T> kept{};
    if constexpr (std::is_same_v<T, double>) {
      kept = {mutable_data_of<double>(operand), mutable_data_of<double>(bias),
              mutable_data_of<DoubleSummary>(bound)};
    } else {
      kept = splits_terms(dim) ? plan_codes<true>(size, dim, launcher.processors())
                               : plan_codes<false>(size, dim, launcher.processors());
      check(operand.size(0) == kept.code_rows * kept.depth, "operand: expected ", kept.code_rows * kept.depth,
            " numbers, as prepare_operands makes them, got shape ", shape_of(operand));
      kept.codes = mutable_data_of<float16>(operand), kept.bias = mutable_data_of<float>(bias);
      kept.bound = mutable_data_of<CodebookBound>(bound), kept.centres = mutable_data_of<float>(centre);
    }
    nearest(launcher, merge_batch(tokens_of<T>(x)), data_of<T>(codebook), size, cosine, exact,
            mutable_data_of<int64_t>(codes), mutable_data_of<float>(distance), &kept);
  });
  return {codes, distance};
}

// For `explain`: the coarse kernel of this build on a device of that compute capability, and how to get
// another.
const char* coarse_kernel(int major) {
#ifdef VQKERNELS_SM90A
  const char* choice = std::getenv("VQKERNELS_CUDA_COARSE");
  if (choice != nullptr && std::strcmp(choice, "hopper") == 0)
    return "wgmma and TMA, because VQKERNELS_CUDA_COARSE=hopper";
  return "mma.sync m16n8k16 and cp.async (VQKERNELS_CUDA_COARSE=hopper: wgmma and TMA)";
#else
  return major < 8 ? "mma.sync m16n8k8" : "mma.sync m16n8k16 and cp.async";
#endif
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_C, CUDA, m) {
  m.impl("nearest", TORCH_BOX(&nearest_op));
  m.impl("prepare_operands", TORCH_BOX(&prepare_operands_op));
  m.impl("nearest_of_operands", TORCH_BOX(&nearest_of_operands_op));
}

}  // namespace vqkernels::cuda

extern "C" __attribute__((visibility("default"))) const char* vqkernels_cuda_coarse_kernel(int major) {
  return vqkernels::cuda::coarse_kernel(major);
}
