// What the Hopper kernel asks of the machine beyond primitives.cuh: warpgroup products, bulk tensor copies
// and the barriers that order them. Compiled for sm_90a only; tests/host_cuda/primitives_hopper_host.h
// implements the same names, with the same asynchrony, for a plain host compiler.
//
// Quoted headings are sections of NVIDIA's "Parallel Thread Execution ISA", 9.0.
#pragma once

#include "primitives.cuh"

#ifndef VQKERNELS_HOST_CUDA  // else primitives_hopper_host.h has come before

#include <cuda.h>

#define VQ_GRID_CONSTANT __grid_constant__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define VQ_SM90A
#elif defined(VQKERNELS_SM90A) && defined(__CUDA_ARCH__)
#error "VQKERNELS_SM90A: expected -gencode=arch=compute_90a,code=sm_90a and no other architecture"
#endif

namespace vqkernels::cuda {

using TensorMap =
    CUtensorMap;  // a kernel gets it as a VQ_GRID_CONSTANT parameter: the copy engine reads it there
using SharedAddress = uint32_t;  // in the shared window, what descriptors and barriers are made of

VQ_DEVICE SharedAddress dynamic_shared_memory() {
  return shared_window_address(&large_shared_memory<char>());
}

// 8-byte aligned, and constant for as long as the kernel runs.
VQ_DEVICE void load_pair(const float* from, float& first, float& second) {
  float2 pair = __ldg(reinterpret_cast<const float2*>(from));
  first = pair.x, second = pair.y;
}

// if (condition) to = from, resp. to = one * value with one = 1: a predicated multiply-add. Comparisons,
// minima and selections share one unit of half the rate, which is the busiest there is while scores are
// folded; this is not its work. ptxas makes a selection of a plain predicated move, and of a product of two
// constants (hence `one`).
VQ_DEVICE void copy_if(bool condition, float& to, float from) {
  asm("{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "@p fma.rn.f32 %0, %1, 0f3F800000, 0f80000000;\n"
      "}\n"
      : "+f"(to)
      : "f"(from), "r"(static_cast<int>(condition)));
}
VQ_DEVICE void set_if(bool condition, float& to, float one, float value) {
  asm("{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %3, 0;\n"
      "@p fma.rn.f32 %0, %1, %2, 0f00000000;\n"
      "}\n"
      : "+f"(to)
      : "f"(one), "f"(value), "r"(static_cast<int>(condition)));
}

// The same value in every lane, and the compiler knows it: branches on it are no divergence.
VQ_DEVICE int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// "mbarrier: phase of the mbarrier object": a phase ends when `arrivals` threads arrived and every expected
// byte was written.
VQ_DEVICE void init_barrier(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialised barriers known to the copy engine.
VQ_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
VQ_DEVICE void arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
VQ_DEVICE void arrive_expecting(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; the phase before a barrier's first counts as ended, with
// parity 1.
VQ_DEVICE void wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// "cp.async.bulk.tensor": the box of `map` at (column, row) to shared memory; what lies outside the tensor
// arrives as zeros, and all bytes of the box count on the barrier. One thread calls it.
VQ_DEVICE void copy_box(SharedAddress to, const TensorMap& map, int column, int row, SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// "setmaxnreg": registers a thread of this warpgroup may use from here on.
template <int COUNT>
VQ_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
VQ_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// "bar, barrier": `id` names one of the block's 16 barriers; `threads` sync or arrive, and only those that
// sync wait.
VQ_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
VQ_DEVICE void arrive_named(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "Asynchronous wgmma instructions": a warpgroup's products run behind its back. The fence comes before the
// first product that uses registers the threads have touched; results are there after wait_products.
VQ_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

constexpr int kProductRows = 64;        // tokens of one product
constexpr int kProductColumns = 128;    // codes
constexpr int kProductDepth = 16;       // dimensions
constexpr int kProductRegisters = 128;  // float32 results of each of the 128 threads, of two products

#define VQ_FLOATS_8(d, i)                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define VQ_FLOATS_32(d, i) \
  VQ_FLOATS_8(d, i), VQ_FLOATS_8(d, i + 8), VQ_FLOATS_8(d, i + 16), VQ_FLOATS_8(d, i + 24)
#define VQ_FLOATS_128(d) VQ_FLOATS_32(d, 0), VQ_FLOATS_32(d, 32), VQ_FLOATS_32(d, 64), VQ_FLOATS_32(d, 96)

// Both name the results, so that the compiler moves no use of them across.
VQ_DEVICE void fence_products(float (&results)[kProductRegisters]) {
  asm volatile("wgmma.fence.sync.aligned;" : VQ_FLOATS_128(results)::"memory");
}
// Until at most PENDING committed groups run.
template <int PENDING>
VQ_DEVICE void wait_products(float (&results)[kProductRegisters]) {
  asm volatile("wgmma.wait_group.sync.aligned %128;" : VQ_FLOATS_128(results) : "n"(PENDING) : "memory");
}

// Results of 64 tokens and 128 codes, in registers 64 * HALF onwards: = tokens . codes^T (+ results, if
// `add`). Both operands by "matrix descriptor", dimensions innermost ("K-major"). Thread t holds, of row 16
// (t / 32) + t % 32 / 4 + 8 i, column 8 j + 2 (t % 4) + b, in register 64 * HALF + 4 j + 2 i + b.
template <int HALF>
VQ_DEVICE void multiply(float (&results)[kProductRegisters], uint64_t tokens, uint64_t codes, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, add, 1, 1, 0, 0;\n"
      "}\n"
      : VQ_FLOATS_32(results, 64 * HALF), VQ_FLOATS_32(results, 64 * HALF + 32)
      : "l"(tokens), "l"(codes), "r"(static_cast<int>(add)));
}

}  // namespace vqkernels::cuda

#endif
