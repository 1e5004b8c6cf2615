// Between torch and the launch sequences of csrc/cuda/*.cuh: the current stream, workspace from torch's
// allocator, views.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI's CUDA functions
#endif

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "../checks.h"
#include "tokens.cuh"

namespace vqkernels::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Launches on the device and the current stream of `like`; its workspace lives as long as it does, and
// torch's allocator gives the memory to later work on the same stream only.
class Launcher {
 public:
  explicit Launcher(const Tensor& like) : guard_(like.get_device_index()), like_(like) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int64_t processors() const {
    int count = 1;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like_.get_device_index()));
    return count;
  }

  // Small arrays share a piece of memory, since every request costs the host microseconds.
  template <typename T>
  T* allocate(int64_t count) {
    int64_t bytes = ceil_div(static_cast<int64_t>(sizeof(T)) * count, kAlignment) * kAlignment;
    if (bytes > kPieceBytes / 2) return reinterpret_cast<T*>(request(bytes));
    if (bytes > left_) {
      piece_ = request(kPieceBytes);
      left_ = kPieceBytes;
    }
    left_ -= bytes;
    return reinterpret_cast<T*>(piece_ + left_);
  }

  void zero(void* data, int64_t bytes) {
    STD_CUDA_CHECK(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream_));
  }

  template <typename... Params, typename... Args>
  void launch(void (*kernel)(Params...), int64_t blocks, int threads, Args... args) {
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(static_cast<Params>(args)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // For a kernel that calls large_shared_memory<Memory>().
  template <typename Memory, typename... Params, typename... Args>
  void launch_large(void (*kernel)(Params...), int64_t blocks, int threads, Args... args) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Memory)));
    kernel<<<static_cast<unsigned>(blocks), threads, sizeof(Memory), stream_>>>(static_cast<Params>(args)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Stable: equal keys stay in order. order[i] is where sorted[i] came from.
  void sort(const int64_t* keys, int64_t count, const int64_t*& sorted, const int64_t*& order) {
    Tensor input = torch::stable::new_empty(like_, {count}, ScalarType::Long);
    STD_CUDA_CHECK(cudaMemcpyAsync(input.mutable_data_ptr(), keys,
                                   sizeof(int64_t) * static_cast<size_t>(count), cudaMemcpyDeviceToDevice,
                                   stream_));
    std::array<StableIValue, 4> stack{
        torch::stable::detail::from(input), torch::stable::detail::from(std::optional<bool>(true)),
        torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    for (int i = 0; i < 2; ++i) workspace_.push_back(torch::stable::detail::to<Tensor>(stack[i]));
    workspace_.push_back(input);
    sorted = static_cast<const int64_t*>(workspace_[workspace_.size() - 3].const_data_ptr());
    order = static_cast<const int64_t*>(workspace_[workspace_.size() - 2].const_data_ptr());
  }

 private:
  static constexpr int64_t kAlignment = 256, kPieceBytes = 1 << 20;

  char* request(int64_t bytes) {
    workspace_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    return static_cast<char*>(workspace_.back().mutable_data_ptr());
  }

  torch::stable::accelerator::DeviceGuard guard_;
  Tensor like_;
  cudaStream_t stream_;
  std::vector<Tensor> workspace_;
  char* piece_ = nullptr;
  int64_t left_ = 0;  // of the piece, from its beginning
};

template <typename T>
struct Type {
  using type = T;
};

// Calls run(Type<T>{}) for the element type of `tensor`, which checks.h has let through.
template <typename Run>
void dispatch(const Tensor& tensor, Run run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return run(Type<double>{});
    case ScalarType::Half:
      return run(Type<float16>{});
    case ScalarType::BFloat16:
      return run(Type<bfloat16>{});
    default:
      return run(Type<float>{});
  }
}

// The type of sums and errors of x: Scalar<T>.
inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
Tokens<const T> tokens_of(const Tensor& x) {  // [B, T, D]
  return {data_of<T>(x), x.size(0), x.size(1), x.size(2), x.stride(0), x.stride(1), x.stride(2)};
}
template <typename T>
Tokens<T> mutable_tokens_of(const Tensor& x) {  // [B, T, D]
  return {mutable_data_of<T>(x), x.size(0), x.size(1), x.size(2), x.stride(0), x.stride(1), x.stride(2)};
}

}  // namespace vqkernels::cuda
