// The Hopper kernel on the host, as C functions for ctypes, and kernels that are wrong on purpose.
#include "primitives_hopper_host.h"

#include "../../csrc/cuda/nearest_hopper.cuh"

using namespace vqkernels::cuda;
namespace host = vqkernels::host_cuda;

extern "C" {

// How the codes are shared out: splits, and tiles in each.
void hopper_plan(int64_t tokens, int64_t code_rows, bool split, int64_t processors,
                 int64_t* out) {  // [2]
  CoarsePlan plan = plan_coarse(hopper::kTile, tokens, code_rows, split, processors);
  out[0] = plan.splits;
  out[1] = plan.granules_per_split / hopper::kTileGranules;
}

void hopper_scores(uint64_t seed, const void* tokens, const void* codes, const float* bias,
                   const float* scale, int64_t token_count, int64_t code_rows, int64_t depth, bool split,
                   void* states) {
  host::hopper_seed() = seed;
  host::Launcher launcher(seed);
  Operands operands{static_cast<const float16*>(tokens),
                    static_cast<const float16*>(codes),
                    bias,
                    scale,
                    token_count,
                    code_rows,
                    depth};
  CoarsePlan plan = plan_coarse(hopper::kTile, token_count, code_rows, split, launcher.processors());
  hopper::launch_scores(launcher, operands, plan, split, static_cast<Best<float>*>(states));
}

}  // extern "C"
