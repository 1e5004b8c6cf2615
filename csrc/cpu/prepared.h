// Prepared codebooks, kept between calls. A codebook is known by a fingerprint of its numbers, taken in every
// call at the speed of the memory: whatever has written to it (an optimizer, `.data`, a numpy view, another
// process's shared memory), a stale one is never used.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "coarse.h"

namespace vqkernels {
namespace cpu {

// 512 bits; two codebooks of one shape share them with a probability of about 2^-64 where they differ in one
// place, and less where in more.
using Fingerprint = std::array<uint64_t, 8>;
Fingerprint fingerprint_of(const KernelTable& table, const float* rows, int64_t count);

// A first pass saves a share of the finer one's work for every token; it costs the candidates that it leaves,
// and for tokens that it cannot decide the whole of the finer one. Where that does not pay it is left out,
// and tried again after many more tokens.
class Verdict {
 public:
  void add(int64_t tokens, int64_t undecided, int64_t reranked, int64_t codes) {
    tokens_.fetch_add(tokens, std::memory_order_relaxed);
    cost_.fetch_add(undecided * codes + reranked * CODES_OF_A_CANDIDATE, std::memory_order_relaxed);
  }
  void leave_out(int64_t tokens) {
    const int64_t most = AGAIN * tokens_.load(std::memory_order_relaxed);
    if (left_out_.fetch_add(tokens, std::memory_order_relaxed) + tokens < most) return;
    left_out_ = tokens_ = cost_ = 0;
  }
  bool pays(int64_t codes) const {
    const int64_t tokens = tokens_.load(std::memory_order_relaxed);
    return tokens < FEWEST ||
           cost_.load(std::memory_order_relaxed) < SAVED * static_cast<double>(tokens * codes);
  }

 private:
  static constexpr int64_t FEWEST = 64;  // tokens, before which nothing is known
  static constexpr int64_t AGAIN = 64;   // times as many tokens as were tried
  static constexpr int64_t CODES_OF_A_CANDIDATE =
      12;                               // whose finer scores take as long as one more candidate
  static constexpr double SAVED = 0.3;  // of the finer pass's time
  std::atomic<int64_t> tokens_{0};
  std::atomic<int64_t> cost_{0};  // in codes of the finer pass
  std::atomic<int64_t> left_out_{0};
};

class PreparedCodebook {
 public:
  CoarseBook coarse;
  std::vector<double> inverse_norm;  // [K] for cosine, else empty

  // The first of every set of equal codes, in order. Found when first asked for.
  const std::vector<int64_t>& distinct(const float* rows) const;

  // The same codes packed for the pass that comes next. Made when first asked for, and kept.
  std::shared_ptr<const PreparedCodebook> finer(const KernelTable& table, const CoarsePass& pass,
                                                const CodeRows& codes) const;

  // Whether so many tokens are better decided without it: the first few of a codebook, which may be the only
  // ones before it changes.
  bool spares_finer(int64_t tokens) const {
    constexpr int64_t FEW = 4;
    return tokens <= FEW && finer_bytes_ == 0 && spared_.fetch_add(tokens) + tokens <= FEW;
  }

  int64_t bytes() const;

  std::optional<Fingerprint> fingerprint;  // of the codes, where they may change

  // Whether the pass has been worth its while on this codebook.
  mutable Verdict verdict;

 private:
  mutable std::once_flag once_;
  mutable std::vector<int64_t> distinct_;
  mutable std::mutex finer_mutex_;
  mutable std::shared_ptr<const PreparedCodebook> finer_;
  mutable std::atomic<int64_t> finer_bytes_{0};
  mutable std::atomic<int64_t> spared_{0};
};

struct PreparedKey {
  Fingerprint fingerprint;
  const CoarsePass* pass;
  int64_t size;
  int64_t dim;
  bool cosine;
  bool operator==(const PreparedKey&) const = default;
};

// Null where it is not there.
std::shared_ptr<const PreparedCodebook> find_prepared(const PreparedKey& key);

// Panels of what was prepared from this very tensor before it changed, if nobody searches with them.
Panels take_outdated(const PreparedKey& key, const void* tensor);

// Keeps it until newer ones need the room: 64 codebooks and 256 MiB, or one that is larger.
void keep_prepared(const PreparedKey& key, const void* tensor, std::shared_ptr<PreparedCodebook> prepared);

}  // namespace cpu
}  // namespace vqkernels
