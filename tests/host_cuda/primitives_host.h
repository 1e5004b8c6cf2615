// csrc/cuda/primitives.cuh for a plain host compiler: a block's threads are cooperative fibers.
//
// A barrier and a shuffle really wait for the others; between them the fibers run one after another, in index
// order or in a seeded random order, so that a missing barrier gives wrong numbers. Shared memory is one heap
// object per block, filled with 0xff (NaN). A barrier or shuffle that some thread does not reach ends the
// program with a message.
#pragma once

#ifndef __x86_64__
#include <ucontext.h>
#endif

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
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define VQ_KERNEL(threads, blocks) void
#define VQ_DEVICE inline
#define VQ_CALLED inline
#define VQ_HOST_DEVICE inline

namespace vqkernels::host_cuda {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kPoison = 0xff;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "host_cuda: %s\n", message);
  std::abort();
}

// Where a fiber goes on. swapcontext serves every machine, but asks the kernel for the signal mask each time,
// which took half of a search's time.
#ifdef __x86_64__
asm(R"(
  .text
  .p2align 4
  .type vq_host_switch, @function
vq_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size vq_host_switch, .-vq_host_switch
)");
extern "C" void vq_host_switch(void** from, void* to);

struct Context {
  void* top = nullptr;  // of its stack, under which the registers lie that a call keeps

  void start(char* stack, size_t bytes, void (*enter)()) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, bytes);  // the last fiber's first frame never returned
#endif
    auto end = reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16;
    uint64_t frame[8] = {};  // six registers, where to go on, and no caller
    frame[6] = reinterpret_cast<uintptr_t>(enter);
    top = reinterpret_cast<void*>(end - sizeof(frame));
    std::memcpy(top, frame, sizeof(frame));
  }
  static void change(Context& from, Context& to) { vq_host_switch(&from.top, to.top); }
};
#else
struct Context {
  ucontext_t state;

  void start(char* stack, size_t bytes, void (*enter)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = bytes;
    state.uc_link = nullptr;
    makecontext(&state, enter, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
};
#endif

struct PendingCopy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  int waiting_at = 0;  // source line of the barrier or shuffle it waits in, 0 while it can run
  int exchanges = 0;
  bool done = false;
  std::vector<std::vector<PendingCopy>> copies{1};  // groups in order, the last one not committed yet
};

// What a lane shows the others: a shuffled value, a pointer, the fragments of a product.
struct Message {
  uint64_t words[4];
};

struct Warp {
  Message sets[2][kWarp];  // two: a lane may write its next message while another still reads the last ones
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

  // Every lane's message; valid until the caller's next exchange but one.
  const Message* exchange(const Message& mine, int line) {
    Fiber& self = *fibers_[running];
    Warp& warp = warps_[running / kWarp];
    Message* messages = warp.sets[self.exchanges++ & 1];
    messages[running % kWarp] = mine;
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      release(running / kWarp * kWarp, kWarp, line);
    } else {
      suspend(line);
    }
    return messages;
  }

  std::vector<std::vector<PendingCopy>>& copies() { return fibers_[running]->copies; }

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
    fiber.exchanges = 0;
    fiber.copies.assign(1, {});
    fiber.waiting_at = 0;
    fiber.context.start(fiber.stack.get(), kStackBytes, &Block::enter);
  }

  static void enter() {
    Block& block = *current();
    block.after_switch(nullptr);
    (*block.body_)();
    Fiber& self = *block.fibers_[block.running];
    for (const auto& group : self.copies) {
      if (!group.empty()) fail("a thread ended before its copies arrived");
    }
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
  static void switch_to(Context& from, Context& to, void** fake, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake, stack, bytes);
    Context::change(from, to);
  }
  static void finish(void* fake, const void** stack, size_t* bytes) {
    __sanitizer_finish_switch_fiber(fake, stack, bytes);
  }
#else
  static void switch_to(Context& from, Context& to, void**, const void*, size_t) {
    Context::change(from, to);
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
  Context scheduler_;
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
T& large_shared_memory() {
  return host_cuda::Block::current()->shared<T>();
}

template <typename T>
T shuffle_xor(T value, int mask, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(host_cuda::Message));
  host_cuda::Message message{};
  std::memcpy(&message, &value, sizeof(T));
  const host_cuda::Message* all = host_cuda::Block::current()->exchange(message, line);
  std::memcpy(&value, &all[(thread_index() % host_cuda::kWarp) ^ mask], sizeof(T));
  return value;
}

inline uint32_t ballot(bool vote, int line = __builtin_LINE()) {
  const host_cuda::Message* all = host_cuda::Block::current()->exchange({{vote}}, line);
  uint32_t votes = 0;
  for (int lane = 0; lane < host_cuda::kWarp; ++lane)
    votes |= static_cast<uint32_t>(all[lane].words[0]) << lane;
  return votes;
}

inline int lowest_bit(uint32_t votes) { return __builtin_ctz(votes); }

inline double inverse_sqrt(double value) { return 1 / std::sqrt(value); }
inline float inverse_sqrt(float value) { return 1 / std::sqrt(value); }

inline int64_t atomic_increment(int64_t* counter) { return (*counter)++; }

inline void atomic_max(double* target, double value) {
  uint64_t old_bits, new_bits;
  std::memcpy(&old_bits, target, sizeof(old_bits));
  std::memcpy(&new_bits, &value, sizeof(new_bits));
  if (new_bits > old_bits) *target = value;
}

inline void atomic_max(float* target, float value) {
  uint32_t old_bits, new_bits;
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

struct alignas(16) Chunk {
  uint32_t words[4];
};

// A copy arrives when its thread waits for it; until then its target is poison.
constexpr int kCopyStages = 3;
inline void copy_async(Chunk* shared, const Chunk* global, bool valid) {
  std::memset(shared, host_cuda::kPoison, sizeof(Chunk));
  host_cuda::Block::current()->copies().back().push_back({shared, valid ? global : nullptr});
}
inline void commit_copies() { host_cuda::Block::current()->copies().emplace_back(); }
template <int PENDING>
void wait_copies() {
  auto& groups = host_cuda::Block::current()->copies();
  while (static_cast<int>(groups.size()) - 1 > PENDING) {
    for (const host_cuda::PendingCopy& copy : groups.front()) {
      if (copy.from != nullptr)
        std::memcpy(copy.to, copy.from, sizeof(Chunk));
      else
        std::memset(copy.to, 0, sizeof(Chunk));
    }
    groups.erase(groups.begin());
  }
}

inline void load_matrices(uint32_t (&out)[4], const Chunk* row, int line = __builtin_LINE()) {
  const host_cuda::Message* all =
      host_cuda::Block::current()->exchange({{reinterpret_cast<uint64_t>(row)}}, line);
  int lane = thread_index() % host_cuda::kWarp;
  for (int matrix = 0; matrix < 4; ++matrix) {
    out[matrix] = reinterpret_cast<const Chunk*>(all[8 * matrix + lane / 4].words[0])->words[lane % 4];
  }
}

inline float half_of(uint32_t pair, int which) {
  uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  float16 value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

// What the certificate allows a tensor core to do: terms lose all bits below 2^-23 of the largest, and their
// sum is cut.
inline float truncated_sum(float start, const float (&products)[16]) {
  double largest = std::fabs(start), sum = 0;
  for (float product : products) largest = std::fmax(largest, std::fabs(product));
  if (!(largest > 0 && largest < INFINITY)) {
    for (float product : products) start += product;
    return start;
  }
  double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
  for (float product : products) sum += std::trunc(product / unit);
  sum = (sum + std::trunc(start / unit)) * unit;
  float cut = static_cast<float>(sum);
  return std::fabs(cut) > std::fabs(sum) ? std::nextafter(cut, 0.0f) : cut;
}

inline void multiply_16x8x16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             int line = __builtin_LINE()) {
  host_cuda::Message mine;
  std::memcpy(mine.words, a, sizeof(a));
  mine.words[2] = b0 | static_cast<uint64_t>(b1) << 32;
  const host_cuda::Message* all = host_cuda::Block::current()->exchange(mine, line);
  auto word = [&](int lane, int i) {
    return static_cast<uint32_t>(all[lane].words[i / 2] >> (32 * (i % 2)));
  };
  int g = thread_index() % host_cuda::kWarp / 4, q = thread_index() % 4;
  for (int i = 0; i < 4; ++i) {
    int row = g + 8 * (i / 2), column = 2 * q + i % 2;
    float products[16];
    for (int k = 0; k < 16; ++k) {
      int a_register = row / 8 + 2 * (k / 8), b_register = 4 + k / 8, owner = k % 8 / 2;
      products[k] = half_of(word(row % 8 * 4 + owner, a_register), k % 2) *
                    half_of(word(column * 4 + owner, b_register), k % 2);
    }
    sum[i] = truncated_sum(sum[i], products);
  }
}

}  // namespace vqkernels::cuda
