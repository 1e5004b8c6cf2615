// Argument checks of the raw kernels. Every message names the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace vqkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error("<parts joined>") where the condition fails.
template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  text << "]";
  return text.str();
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_floating(const Tensor& tensor, const char* name) {
  check(is_floating(tensor.scalar_type()), name, ": expected float32, float16, bfloat16 or float64, got ",
        tensor.scalar_type());
}

inline void check_type(const Tensor& tensor, const char* name, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, ": expected dtype ", expected, ", got ",
        tensor.scalar_type());
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  check(tensor.scalar_type() == other.scalar_type(), name, ": expected dtype ", other.scalar_type(), " like ",
        other_name, ", got ", tensor.scalar_type());
  const bool same_device = tensor.is_cuda() == other.is_cuda() && tensor.is_cpu() == other.is_cpu() &&
                           tensor.get_device_index() == other.get_device_index();
  check(same_device, name, ": expected on the device of ", other_name);
}

inline void check_rank(const Tensor& tensor, const char* name, int64_t rank, const char* shape) {
  check(tensor.dim() == rank, name, ": expected ", shape, ", got shape ", shape_of(tensor));
}

inline void check_size(const Tensor& tensor, const char* name, int64_t axis, int64_t expected,
                       const char* meaning) {
  check(tensor.size(axis) == expected, name, ": expected size ", expected, " (", meaning, ") along axis ",
        axis, ", got shape ", shape_of(tensor));
}

// x [B, T, D], floating.
inline void check_tokens(const Tensor& x, const char* name) {
  check_rank(x, name, 3, "[B, T, D]");
  check_floating(x, name);
  check(x.size(2) >= 1, name, ": expected D >= 1, got shape ", shape_of(x));
}

// Tokens with the shape and dtype of x.
inline void check_tokens_like(const Tensor& tensor, const char* name, const Tensor& x) {
  check_rank(tensor, name, 3, "[B, T, D]");
  check_like(tensor, name, x, "x");
  for (int64_t axis = 0; axis < 3; ++axis) check_size(tensor, name, axis, x.size(axis), "as x");
}

// codebook [K, D] for x [B, T, D].
inline void check_codebook(const Tensor& codebook, const Tensor& x) {
  check_rank(codebook, "codebook", 2, "[K, D]");
  check_like(codebook, "codebook", x, "x");
  check(codebook.size(0) >= 1, "codebook: expected K >= 1, got shape ", shape_of(codebook));
  check_size(codebook, "codebook", 1, x.size(2), "D of x");
}

// codes int64 [B, T] for x [B, T, D].
inline void check_codes(const Tensor& codes, const Tensor& x) {
  check_rank(codes, "codes", 2, "[B, T]");
  check_type(codes, "codes", ScalarType::Long);
  check_size(codes, "codes", 0, x.size(0), "B of x");
  check_size(codes, "codes", 1, x.size(1), "T of x");
}

// One number of `type` for each token of x [B, T, D].
inline void check_token_values(const Tensor& values,  // [B, T]
                               const char* name, const Tensor& x, ScalarType type) {
  check_rank(values, name, 2, "[B, T]");
  check_type(values, name, type);
  check_size(values, name, 0, x.size(0), "B of x");
  check_size(values, name, 1, x.size(1), "T of x");
}

}  // namespace vqkernels
