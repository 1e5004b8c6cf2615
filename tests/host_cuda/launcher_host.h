// The Launcher of csrc/cuda/launcher.h for the host: blocks one after another, poisoned workspace, a seeded
// thread order.
#pragma once

#define VQKERNELS_HOST_CUDA
#include "primitives_host.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace vqkernels::host_cuda {

class Launcher {
 public:
  // seed 0 runs blocks and threads in index order, any other in a random order.
  explicit Launcher(uint64_t seed) : seed_(seed) {}

  int64_t processors() const {
    return 3;
  }  // few, so that small problems split the codebook and loop over blocks

  template <typename T>
  T* allocate(int64_t count) {
    size_t bytes = sizeof(T) * static_cast<size_t>(count);
    workspace_.emplace_back(
        new char[bytes]);  // its own heap object: a sanitizer sees every byte past the end
    std::memset(workspace_.back().get(), kPoison, bytes);
    return reinterpret_cast<T*>(workspace_.back().get());
  }

  void zero(void* data, int64_t bytes) { std::memset(data, 0, static_cast<size_t>(bytes)); }

  template <typename... Params, typename... Args>
  void launch(void (*kernel)(Params...), int64_t blocks, int threads, Args... args) {
    if (blocks < 1) fail("an empty grid");
    std::vector<int64_t> order(static_cast<size_t>(blocks));
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(seed_);
    if (seed_ != 0) std::shuffle(order.begin(), order.end(), random);
    std::function<void()> body = [&] { kernel(static_cast<Params>(args)...); };
    for (int64_t index : order)
      Block(index, blocks, threads, seed_ == 0 ? 0 : random() | 1, fibers_).run(body);
  }

  template <typename Memory, typename... Params, typename... Args>
  void launch_large(void (*kernel)(Params...), int64_t blocks, int threads, Args... args) {
    launch(kernel, blocks, threads, args...);
  }

  // Stable: equal keys stay in order. order[i] is where sorted[i] came from.
  void sort(const int64_t* keys, int64_t count, const int64_t*& sorted, const int64_t*& order) {
    int64_t *out = allocate<int64_t>(count), *from = allocate<int64_t>(count);
    std::iota(from, from + count, 0);
    std::stable_sort(from, from + count, [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
    for (int64_t i = 0; i < count; ++i) out[i] = keys[from[i]];
    sorted = out;
    order = from;
  }

 private:
  uint64_t seed_;
  std::vector<std::unique_ptr<char[]>> workspace_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
};

}  // namespace vqkernels::host_cuda
