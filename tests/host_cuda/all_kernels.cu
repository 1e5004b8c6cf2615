// Every kernel for every element type and nothing else: what tests/test_cuda_compile.py reads registers and
// spills from. No torch headers, so that an architecture costs seconds.
#include "../../csrc/cuda/codebook_stats.cuh"
#include "../../csrc/cuda/ema_update.cuh"
#include "../../csrc/cuda/gather.cuh"
#include "../../csrc/cuda/nearest.cuh"
#include "../../csrc/cuda/quantize_backward.cuh"

using namespace vqkernels::cuda;

// Names kernels, so that they are compiled; never runs.
struct Launcher {
  int64_t processors() const { return 1; }
  template <typename T>
  T* allocate(int64_t) {
    return nullptr;
  }
  void zero(void*, int64_t) {}
  void sort(const int64_t*, int64_t, const int64_t*&, const int64_t*&) {}
  template <typename... Params, typename... Args>
  void launch(void (*kernel)(Params...), int64_t blocks, int threads, Args... args) {
    kernel<<<static_cast<unsigned>(blocks), threads>>>(static_cast<Params>(args)...);
  }
};

template <typename T>
void name_kernels_of(Launcher& launcher) {
  Tokens<const T> x{};
  Kept<T> kept{};
  Search<T> codes{x, nullptr, 1, false};
  nearest<T>(launcher, x, nullptr, 1, false, true, nullptr, nullptr);
  nearest<T>(launcher, x, nullptr, 1, false, true, nullptr, nullptr, &kept);
  if constexpr (std::is_same_v<T, double>) {
    prepare_codes(launcher, codes, kept);
  } else {
    prepare_codes<true>(launcher, codes, kept);
    prepare_codes<false>(launcher, codes, kept);
  }
  gather<T>(launcher, x, nullptr, 1, nullptr, Tokens<T>{}, nullptr);
  quantize_backward<T>(launcher, x, x, nullptr, x, nullptr, true, Tokens<T>{});
  codebook_stats<T>(launcher, x, nullptr, 1, nullptr, nullptr);
}

void name_kernels(Launcher& launcher) {
  name_kernels_of<float>(launcher);
  name_kernels_of<float16>(launcher);
  name_kernels_of<bfloat16>(launcher);
  name_kernels_of<double>(launcher);
  ema_update(launcher, EmaUpdate<float>{});
  ema_update(launcher, EmaUpdate<double>{});
}
