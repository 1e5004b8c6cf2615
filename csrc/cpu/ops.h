// The raw kernels on the CPU; what each computes is said in vqkernels/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
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

// `nearest`, exact, and the same with the roles exchanged, of the tokens that the mask has; float64 aside.
std::tuple<Tensor, Tensor, Tensor, Tensor> nearest_both(
    Tensor x,                    // [B, T, D]
    Tensor codebook,             // [K, D]
    std::optional<Tensor> mask,  // bool [B, T]
    bool cosine);                // -> codes [B, T], distance [B, T], tokens [K], token_distance [K]

std::tuple<Tensor, Tensor> nearest_k(Tensor x,         // [B, T, D]
                                     Tensor codebook,  // [K, D]
                                     int64_t k,
                                     bool cosine);  // -> codes [B, T, k], distance [B, T, k]

// A codebook prepared once, by a number; `release_snapshot` of snapshot.h ends it. Nobody may write to the
// codebook meanwhile. Metric, precision, instruction set and pass are those of now.
int64_t take_snapshot(Tensor codebook,  // [K, D]
                      bool cosine, bool exact);

std::tuple<Tensor, Tensor> nearest_of_snapshot(Tensor x,           // [B, T, D]
                                               int64_t snapshot);  // -> codes [B, T], distance [B, T]

std::tuple<Tensor, Tensor> nearest_k_of_snapshot(Tensor x,  // [B, T, D]
                                                 int64_t snapshot,
                                                 int64_t k);  // -> codes [B, T, k], distance [B, T, k]

// "byte", "int8", "int16" or "float32": the coarse pass that a search among `size` codes of `dim` dimensions
// begins with; "?" where VQKERNELS_CPU_ISA or VQKERNELS_CPU_PASS asks for one that cannot be.
const char* coarse_pass(int64_t size, int64_t dim, bool exact) noexcept;

// Multiply-adds of one thread on registers alone, in operations a second (two each), of the "float32",
// "int16", "int8" or "byte" pass; 0 where the CPU has no such pass.
double peak_rate(const char* pass) noexcept;

std::tuple<Tensor, Tensor> gather(Tensor x,         // [B, T, D]
                                  Tensor codebook,  // [K, D]
                                  Tensor codes);    // [B, T] -> quantized [B, T, D], error [B, T]

// Search, lookup and squared error in one call; a masked token has code -1, a row of 0 and error 0.
std::tuple<Tensor, Tensor, Tensor> quantize(Tensor x,                    // [B, T, D]
                                            Tensor codebook,             // [K, D]
                                            std::optional<Tensor> mask,  // bool [B, T]
                                            bool cosine,
                                            bool exact);  // -> quantized [B, T, D], codes, error [B, T]

Tensor quantize_backward(Tensor x,                          // [B, T, D]
                         Tensor quantized,                  // [B, T, D]
                         Tensor codes,                      // [B, T]
                         std::optional<Tensor> dquantized,  // [B, T, D], none: zero
                         std::optional<Tensor> derror,      // [B, T], none: zero
                         bool rotation,
                         std::optional<Tensor> mask);  // bool [B, T] -> dx [B, T, D]

// -sum of 2 derror (x - quantized) over the tokens of each code.
Tensor codebook_gradient(Tensor x,                // [B, T, D]
                         Tensor quantized,        // [B, T, D]
                         Tensor codes,            // [B, T]
                         Tensor derror,           // [B, T]
                         int64_t codebook_size);  // -> dcodebook [K, D]

std::tuple<Tensor, Tensor> codebook_stats(Tensor x,                // [B, T, D]
                                          Tensor codes,            // [B, T]
                                          int64_t codebook_size);  // -> counts [K], sums [K, D]

// The same added to what is there; only rows whose code has a token are visited.
void add_statistics_(Tensor x,                     // [B, T, D]
                     Tensor codes,                 // [B, T]
                     Tensor counts,                // [K], written
                     std::optional<Tensor> sums);  // [K, D], written

void ema_update_(Tensor codebook,      // [K, D], written
                 Tensor cluster_size,  // [K], written
                 Tensor embed_sum,     // [K, D], written
                 Tensor counts,        // [K], zeroed with `consume`
                 Tensor sums,          // [K, D], likewise
                 Tensor revive,        // bool [K], likewise
                 double decay, double eps, double revived_size, bool normalize, bool plain, bool consume);

// Statistics and update in one, for codes that nothing is collected for: the bits are those of the two.
void ema_step_(Tensor x,             // [B, T, D]
               Tensor codes,         // [B, T]
               Tensor codebook,      // [K, D], written
               Tensor cluster_size,  // [K], written
               Tensor embed_sum,     // [K, D], written
               double decay, double eps, bool normalize, bool plain);

// The streaming softmax over l_nk = scale <x_n, c_k> + bias_k, p_n = softmax_k(l_n); float32 or float64.
std::tuple<Tensor, Tensor> softmax_forward(Tensor x,                    // [B, T, D]
                                           Tensor codebook,             // [K, D]
                                           std::optional<Tensor> bias,  // [K]
                                           double scale);               // -> lse [B, T], entropy [B, T]

Tensor softmax_code_sums(Tensor x,                    // [B, T, D]
                         Tensor codebook,             // [K, D]
                         std::optional<Tensor> bias,  // [K]
                         double scale,
                         Tensor lse,      // [B, T]
                         Tensor weight);  // [B, T] -> sum_n weight_n p_nk [K]

// dl_nk = p_nk (f_nk - sum_k p f + dlse_n) with f_nk = -dentropy_n (l_nk - lse_n) + weight_n dcode_sums_k +
// <direction_n, c_k>; the codebook's gradient is that of the logits alone.
std::tuple<Tensor, Tensor, Tensor> softmax_backward(Tensor x,                    // [B, T, D]
                                                    Tensor codebook,             // [K, D]
                                                    std::optional<Tensor> bias,  // [K]
                                                    double scale,
                                                    Tensor lse,                        // [B, T]
                                                    Tensor dlse,                       // [B, T]
                                                    Tensor dentropy,                   // [B, T]
                                                    Tensor weight,                     // [B, T]
                                                    std::optional<Tensor> dcode_sums,  // [K]
                                                    std::optional<Tensor> direction,   // [B, T, D]
                                                    bool need_codebook);
// -> dx [B, T, D], dcodebook [K, D], dbias [K]; the last two with K = 0 unless needed

Tensor softmax_sample(Tensor x,                    // [B, T, D]
                      Tensor codebook,             // [K, D]
                      std::optional<Tensor> bias,  // [K]
                      double scale,
                      Tensor uniform);  // [B, T] -> codes [B, T], -1 for a token that is not finite

// "avx512", "avx2" or "portable"; "?" where VQKERNELS_CPU_ISA asks for one that cannot run.
const char* instruction_set() noexcept;

}  // namespace cpu
}  // namespace vqkernels
