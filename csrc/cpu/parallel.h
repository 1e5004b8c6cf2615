// Work shared out on torch's own thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cfenv>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

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

// Memory of this size is asked for in huge pages: to walk 134 MB in pages of 4 KiB costs as much as to read
// them.
constexpr size_t HUGE_PAGE = size_t{2} << 20;

inline std::align_val_t alignment_of(size_t bytes) {
  return std::align_val_t(bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64);
}

inline void* allocate(size_t bytes) {
  void* memory = ::operator new(bytes, alignment_of(bytes));
#if defined(__linux__)
  if (bytes >= 2 * HUGE_PAGE) madvise(memory, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);  // a wish
#endif
  return memory;
}

// Uninitialised memory on a cache line's boundary.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0)
      : bytes_(sizeof(T) * static_cast<size_t>(count > 0 ? count : 1)),
        data_(static_cast<T*>(allocate(bytes_))) {}
  ~Buffer() {
    if (data_ != nullptr) ::operator delete(data_, alignment_of(bytes_));
  }
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_;
  T* data_;
};

// Bytes of a core's second cache, where the system tells; else as many as most cores have.
inline int64_t second_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t bytes = 0;
#endif
  return bytes > 0 ? bytes : int64_t{1} << 20;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cpu
}  // namespace vqkernels
