// Fingerprints and the store of prepared codebooks.
#include "prepared.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <list>
#include <unordered_map>

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t CHUNK = 1 << 16;  // floats hashed as one piece of work
constexpr int64_t MOST_BOOKS = 64;
constexpr int64_t MOST_BYTES = int64_t{256} << 20;

constexpr uint64_t ODD[8] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb, 0xd6e8feb86659fd93,
                             0xa0761d6478bd642f, 0xe7037ed1a0b428db, 0x8ebc6af09c88c6e3, 0x589965cc75374cc3};

uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 32)) * ODD[1];
  value = (value ^ (value >> 29)) * ODD[2];
  return value ^ (value >> 32);
}

constexpr int64_t HASHED = 1024;  // words that have a key each: 8 KiB, beside which the words fit into L1

const std::array<uint64_t, HASHED + 8>& hash_keys() {
  static const auto keys = [] {
    std::array<uint64_t, HASHED + 8> random;
    for (size_t i = 0; i < random.size(); ++i) random[i] = mix((i + 1) * ODD[0]);
    return random;
  }();
  return keys;
}

Fingerprint hash_values(const KernelTable& table, const float* values, int64_t count) {
  const auto* words = reinterpret_cast<const uint64_t*>(values);  // read by way of memcpy
  const auto& keys = hash_keys();
  Fingerprint hash{};
  uint64_t sums[16];
  for (int64_t i = 0; i < count / 2; i += HASHED) {
    table.hash_words(words + i, std::min(HASHED, count / 2 - i), keys.data(), sums);
    for (int lane = 0; lane < 8; ++lane) {
      hash[lane] = mix(hash[lane] * 3 + mix(sums[lane] + mix(sums[8 + lane] + ODD[lane])));
    }
  }
  if (count % 2 != 0) {
    uint32_t last;
    std::memcpy(&last, values + count - 1, sizeof(last));
    hash[0] = mix(hash[0] + last);
  }
  return hash;
}

struct Entry {
  PreparedKey key;
  const void* tensor;  // its address, only to tell what is outdated
  std::shared_ptr<PreparedCodebook> prepared;
};

// Most recently used first.
struct Store {
  std::mutex mutex;
  std::list<Entry> entries;
};

Store& store() {
  static Store* const one = new Store;  // never destroyed: threads may still search while the process ends
  return *one;
}

}  // namespace

Fingerprint fingerprint_of(const KernelTable& table, const float* rows, int64_t count) {
  const int64_t chunks = std::max(ceil_div(count, CHUNK), int64_t{1});
  std::vector<Fingerprint> parts(chunks);
  for_each_range(chunks, 1, static_cast<double>(count), [&](int64_t i, int64_t) {
    const int64_t values = std::min(CHUNK, count - i * CHUNK);
    parts[i] = hash_values(table, rows + i * CHUNK, values);
  });
  Fingerprint all = parts[0];
  for (int64_t i = 1; i < chunks; ++i) {
    for (int lane = 0; lane < 8; ++lane) all[lane] = mix(all[lane] * 3 + parts[i][lane]);
  }
  return all;
}

std::shared_ptr<const PreparedCodebook> find_prepared(const PreparedKey& key) {
  Store& kept = store();
  const std::lock_guard<std::mutex> guard(kept.mutex);
  const auto found = std::find_if(kept.entries.begin(), kept.entries.end(),
                                  [&](const Entry& entry) { return entry.key == key; });
  if (found == kept.entries.end()) return nullptr;
  kept.entries.splice(kept.entries.begin(), kept.entries, found);
  return found->prepared;
}

Panels take_outdated(const PreparedKey& key, const void* tensor) {
  Store& kept = store();
  const std::lock_guard<std::mutex> guard(kept.mutex);
  for (auto entry = kept.entries.begin(); entry != kept.entries.end(); ++entry) {
    const PreparedKey& other = entry->key;
    const bool same_place = entry->tensor == tensor && other.pass == key.pass && other.size == key.size &&
                            other.dim == key.dim && other.cosine == key.cosine;
    if (!same_place || entry->prepared.use_count() > 1) continue;
    std::atomic_thread_fence(std::memory_order_acquire);  // after the last search with them
    Panels panels = std::move(entry->prepared->coarse.panels);
    kept.entries.erase(entry);
    return panels;
  }
  return {};
}

void keep_prepared(const PreparedKey& key, const void* tensor, std::shared_ptr<PreparedCodebook> prepared) {
  Store& kept = store();
  std::list<Entry> dropped;  // freed after the lock
  const std::lock_guard<std::mutex> guard(kept.mutex);
  kept.entries.push_front({key, tensor, std::move(prepared)});
  int64_t total = 0, count = 0;
  for (auto entry = kept.entries.begin(); entry != kept.entries.end(); ++count) {
    const auto next = std::next(entry);
    const int64_t bytes = entry->prepared->bytes();
    total += bytes;
    if (count > 0 && (count >= MOST_BOOKS || total > MOST_BYTES)) {
      total -= bytes;
      dropped.splice(dropped.begin(), kept.entries, entry);
    }
    entry = next;
  }
}

std::shared_ptr<const PreparedCodebook> PreparedCodebook::finer(const KernelTable& table,
                                                                const CoarsePass& pass,
                                                                const CodeRows& codes) const {
  const std::lock_guard<std::mutex> guard(finer_mutex_);
  if (finer_ != nullptr) return finer_;
  const auto made = std::make_shared<PreparedCodebook>();
  made->coarse = pack_coarse(table, pass, codes, {});
  // not where somebody has written meanwhile, as in `current`
  const bool same =
      !fingerprint.has_value() || fingerprint_of(table, codes.rows, codes.size * codes.dim) == *fingerprint;
  if (same) {
    finer_ = made;
    finer_bytes_ = made->bytes();
  }
  return made;
}

int64_t PreparedCodebook::bytes() const {
  const int64_t words = static_cast<int64_t>(coarse.order.size() + inverse_norm.size());
  return coarse.panels.bytes + 8 * words + finer_bytes_;
}

const std::vector<int64_t>& PreparedCodebook::distinct(const float* rows) const {
  std::call_once(once_, [&] {
    const int64_t dim = coarse.dim;
    std::unordered_map<uint64_t, std::vector<int64_t>> by_hash;
    for (int64_t k = 0; k < coarse.size; ++k) {
      uint64_t hash = 0;
      for (const uint64_t part : hash_values(kernels(), rows + k * dim, dim)) hash = mix(hash + part);
      std::vector<int64_t>& same = by_hash[hash];
      const bool known = std::any_of(same.begin(), same.end(), [&](int64_t other) {
        return std::memcmp(rows + other * dim, rows + k * dim, sizeof(float) * dim) == 0;
      });
      if (known) continue;
      same.push_back(k);
      distinct_.push_back(k);
    }
  });
  return distinct_;
}

}  // namespace cpu
}  // namespace vqkernels
