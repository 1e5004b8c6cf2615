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

#include "training_256.h"

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
