// csrc/cuda/primitives_sm90.cuh for a plain host compiler.
//
// Copies and products are as asynchronous as on the device. A copy poisons its target when it is asked for
// and arrives later: with seed 0 when no thread can go on without it, otherwise at a random time and in any
// order. A warpgroup's results are poison from the first product until the wait that covers them; the
// products are computed from the bytes that their descriptors name, as late as allowed or at a random time. A
// wrong descriptor, a missing wait or a wrong parity so gives NaN or wrong numbers, and a wait that nothing
// ends stops the program with a list of who waits for what.
#pragma once

#include "launcher_host.h"

#include <algorithm>
#include <deque>
#include <set>
#include <string>

#define VQ_GRID_CONSTANT
#define VQ_SM90A

namespace vqkernels::host_cuda {

// A matrix of fp16 and the boxes that copies take from it.
struct TensorMap {
  const char* data;
  int64_t rows, columns;
  int box_rows, box_columns;
};

constexpr int kGroupThreads = 128;      // a warpgroup
constexpr int kResults = 128;           // of a thread
constexpr uint32_t kSharedBase = 1040;  // 16-byte aligned and no more, as a kernel must expect
constexpr uint32_t kSharedBytes = 227 * 1024;

[[noreturn]] inline void fail(const std::string& message) { fail(message.c_str()); }

// Where 16-byte chunks of rows of `width` bytes really lie: "Shared memory matrix layout, swizzling modes".
inline uint32_t swizzled(uint32_t address, int width) {
  return address ^ ((address >> 7 & static_cast<uint32_t>(width / 16 - 1)) << 4);
}

class HopperBlock {
 public:
  static HopperBlock*& current() {
    static HopperBlock* block = nullptr;
    return block;
  }

  HopperBlock(int64_t index, int64_t blocks, int threads, uint64_t seed,
              std::vector<std::unique_ptr<Fiber>>& fibers)
      : identity_(index, blocks, threads, seed, fibers),
        fibers_(fibers),
        random_(seed),
        late_(seed == 0),
        memory_(new char[kSharedBytes]),
        threads_(static_cast<size_t>(threads)),
        groups_(static_cast<size_t>(threads / kGroupThreads)) {
    if (threads % kGroupThreads != 0) fail("a block must be whole warpgroups");
    std::memset(memory_.get(), kPoison, kSharedBytes);
  }

  void run(const std::function<void()>& body) {
    current() = this;
    Block::current() = &identity_;
    body_ = &body;
    for (size_t i = 0; i < threads_.size(); ++i) prepare(*fibers_[i]), ready_.push_back(static_cast<int>(i));
    while (finished_ < threads_.size()) step();
    if (!copies_.empty()) fail("a block ended before its copies arrived");
    check_registers();
    Block::current() = nullptr;
    current() = nullptr;
  }

  // -------------------------------------------------------------------------------------------- barriers

  void init_barrier(uint32_t address, int arrivals) {
    if (address % 8 != 0) fail("an mbarrier is 8-byte aligned");
    at(address, 8);
    barriers_[address] = {arrivals, arrivals, 0, 0, false};
  }
  void fence_barriers() {
    for (auto& [address, barrier] : barriers_) barrier.fenced = true;
  }
  void arrive(uint32_t address, int bytes) {
    Barrier& barrier = barrier_at(address);
    if (--barrier.pending < 0) fail("more arrivals than an mbarrier's phase expects");
    barrier.bytes += bytes;
    end_phase(barrier);
  }
  void wait(uint32_t address, uint32_t parity) {
    Barrier& barrier = barrier_at(address);
    wait_until([&barrier, parity] { return (barrier.phase & 1) != parity; },
               "mbarrier " + std::to_string(address) + " parity " + std::to_string(parity));
  }
  void named(int id, int threads, bool waits) {
    Named& barrier = named_[id];
    if (id < 0 || id > 15 || threads % kWarp != 0) fail("no such named barrier");
    if (barrier.arrived != 0 && barrier.threads != threads) fail("a named barrier with two thread counts");
    barrier.threads = threads;
    int round = barrier.round;
    if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.round, wake();
    if (waits) wait_until([&barrier, round] { return barrier.round != round; }, "named barrier");
  }

  // ---------------------------------------------------------------------------------------------- copies

  void copy_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t address) {
    int width = map.box_columns * 2;
    if (!barrier_at(address).fenced) fail("a copy completes on an mbarrier that no fence published");
    if (to % static_cast<uint32_t>(8 * width) != 0) fail("a copy's target is not aligned to its swizzle");
    int bytes = width * map.box_rows;
    std::memset(at(to, bytes), kPoison, static_cast<size_t>(bytes));
    copies_.push_back({to, map, column, row, address});
  }

  // -------------------------------------------------------------------------------------------- products

  void fence_products() { thread().fenced = true; }

  void multiply(float* results, int half, uint64_t tokens, uint64_t codes, bool add) {
    Thread& self = thread();
    Group& group = own_group();
    if (!self.fenced) fail("wgmma without a fence after its registers were used");
    if (self.results == nullptr) {
      self.results = results;
      std::memcpy(self.sums, results, sizeof(self.sums));
      std::memset(results, kPoison, sizeof(self.sums));
    }
    if (self.results != results) fail("two sets of results under way at once");
    size_t mine = self.products++;
    if (mine == group.products.size()) group.products.push_back({half, tokens, codes, add, 0});
    Product& product = group.products[mine];
    if (product.half != half || product.tokens != tokens || product.codes != codes || product.add != add) {
      fail("a warpgroup's threads disagree about a product");
    }
    ++product.threads;
  }

  void commit() {
    Thread& self = thread();
    Group& group = own_group();
    size_t mine = self.commits++;
    if (mine == group.ends.size()) group.ends.push_back(self.products);
    if (group.ends[mine] != self.products) fail("a warpgroup's threads disagree about a group of products");
  }

  void wait_products(int pending) {
    Thread& self = thread();
    Group& group = own_group();
    size_t wanted = self.commits - std::min(self.commits, static_cast<size_t>(pending));
    wait_until([&group, wanted] { return group.done >= wanted; }, "products");
    if (group.done < self.commits || self.results == nullptr) return;
    std::memcpy(self.results, self.sums, sizeof(self.sums));
    self.results = nullptr;
    self.fenced = false;
  }

  void set_registers(int count, bool grows) {
    if (count % 8 != 0 || count < 24 || count > 256) fail("setmaxnreg: no such count");
    int entry = 65536 / static_cast<int>(threads_.size()) / 8 * 8;
    if (thread().registers != 0 || (grows ? count < entry : count > entry))
      fail("setmaxnreg: wrong direction");
    thread().registers = count;
  }

 private:
  struct Barrier {
    int arrivals, pending;
    int64_t bytes;
    uint32_t phase;
    bool fenced;
  };
  struct Named {
    int threads = 0, arrived = 0, round = 0;
  };
  struct Copy {
    uint32_t to;
    TensorMap map;
    int column, row;
    uint32_t barrier;
  };
  struct Product {
    int half;
    uint64_t tokens, codes;
    bool add;
    int threads;
  };
  struct Group {
    std::vector<Product> products;
    std::vector<size_t> ends;  // of each committed group, in products
    size_t done = 0;           // groups
    size_t computed = 0;       // products
  };
  struct Thread {
    std::function<bool()> until;
    std::string waits_for;
    float* results = nullptr;
    float sums[kResults];
    size_t products = 0, commits = 0;
    int registers = 0;
    bool fenced = false, done = false;
  };

  Thread& thread() { return threads_[static_cast<size_t>(identity_.running)]; }
  Group& own_group() { return groups_[static_cast<size_t>(identity_.running / kGroupThreads)]; }

  char* at(uint32_t address, int bytes) {
    if (address < kSharedBase || address + static_cast<uint32_t>(bytes) > kSharedBase + kSharedBytes) {
      fail("outside of shared memory");
    }
    return memory_.get() + (address - kSharedBase);
  }

  Barrier& barrier_at(uint32_t address) {
    auto found = barriers_.find(address);
    if (found == barriers_.end()) fail("an mbarrier that nobody initialised");
    return found->second;
  }
  void end_phase(Barrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    wake();
  }

  void finish_copy(size_t which) {
    Copy copy = copies_[which];
    copies_.erase(copies_.begin() + static_cast<long>(which));
    const TensorMap& map = copy.map;
    int width = map.box_columns * 2;
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < map.box_columns; ++c) {
        int64_t row = copy.row + r, column = copy.column + c;
        bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
        uint32_t to = swizzled(copy.to + static_cast<uint32_t>(r * width + c * 2), width);
        if (inside) {
          std::memcpy(at(to, 2), map.data + (row * map.columns + column) * 2, 2);
        } else {
          std::memset(at(to, 2), 0, 2);
        }
      }
    }
    Barrier& barrier = barrier_at(copy.barrier);
    barrier.bytes -= width * map.box_rows;
    end_phase(barrier);
  }

  // [rows, 16] that a descriptor names: "Matrix descriptor".
  std::vector<float> operand(uint64_t descriptor, int rows) {
    uint64_t mode = descriptor >> 62;
    int width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
    if (width == 0 || (descriptor >> 49 & 7) != 0) fail("a descriptor without a swizzle, or with an offset");
    uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) * 16;
    uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) * 16;
    std::vector<float> out(static_cast<size_t>(rows) * 16);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < 16; ++c) {
        uint32_t from =
            start + static_cast<uint32_t>(r / 8) * stride + static_cast<uint32_t>(r % 8 * width + 2 * c);
        _Float16 value;
        std::memcpy(&value, at(swizzled(from, width), 2), 2);
        out[static_cast<size_t>(r) * 16 + static_cast<size_t>(c)] = static_cast<float>(value);
      }
    }
    return out;
  }

  void compute(size_t which, const Product& product) {
    std::vector<float> x = operand(product.tokens, 64), c = operand(product.codes, 128);
    for (int t = 0; t < kGroupThreads; ++t) {
      float* sums = threads_[which * kGroupThreads + static_cast<size_t>(t)].sums + 64 * product.half;
      for (int e = 0; e < 64; ++e) {
        size_t row = static_cast<size_t>(16 * (t / 32) + t % 32 / 4 + 8 * (e / 2 % 2));
        size_t column = static_cast<size_t>(8 * (e / 4) + 2 * (t % 4) + e % 2);
        float sum = product.add ? sums[e] : 0.0f;
        for (size_t d = 0; d < 16; ++d) sum += x[16 * row + d] * c[16 * column + d];
        sums[e] = sum;
      }
    }
  }

  // The next committed group of a warpgroup, once all its threads have issued it.
  bool can_finish_products(const Group& group) const {
    if (group.done == group.ends.size()) return false;
    size_t end = group.ends[group.done];
    for (size_t i = group.computed; i < end; ++i) {
      if (group.products[i].threads != kGroupThreads) return false;
    }
    return true;
  }
  void finish_products(size_t which) {
    Group& group = groups_[which];
    for (; group.computed < group.ends[group.done]; ++group.computed) {
      compute(which, group.products[group.computed]);
    }
    ++group.done;
    wake();
  }

  // -------------------------------------------------------------------------------------------- schedule

  void step() {
    bool behind = ready_.empty() || (!late_ && random_() % 64 == 0);
    if (behind && finish_something()) return;
    if (ready_.empty()) stuck();
    size_t next = late_ ? 0 : random_() % ready_.size();
    int chosen = ready_[next];
    ready_.erase(ready_.begin() + static_cast<long>(next));
    resume(chosen);
  }

  bool finish_something() {
    std::vector<size_t> products;
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (can_finish_products(groups_[i])) products.push_back(i);
    }
    size_t choices = products.size() + copies_.size();
    if (choices == 0) return false;
    // late: copies before products, so that a buffer filled too early is seen
    size_t choice = late_ ? (copies_.empty() ? 0 : products.size()) : random_() % choices;
    if (choice < products.size()) {
      finish_products(products[choice]);
    } else {
      finish_copy(choice - products.size());
    }
    return true;
  }

  void wake() {
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      if (!thread.until || !thread.until()) continue;
      thread.until = nullptr;
      ready_.push_back(static_cast<int>(i));
    }
  }

  void wait_until(std::function<bool()> until, const std::string& what) {
    if (until()) return;
    thread().until = std::move(until);
    thread().waits_for = what;
    suspend();
  }

  [[noreturn]] void stuck() {
    std::map<std::string, int> waiting;
    for (const Thread& thread : threads_) {
      if (thread.until) ++waiting[thread.waits_for];
    }
    std::string message = "every thread waits:";
    for (const auto& [what, count] : waiting) message += " " + std::to_string(count) + " for " + what + ";";
    fail(message);
  }

  void check_registers() {
    int sum = 0;
    for (const Thread& thread : threads_) sum += thread.registers;
    if (sum > 65536) fail("setmaxnreg: more registers than a multiprocessor has");
  }

  void prepare(Fiber& fiber) { fiber.context.start(fiber.stack.get(), kStackBytes, &HopperBlock::enter); }
  static void enter() {
    HopperBlock& block = *current();
    block.entered(nullptr);
    (*block.body_)();
    if (block.thread().results != nullptr) fail("a thread ended before its products");
    block.thread().done = true;
    ++block.finished_;
    block.leave(nullptr);
  }
  void resume(int i) {
    identity_.running = i;
    Fiber& fiber = *fibers_[static_cast<size_t>(i)];
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
    Context::change(scheduler_, fiber.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    Context::change(scheduler_, fiber.context);
#endif
  }
  void suspend() {
    int me = identity_.running;
    void* fake = nullptr;
    leave(&fake);
    entered(fake);
    identity_.running = me;
  }
  void leave([[maybe_unused]] void** fake) {
    Fiber& self = *fibers_[static_cast<size_t>(identity_.running)];
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(fake, scheduler_stack_, scheduler_stack_bytes_);
#endif
    Context::change(self.context, scheduler_);
  }
  void entered([[maybe_unused]] void* fake) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  Block identity_;  // what thread_index() and its like read
  std::vector<std::unique_ptr<Fiber>>& fibers_;
  std::mt19937_64 random_;
  bool late_;
  std::unique_ptr<char[]> memory_;
  std::vector<Thread> threads_;
  std::vector<Group> groups_;
  std::vector<Copy> copies_;
  std::map<uint32_t, Barrier> barriers_;
  std::map<int, Named> named_;
  std::vector<int> ready_;
  size_t finished_ = 0;
  const std::function<void()>* body_ = nullptr;
  Context scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// A primitive that the tests break on purpose, by the name of what is then missing or wrong.
inline std::string& hopper_fault() {
  static std::string name;
  return name;
}
inline bool faulty(const char* name) { return hopper_fault() == name; }

// The seed of the next launches: 0 runs threads in index order and everything asynchronous as late as it may.
inline uint64_t& hopper_seed() {
  static uint64_t seed = 0;
  return seed;
}

inline bool hopper_wanted(Launcher&, bool supported) { return supported; }

inline TensorMap make_tensor_map(Launcher&, const _Float16* data, int64_t rows, int64_t columns, int box_rows,
                                 int box_columns) {
  // what cuTensorMapEncodeTiled refuses
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns * 2 % 16 == 0;
  bool fits = box_rows <= 256 && box_columns * 2 <= 128 && rows > 0 && rows <= int64_t{1} << 32;
  if (!aligned || !fits) fail("no such tensor map");
  return {reinterpret_cast<const char*>(data), rows, columns, box_rows, box_columns};
}

template <typename... Params, typename... Args>
void launch_hopper(Launcher&, void (*kernel)(Params...), int64_t blocks, int threads, const Args&... args) {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  std::mt19937_64 random(hopper_seed());
  std::function<void()> body = [&] { kernel(args...); };
  for (int64_t index = 0; index < blocks; ++index) {
    HopperBlock(index, blocks, threads, hopper_seed() == 0 ? 0 : random() | 1, fibers).run(body);
  }
}

}  // namespace vqkernels::host_cuda

namespace vqkernels::cuda {

using TensorMap = host_cuda::TensorMap;
using SharedAddress = uint32_t;

inline SharedAddress dynamic_shared_memory() { return host_cuda::kSharedBase; }
inline void load_pair(const float* from, float& first, float& second) {
  if (reinterpret_cast<uintptr_t>(from) % 8 != 0) host_cuda::fail("a pair must be 8-byte aligned");
  first = from[0], second = from[1];
}
inline int warp_uniform(int value) { return value; }
inline void copy_if(bool condition, float& to, float from) {
  if (condition) to = from;
}
inline void set_if(bool condition, float& to, float one, float value) {
  if (condition) to = one * value;
}

inline void init_barrier(SharedAddress barrier, int arrivals) {
  host_cuda::HopperBlock::current()->init_barrier(barrier, arrivals);
}
inline void fence_barrier_init() {
  if (!host_cuda::faulty("barrier-fence")) host_cuda::HopperBlock::current()->fence_barriers();
}
inline void arrive(SharedAddress barrier) {
  if (!host_cuda::faulty("release")) host_cuda::HopperBlock::current()->arrive(barrier, 0);
}
inline void arrive_expecting(SharedAddress barrier, int bytes) {
  host_cuda::HopperBlock::current()->arrive(barrier, host_cuda::faulty("bytes") ? bytes / 2 : bytes);
}
inline void wait(SharedAddress barrier, uint32_t parity) {
  if (host_cuda::faulty("wait")) return;
  host_cuda::HopperBlock::current()->wait(barrier, host_cuda::faulty("parity") ? parity ^ 1 : parity);
}
inline void copy_box(SharedAddress to, const TensorMap& map, int column, int row, SharedAddress barrier) {
  host_cuda::HopperBlock::current()->copy_box(to, map, column, row, barrier);
}
template <int COUNT>
void shrink_registers() {
  host_cuda::HopperBlock::current()->set_registers(COUNT, false);
}
template <int COUNT>
void grow_registers() {
  host_cuda::HopperBlock::current()->set_registers(COUNT, true);
}
inline void sync_named(int id, int threads) {
  if (!host_cuda::faulty("sync")) host_cuda::HopperBlock::current()->named(id, threads, true);
}
inline void arrive_named(int id, int threads) {
  host_cuda::HopperBlock::current()->named(id, threads, false);
}

constexpr int kProductRows = 64;
constexpr int kProductColumns = 128;
constexpr int kProductDepth = 16;
constexpr int kProductRegisters = host_cuda::kResults;

inline void fence_products(float (&)[kProductRegisters]) {
  if (!host_cuda::faulty("fence")) host_cuda::HopperBlock::current()->fence_products();
}
inline void commit_products() { host_cuda::HopperBlock::current()->commit(); }
template <int PENDING>
void wait_products(float (&)[kProductRegisters]) {
  if (host_cuda::faulty(PENDING == 0 ? "results" : "early-release")) return;
  host_cuda::HopperBlock::current()->wait_products(PENDING);
}
template <int HALF>
void multiply(float (&results)[kProductRegisters], uint64_t tokens, uint64_t codes, bool add) {
  if (host_cuda::faulty("stride")) codes -= (codes >> 32 & 0x3fff) / 2 << 32;
  if (host_cuda::faulty("swizzle")) codes ^= uint64_t{3} << 62;
  host_cuda::HopperBlock::current()->multiply(results, HALF, tokens, codes, add);
}

}  // namespace vqkernels::cuda
