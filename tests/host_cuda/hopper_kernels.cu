// The Hopper kernels and nothing else: what tests/test_cuda_hopper.py reads registers, spills and
// instructions from. No torch headers, so that they compile in seconds.
#include "../../csrc/cuda/nearest_hopper.cuh"

using namespace vqkernels::cuda;

// Names kernels, so that they are compiled; never runs.
struct Launcher {
  int64_t processors() const { return 1; }
};

TensorMap make_tensor_map(Launcher&, const float16*, int64_t, int64_t, int, int) { return {}; }

template <typename... Params, typename... Args>
void launch_hopper(Launcher&, void (*kernel)(Params...), int64_t blocks, int threads, const Args&... args) {
  kernel<<<static_cast<unsigned>(blocks), threads>>>(args...);
}

void name_kernels(Launcher& launcher, const Operands& operands, const CoarsePlan& plan) {
  hopper::launch_scores(launcher, operands, plan, true, nullptr);
  hopper::launch_scores(launcher, operands, plan, false, nullptr);
}
