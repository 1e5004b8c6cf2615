// The row loops of the training step for AVX2.
#include "training_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a call
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "training_256.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace vqkernels {
namespace cpu {
const TrainingTable* avx2_training() { return &TRAINING; }
}  // namespace cpu
}  // namespace vqkernels

#else
namespace vqkernels {
namespace cpu {
const TrainingTable* avx2_training() { return nullptr; }
}  // namespace cpu
}  // namespace vqkernels
#endif
