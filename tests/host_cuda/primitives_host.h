// csrc/cuda/primitives.cuh for a plain host compiler: a block's threads are cooperative fibers.
//
// A barrier and a shuffle really wait for the others; between them the fibers run one after another, in index
// order or in a seeded random order, so that a missing barrier gives wrong numbers. Shared memory is one heap
// object per block, filled with 0xff (NaN). A barrier or shuffle that some thread does not reach ends the
// program with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define VQ_KERNEL(threads, blocks) void
#define VQ_DEVICE inline
#define VQ_HOST_DEVICE inline

namespace vqkernels::host_cuda {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kPoison = 0xff;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "host_cuda: %s\n", message);
  std::abort();
}

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  int waiting_at = 0;  // source line of the barrier or shuffle it waits in, 0 while it can run
  int shuffles = 0;
  bool done = false;
};

struct Warp {
  uint64_t slots[2]
                [kWarp];  // two sets: a lane may write its next value while another still reads the last one
  int arrived = 0;
};

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(int64_t index, int64_t blocks, int threads, uint64_t seed,
        std::vector<std::unique_ptr<Fiber>>& fibers)
      : index(index),
        blocks(blocks),
        threads(threads),
        random_(seed),
        shuffled_(seed != 0),
        fibers_(fibers),
        warps_(threads / kWarp) {
    if (threads % kWarp != 0) fail("a block must be whole warps");
    while (static_cast<int>(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
  }

  void run(const std::function<void()>& body) {
    current() = this;
    body_ = &body;
    for (int i = 0; i < threads; ++i) prepare(*fibers_[i]), ready_.push_back(i);
    while (!ready_.empty()) resume(take());
    for (int i = 0; i < threads; ++i) {
      if (!fibers_[i]->done) fail("a barrier or shuffle was not reached by every thread");
    }
    current() = nullptr;
  }

  void wait_for_block(int line) {
    if (++arrived_ == threads) {
      release(0, threads, line);
      arrived_ = 0;
    } else {
      suspend(line);
    }
  }

  uint64_t exchange(uint64_t value, int source_lane, int line) {
    Fiber& self = *fibers_[running];
    Warp& warp = warps_[running / kWarp];
    uint64_t* slots = warp.slots[self.shuffles++ & 1];
    slots[running % kWarp] = value;
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      release(running / kWarp * kWarp, kWarp, line);
    } else {
      suspend(line);
    }
    return slots[source_lane];
  }

  template <typename T>
  T& shared() {
    static char key;
    auto& memory = shared_[&key];
    if (!memory) {
      memory.reset(std::malloc(sizeof(T)));
      std::memset(memory.get(), kPoison, sizeof(T));
    }
    return *static_cast<T*>(memory.get());
  }

  const int64_t index, blocks;
  const int threads;
  int running = 0;

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };

  int take() {
    size_t at = shuffled_ ? random_() % ready_.size() : 0;
    int chosen = ready_[at];
    ready_.erase(ready_.begin() + static_cast<long>(at));
    return chosen;
  }

  void release(int first, int count, int line) {
    for (int i = first; i < first + count; ++i) {
      if (i == running) continue;
      if (fibers_[i]->waiting_at != line) fail("threads wait at different barriers or shuffles");
      fibers_[i]->waiting_at = 0;
      ready_.push_back(i);
    }
  }

  void prepare(Fiber& fiber) {
    fiber.done = false;
    fiber.shuffles = 0;
    fiber.waiting_at = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  static void enter() {
    Block& block = *current();
    block.after_switch(nullptr);
    (*block.body_)();
    Fiber& self = *block.fibers_[block.running];
    self.done = true;
    block.switch_to(self.context, block.scheduler_, nullptr, block.scheduler_stack_,
                    block.scheduler_stack_bytes_);
  }

  void resume(int i) {
    running = i;
    void* fake = nullptr;
    switch_to(scheduler_, fibers_[i]->context, &fake, fibers_[i]->stack.get(), kStackBytes);
    finish(fake, nullptr, nullptr);
  }

  void suspend(int line) {
    Fiber& self = *fibers_[running];
    int me = running;
    self.waiting_at = line;
    void* fake = nullptr;
    switch_to(self.context, scheduler_, &fake, scheduler_stack_, scheduler_stack_bytes_);
    after_switch(fake);
    running = me;
  }

  void after_switch(void* fake) { finish(fake, &scheduler_stack_, &scheduler_stack_bytes_); }

#ifdef __SANITIZE_ADDRESS__
  static void switch_to(ucontext_t& from, ucontext_t& to, void** fake, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake, stack, bytes);
    swapcontext(&from, &to);
  }
  static void finish(void* fake, const void** stack, size_t* bytes) {
    __sanitizer_finish_switch_fiber(fake, stack, bytes);
  }
#else
  static void switch_to(ucontext_t& from, ucontext_t& to, void**, const void*, size_t) {
    swapcontext(&from, &to);
  }
  static void finish(void*, const void**, size_t*) {}
#endif

  std::mt19937_64 random_;
  bool shuffled_;
  std::vector<std::unique_ptr<Fiber>>& fibers_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;
  std::map<const void*, std::unique_ptr<void, Free>> shared_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  int arrived_ = 0;
};

}  // namespace vqkernels::host_cuda

namespace vqkernels::cuda {

using float16 = _Float16;
struct bfloat16 {
  uint16_t bits;
  explicit operator float() const {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float out;
    std::memcpy(&out, &wide, sizeof(out));
    return out;
  }
};

inline int thread_index() { return host_cuda::Block::current()->running; }
inline int block_threads() { return host_cuda::Block::current()->threads; }
inline int64_t block_index() { return host_cuda::Block::current()->index; }
inline int64_t grid_blocks() { return host_cuda::Block::current()->blocks; }

inline void barrier(int line = __builtin_LINE()) { host_cuda::Block::current()->wait_for_block(line); }

template <typename T>
T& shared_memory() {
  static_assert(sizeof(T) <= 48 * 1024, "static shared memory ends at 48 KiB");
  return host_cuda::Block::current()->shared<T>();
}

template <typename T>
T shuffle_xor(T value, int mask, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = host_cuda::Block::current()->exchange(bits, (thread_index() % host_cuda::kWarp) ^ mask, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline double inverse_sqrt(double value) { return 1 / std::sqrt(value); }
inline float inverse_sqrt(float value) { return 1 / std::sqrt(value); }

inline int64_t atomic_increment(int64_t* counter) { return (*counter)++; }

inline void atomic_max(double* target, double value) {
  uint64_t old_bits, new_bits;
  std::memcpy(&old_bits, target, sizeof(old_bits));
  std::memcpy(&new_bits, &value, sizeof(new_bits));
  if (new_bits > old_bits) *target = value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(float16 value) { return static_cast<float>(value); }
inline float widen(bfloat16 value) { return static_cast<float>(value); }

inline void narrow(float& out, float value) { out = value; }
inline void narrow(double& out, double value) { out = value; }
inline void narrow(float16& out, float value) { out = static_cast<float16>(value); }
inline void narrow(bfloat16& out, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits =
      nan ? 0x7fff
          : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

}  // namespace vqkernels::cuda
