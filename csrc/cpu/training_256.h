// The loops of training_loops.h in registers of 256 bits, for AVX2, and for AVX512 too: where rows come from
// beyond the caches (16384 tokens, 16384 codes, D = 256), registers of 512 take 6.0 instead of 5.1 ms on a
// Xeon (Sapphire Rapids), and gain nothing elsewhere. The including unit has <immintrin.h>.
#pragma once

#include "training_table.h"

namespace vqkernels {
namespace cpu {
namespace {

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
