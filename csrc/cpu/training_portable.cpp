// The row loops of the training step for every architecture.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a call
#endif
#include "training_loops.h"

namespace vqkernels {
namespace cpu {
const TrainingTable* portable_training() { return &TRAINING; }
}  // namespace cpu
}  // namespace vqkernels
