// Work shared out on torch's own thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cfenv>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace vqkernels {
namespace cpu {

// Round to nearest with subnormals kept, whatever the caller has set (torch.set_flush_denormal): exact means
// exact.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&saved_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  std::fenv_t saved_;
};

// Below this many operations per thread, waking the thread costs more than it brings.
constexpr double OPERATIONS_PER_THREAD = 1 << 20;

// As many threads as torch has, or fewer where `operations` (additions, multiplications, loads) are few.
inline int64_t useful_threads(double operations) {
  const double most = torch::stable::get_num_threads();
  const double useful = operations / OPERATIONS_PER_THREAD;
  return useful <= 1.0 ? 1 : static_cast<int64_t>(useful < most ? useful : most);
}

// Calls work(item, scratch) for every item in [0, items); every thread makes one Scratch. Threads take the
// next item when they are free, so which thread does what must not matter.
template <class Scratch, class MakeScratch, class Work>
void for_each_item(int64_t items, double operations, const MakeScratch& make_scratch, const Work& work) {
  if (items <= 0) return;
  const int64_t threads = useful_threads(operations);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, items < threads ? items : threads, 1, [&](int64_t, int64_t) {
    const DefaultArithmetic guard;
    int64_t item = next.fetch_add(1);
    if (item >= items) return;
    Scratch scratch = make_scratch();
    for (; item < items; item = next.fetch_add(1)) work(item, scratch);
  });
}

// The same without scratch memory, over ranges of at most `grain`: work(begin, end).
template <class Work>
void for_each_range(int64_t count, int64_t grain, double operations, const Work& work) {
  struct Nothing {};
  for_each_item<Nothing>((count + grain - 1) / grain, operations, [] { return Nothing{}; },
                         [&](int64_t item, Nothing&) {
                           const int64_t begin = item * grain;
                           work(begin, count - begin < grain ? count : begin + grain);
                         });
}

// Uninitialised memory on a cache line's boundary.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0)
      : data_(static_cast<T*>(::operator new(sizeof(T) * (count > 0 ? count : 1), std::align_val_t(64)))) {}
  ~Buffer() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t(64));
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    T* mine = data_;
    data_ = other.data_;
    other.data_ = mine;
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cpu
}  // namespace vqkernels
