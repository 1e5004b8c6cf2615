// The row loops of the training step for every architecture.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a call
#endif
namespace vqkernels {
namespace cpu {
namespace {

struct Unit {
  typedef float Floats __attribute__((vector_size(8)));
  typedef double Doubles __attribute__((vector_size(16)));
  static Doubles widen(Floats v) { return Doubles{v[0], v[1]}; }  // GCC 12 converts vectors of two one by one
  static Floats narrow(Doubles v) { return __builtin_convertvector(v, Floats); }
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels

#include "training_loops.h"

namespace vqkernels {
namespace cpu {
const TrainingTable* portable_training() { return &TRAINING; }
}  // namespace cpu
}  // namespace vqkernels
