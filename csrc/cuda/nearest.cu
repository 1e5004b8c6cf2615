#include <limits>
#include <tuple>

#include "launcher.h"
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

STABLE_TORCH_LIBRARY_IMPL(vqkernels_C, CUDA, m) { m.impl("nearest", TORCH_BOX(&nearest_op)); }

}  // namespace vqkernels::cuda
