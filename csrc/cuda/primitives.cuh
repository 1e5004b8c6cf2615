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
#define VQ_CALLED __device__ __noinline__  // for what is long and called in several places
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

// The same for a kernel that launcher.launch_large<T>() has started, where T may be as large as the device
// allows.
template <typename T>
VQ_DEVICE T& large_shared_memory() {
  extern __shared__ uint4 memory_of_launch[];
  return *reinterpret_cast<T*>(memory_of_launch);
}

// All 32 lanes of a warp call these together.
template <typename T>
VQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
VQ_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
VQ_DEVICE int lowest_bit(uint32_t votes) { return __ffs(static_cast<int>(votes)) - 1; }

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

VQ_DEVICE void atomic_max(float* target, float value) {
  atomicMax(reinterpret_cast<unsigned*>(target), static_cast<unsigned>(__float_as_uint(value)));
}

VQ_DEVICE float widen(float value) { return value; }
VQ_DEVICE double widen(double value) { return value; }
VQ_DEVICE float widen(float16 value) { return static_cast<float>(value); }
VQ_DEVICE float widen(bfloat16 value) { return static_cast<float>(value); }

VQ_DEVICE void narrow(float& out, float value) { out = value; }
VQ_DEVICE void narrow(double& out, double value) { out = value; }
VQ_DEVICE void narrow(float16& out, float value) { out.value = __float2half_rn(value); }
VQ_DEVICE void narrow(bfloat16& out, float value) { out.value = __float2bfloat16_rn(value); }

// 16 bytes: what a copy moves, and one row of an 8 x 8 matrix of fp16.
struct alignas(16) Chunk {
  uint32_t words[4];
};

VQ_DEVICE unsigned shared_window_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Copies between a thread's commits form a group. wait_copies<N>: this thread's groups but the last N have
// arrived; a barrier tells the others. `valid` false writes zeros and does not read. Turing copies at once
// instead.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kCopyStages = 2;  // all that 64 KiB of shared memory hold of two blocks
VQ_DEVICE void copy_async(Chunk* shared, const Chunk* global, bool valid) {
  *shared = valid ? *global : Chunk{{0, 0, 0, 0}};
}
VQ_DEVICE void commit_copies() {}
template <int PENDING>
VQ_DEVICE void wait_copies() {}
#else
constexpr int kCopyStages = 3;
VQ_DEVICE void copy_async(Chunk* shared, const Chunk* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_window_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
VQ_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
VQ_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif

// PTX ISA "ldmatrix": four 8 x 8 matrices of fp16; lane i gives row i % 8 of matrix i / 8 and gets, of each
// matrix, elements 2 (i % 4) and the next of row i / 4. All 32 lanes call it together.
VQ_DEVICE void load_matrices(uint32_t (&out)[4], const Chunk* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_window_address(row))
               : "memory");
}

// PTX ISA "mma.m16n8k16", fp16 with float32 sums: sum += a b. With g = lane / 4 and q = lane % 4,
//   a[0], a[1]: rows g, g + 8 at columns 2 q, 2 q + 1;  a[2], a[3]: the same at columns 2 q + 8, 2 q + 9
//   b0, b1: column g at rows 2 q, 2 q + 1 and 2 q + 8, 2 q + 9
//   sum: (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1)
VQ_DEVICE void multiply_16x8x16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace vqkernels::cuda

#endif
