// The launch sequences of csrc/cuda on the host, as C functions for ctypes. Types: 0 float32, 1 float16, 2
// bfloat16, 3 float64.
#include "launcher_host.h"

#include "../../csrc/cuda/codebook_stats.cuh"
#include "../../csrc/cuda/ema_update.cuh"
#include "../../csrc/cuda/gather.cuh"
#include "../../csrc/cuda/nearest.cuh"
#include "../../csrc/cuda/quantize_backward.cuh"

namespace {

using namespace vqkernels::cuda;
using vqkernels::host_cuda::Launcher;

// A [B, T, D] tensor: sizes and strides in elements.
struct View {
  void* data;
  int64_t size[3];
  int64_t stride[3];

  template <typename T>
  Tokens<T> as() const {
    return merge_batch(
        Tokens<T>{static_cast<T*>(data), size[0], size[1], size[2], stride[0], stride[1], stride[2]});
  }
};

template <typename Run>
void dispatch(int type, Run run) {
  if (type == 0) run(float{});
  if (type == 1) run(float16{});
  if (type == 2) run(bfloat16{});
  if (type == 3) run(double{});
}

// Wrong on purpose: neighbours read what a barrier should have made visible.
template <typename T>
VQ_KERNEL(64, 1)
rotate_without_barrier_kernel(T* out) {  // [64]
  struct Memory {
    T entry[64];
  };
  Memory& memory = shared_memory<Memory>();
  int i = thread_index();
  memory.entry[i] = static_cast<T>(i);
  out[i] = memory.entry[(i + 1) % 64];
}

}  // namespace

extern "C" {

void host_rotate_without_barrier(uint64_t seed, int64_t* out) {
  Launcher launcher(seed);
  launcher.launch(rotate_without_barrier_kernel<int64_t>, 1, 64, out);
}

void host_nearest(uint64_t seed, int type, const View* x, const void* codebook, int64_t codebook_size,
                  bool cosine, bool exact, int64_t* codes, float* distance) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    Launcher launcher(seed);
    nearest(launcher, x->as<const T>(), static_cast<const T*>(codebook), codebook_size, cosine, exact, codes,
            distance);
  });
}

void host_gather(uint64_t seed, int type, const View* x, const void* codebook, int64_t codebook_size,
                 const int64_t* codes, const View* quantized, void* error) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    Launcher launcher(seed);
    gather(launcher, x->as<const T>(), static_cast<const T*>(codebook), codebook_size, codes,
           quantized->as<T>(), static_cast<Scalar<T>*>(error));
  });
}

void host_quantize_backward(uint64_t seed, int type, const View* x, const View* quantized,
                            const int64_t* codes, const View* dquantized, const void* derror, bool rotation,
                            const View* dx) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    Launcher launcher(seed);
    quantize_backward(launcher, x->as<const T>(), quantized->as<const T>(), codes, dquantized->as<const T>(),
                      static_cast<const Scalar<T>*>(derror), rotation, dx->as<T>());
  });
}

void host_codebook_stats(uint64_t seed, int type, const View* x, const int64_t* codes, int64_t codebook_size,
                         void* counts, void* sums) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    Launcher launcher(seed);
    codebook_stats<T>(launcher, x->as<const T>(), codes, codebook_size, static_cast<Scalar<T>*>(counts),
                      static_cast<Scalar<T>*>(sums));
  });
}

void host_ema_update(uint64_t seed, int type, void* codebook, void* cluster_size, void* embed_sum,
                     const void* counts, const void* sums, const bool* revive, int64_t codebook_size,
                     int64_t dim, double decay, double eps, double revived_size, bool normalize) {
  auto run = [&](auto zero) {
    using S = decltype(zero);
    Launcher launcher(seed);
    ema_update(launcher, EmaUpdate<S>{static_cast<S*>(codebook), static_cast<S*>(cluster_size),
                                      static_cast<S*>(embed_sum), static_cast<const S*>(counts),
                                      static_cast<const S*>(sums), revive, codebook_size, dim, decay, eps,
                                      revived_size, normalize});
  };
  type == 3 ? run(double{}) : run(float{});
}

}  // extern "C"
