// The row loops of the training step for AVX512.
#include "training_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a call
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

namespace vqkernels {
namespace cpu {
namespace {

// Of 256 bits: where rows come from beyond the caches (16384 tokens, 16384 codes, D = 256), registers of 512
// take 6.0 instead of 5.1 ms on a Xeon (Sapphire Rapids), and gain nothing elsewhere.
struct Unit {
  typedef float Floats __attribute__((vector_size(16)));
  typedef double Doubles __attribute__((vector_size(32)));
  static Doubles widen(Floats v) { return _mm256_cvtps_pd(v); }
  static Floats narrow(Doubles v) { return _mm256_cvtpd_ps(v); }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "training_loops.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace vqkernels {
namespace cpu {
const TrainingTable* avx512_training() { return &TRAINING; }
}  // namespace cpu
}  // namespace vqkernels

#else
namespace vqkernels {
namespace cpu {
const TrainingTable* avx512_training() { return nullptr; }
}  // namespace cpu
}  // namespace vqkernels
#endif
