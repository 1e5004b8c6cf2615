#include <optional>
#include <tuple>

#include "gather.cuh"
#include "launcher.h"
#include "quantize_backward.cuh"

namespace vqkernels::cuda {

std::tuple<Tensor, Tensor> gather_op(Tensor x,         // [B, T, D]
                                     Tensor codebook,  // [K, D]
                                     Tensor codes) {   // [B, T] -> quantized [B, T, D], error [B, T]
  check_tokens(x, "x");
  check_codebook(codebook, x);
  check_codes(codes, x);
  Launcher launcher(x);
  Tensor rows = torch::stable::contiguous(codebook), flat = torch::stable::contiguous(codes);
  Tensor quantized = torch::stable::empty_like(x);
  Tensor error = torch::stable::new_empty(x, {x.size(0), x.size(1)}, wide_type(x));
  dispatch(x, [&](auto type) {
    using T = typename decltype(type)::type;
    gather(launcher, merge_batch(tokens_of<T>(x)), data_of<T>(rows), codebook.size(0), data_of<int64_t>(flat),
           merge_batch(mutable_tokens_of<T>(quantized)), mutable_data_of<Scalar<T>>(error));
  });
  return {quantized, error};
}

Tensor quantize_backward_op(Tensor x,                          // [B, T, D]
                            Tensor quantized,                  // [B, T, D]
                            Tensor codes,                      // [B, T]
                            std::optional<Tensor> dquantized,  // [B, T, D], none: zero
                            std::optional<Tensor> derror,      // [B, T], none: zero
                            bool rotation,
                            std::optional<Tensor> mask) {  // bool [B, T] -> dx [B, T, D]
  check_tokens(x, "x");
  check_tokens_like(quantized, "quantized", x);
  check_codes(codes, x);
  if (dquantized.has_value()) check_tokens_like(*dquantized, "dquantized", x);
  if (derror.has_value()) check_token_values(*derror, "derror", x, wide_type(x));
  if (mask.has_value()) check_token_values(*mask, "mask", x, ScalarType::Bool);
  Launcher launcher(x);
  Tensor flat = torch::stable::contiguous(codes);
  if (derror.has_value()) derror = torch::stable::contiguous(*derror);
  if (mask.has_value()) mask = torch::stable::contiguous(*mask);
  Tensor dx = torch::stable::empty_like(x);
  dispatch(x, [&](auto type) {
    using T = typename decltype(type)::type;
    Tokens<const T> gradient = tokens_of<T>(dquantized.has_value() ? *dquantized : x);
    if (!dquantized.has_value()) gradient.data = nullptr;
    quantize_backward(
        launcher, merge_batch(tokens_of<T>(x)), merge_batch(tokens_of<T>(quantized)), data_of<int64_t>(flat),
        merge_batch(gradient), derror.has_value() ? data_of<Scalar<T>>(*derror) : nullptr, rotation,
        merge_batch(mutable_tokens_of<T>(dx)), mask.has_value() ? data_of<bool>(*mask) : nullptr);
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_C, CUDA, m) {
  m.impl("gather", TORCH_BOX(&gather_op));
  m.impl("quantize_backward", TORCH_BOX(&quantize_backward_op));
}

}  // namespace vqkernels::cuda
