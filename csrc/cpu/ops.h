// The raw kernels on the CPU; what each computes is said in vqkernels/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace vqkernels {
namespace cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> nearest(Tensor x,         // [B, T, D]
                                   Tensor codebook,  // [K, D]
                                   bool cosine,
                                   bool exact);  // -> codes [B, T], distance [B, T]

// The same with numbers float64 [11]: thread-seconds of the five stages of report.h, certified tokens,
// granules left, codes reranked, tokens scanned, 1 where the codebook was found prepared, and the pass (0
// int16, 1 float32, 2 float64).
std::tuple<Tensor, Tensor, Tensor> nearest_report(Tensor x, Tensor codebook, bool cosine, bool exact);

std::tuple<Tensor, Tensor> nearest_k(Tensor x,         // [B, T, D]
                                     Tensor codebook,  // [K, D]
                                     int64_t k,
                                     bool cosine);  // -> codes [B, T, k], distance [B, T, k]

// "int16" or "float32": the coarse pass that a search in `dim` dimensions takes; "?" where VQKERNELS_CPU_ISA
// or VQKERNELS_CPU_PASS asks for one that cannot be.
const char* coarse_pass(int64_t dim, bool exact) noexcept;

// Multiply-adds of one thread on registers alone, in operations a second (two each), of the "float32" or
// "int16" pass; 0 where the CPU has no such pass.
double peak_rate(const char* pass) noexcept;

std::tuple<Tensor, Tensor> gather(Tensor x,         // [B, T, D]
                                  Tensor codebook,  // [K, D]
                                  Tensor codes);    // [B, T] -> quantized [B, T, D], error [B, T]

Tensor quantize_backward(Tensor x,           // [B, T, D]
                         Tensor quantized,   // [B, T, D]
                         Tensor codes,       // [B, T]
                         Tensor dquantized,  // [B, T, D]
                         Tensor derror,      // [B, T]
                         bool rotation);     // -> dx [B, T, D]

std::tuple<Tensor, Tensor> codebook_stats(Tensor x,                // [B, T, D]
                                          Tensor codes,            // [B, T]
                                          int64_t codebook_size);  // -> counts [K], sums [K, D]

void ema_update_(Tensor codebook,      // [K, D], written
                 Tensor cluster_size,  // [K], written
                 Tensor embed_sum,     // [K, D], written
                 Tensor counts,        // [K]
                 Tensor sums,          // [K, D]
                 Tensor revive,        // bool [K]
                 double decay, double eps, double revived_size, bool normalize);

// "avx512", "avx2" or "portable"; "?" where VQKERNELS_CPU_ISA asks for one that cannot run.
const char* instruction_set() noexcept;

}  // namespace cpu
}  // namespace vqkernels
