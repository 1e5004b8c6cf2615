// Everything the device code asks of the machine: indices, shared memory, barrier, shuffle, atomics, 16-bit
// conversions.
//
// The kernels in csrc/cuda/*.cuh use nothing else of CUDA, and tests/host_cuda/primitives_host.h implements
// the same names for a plain host compiler, so the very same kernel source runs (under sanitizers too) on a
// machine without a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#ifndef VQKERNELS_HOST_CUDA  // else primitives_host.h has come before

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// `blocks` of them at once on a multiprocessor: left to itself, ptxas 13.0 aims higher and spills a register
// or two.
#define VQ_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define VQ_DEVICE __device__ __forceinline__
#define VQ_HOST_DEVICE __host__ __device__ __forceinline__

namespace vqkernels::cuda {

// Types of our own, because torch's build flags switch off the conversions of CUDA's.
struct float16 {
  __half value;
  VQ_HOST_DEVICE explicit operator float() const { return __half2float(value); }
};
struct bfloat16 {
  __nv_bfloat16 value;
  VQ_HOST_DEVICE explicit operator float() const { return __bfloat162float(value); }
};

VQ_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
VQ_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
VQ_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
VQ_DEVICE int64_t grid_blocks() { return static_cast<int64_t>(gridDim.x); }

VQ_DEVICE void barrier() { __syncthreads(); }

// One object per block, uninitialised; every call with the same T in a kernel names the same memory.
template <typename T>
VQ_DEVICE T& shared_memory() {
  static_assert(sizeof(T) <= 48 * 1024, "static shared memory ends at 48 KiB");
  __shared__ T memory;
  return memory;
}

// All 32 lanes of a warp call it together.
template <typename T>
VQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Returns the counter before the increment.
VQ_DEVICE int64_t atomic_increment(int64_t* counter) {
  return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull));
}

VQ_DEVICE double inverse_sqrt(double value) { return rsqrt(value); }
VQ_DEVICE float inverse_sqrt(float value) { return rsqrtf(value); }

// For values >= 0 or NaN: their bit patterns are ordered like the values, NaN above infinity.
VQ_DEVICE void atomic_max(double* target, double value) {
  atomicMax(reinterpret_cast<unsigned long long*>(target),
            static_cast<unsigned long long>(__double_as_longlong(value)));
}

VQ_DEVICE float widen(float value) { return value; }
VQ_DEVICE double widen(double value) { return value; }
VQ_DEVICE float widen(float16 value) { return static_cast<float>(value); }
VQ_DEVICE float widen(bfloat16 value) { return static_cast<float>(value); }

VQ_DEVICE void narrow(float& out, float value) { out = value; }
VQ_DEVICE void narrow(double& out, double value) { out = value; }
VQ_DEVICE void narrow(float16& out, float value) { out.value = __float2half_rn(value); }
VQ_DEVICE void narrow(bfloat16& out, float value) { out.value = __float2bfloat16_rn(value); }

}  // namespace vqkernels::cuda

#endif
