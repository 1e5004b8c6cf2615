// The whole float32 search with the Hopper kernel as its coarse pass, as a C function for ctypes:
// host_nearest as in driver.cpp.
#define VQKERNELS_SM90A
#include "hopper_driver.cpp"

#include "../../csrc/cuda/nearest.cuh"

// A [B, T, D] tensor: sizes and strides in elements.
struct View {
  const float* data;
  int64_t size[3];
  int64_t stride[3];
};

extern "C" void host_nearest(uint64_t seed, int type, const View* x, const float* codebook,
                             int64_t codebook_size, bool cosine, bool exact, int64_t* codes,
                             float* distance) {
  if (type != 0) host::fail("float32 only");
  host::hopper_seed() = seed;
  host::Launcher launcher(seed);
  Tokens<const float> tokens{x->data,      x->size[0],   x->size[1],  x->size[2],
                             x->stride[0], x->stride[1], x->stride[2]};
  nearest(launcher, merge_batch(tokens), codebook, codebook_size, cosine, exact, codes, distance);
}
