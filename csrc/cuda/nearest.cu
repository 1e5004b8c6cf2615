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

STABLE_TORCH_LIBRARY_IMPL(vqkernels_C, CUDA, m) { m.impl("nearest", TORCH_BOX(&nearest_op)); }

}  // namespace vqkernels::cuda

extern "C" __attribute__((visibility("default"))) const char* vqkernels_cuda_coarse_kernel(int major) {
  return vqkernels::cuda::coarse_kernel(major);
}
