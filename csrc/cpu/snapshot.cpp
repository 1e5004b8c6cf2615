// The table of snapshots.
#include "snapshot.h"

#include <mutex>
#include <unordered_map>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "../checks.h"

namespace vqkernels {
namespace cpu {
namespace {

struct Table {
  std::mutex mutex;
  int64_t last = 0;
  std::unordered_map<int64_t, std::shared_ptr<const Snapshot>> entries;
};

Table& table() {
  static Table* const one = [] {
    Table* made = new Table;  // never destroyed: threads may still search while the process ends
#if defined(__unix__) || defined(__APPLE__)
    // a child that is forked while another thread looks something up must not find the table locked
    pthread_atfork([] { table().mutex.lock(); }, [] { table().mutex.unlock(); },
                   [] { table().mutex.unlock(); });
#endif
    return made;
  }();
  return *one;
}

}  // namespace

int64_t keep_snapshot(std::shared_ptr<const Snapshot> snapshot) {
  Table& kept = table();
  const std::lock_guard<std::mutex> guard(kept.mutex);
  kept.entries.emplace(++kept.last, std::move(snapshot));
  return kept.last;
}

std::shared_ptr<const Snapshot> find_snapshot(int64_t number) {
  Table& kept = table();
  const std::lock_guard<std::mutex> guard(kept.mutex);
  const auto found = kept.entries.find(number);
  check(found != kept.entries.end(), "snapshot: expected the number of a codebook that is kept, got ",
        number);
  return found->second;
}

void release_snapshot(int64_t number) noexcept {
  Table& kept = table();
  std::shared_ptr<const Snapshot> dropped;  // freed after the lock
  const std::lock_guard<std::mutex> guard(kept.mutex);
  const auto found = kept.entries.find(number);
  if (found == kept.entries.end()) return;
  dropped = std::move(found->second);
  kept.entries.erase(found);
}

void check_snapshot(const Snapshot& snapshot, const Tensor& x) {
  check_tokens(x, "x");
  check_codebook(snapshot.codebook, x);
}

}  // namespace cpu
}  // namespace vqkernels
