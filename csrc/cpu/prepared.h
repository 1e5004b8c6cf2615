// Prepared codebooks, kept between calls. A codebook is known by a fingerprint of its numbers, taken in every
// call at the speed of the memory: whatever has written to it (an optimizer, `.data`, a numpy view, another
// process's shared memory), a stale one is never used.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "coarse.h"

namespace vqkernels {
namespace cpu {

class PreparedCodebook {
 public:
  CoarseBook coarse;
  std::vector<double> inverse_norm;  // [K] for cosine, else empty

  // The first of every set of equal codes, in order. Found when first asked for.
  const std::vector<int64_t>& distinct(const float* rows) const;

 private:
  mutable std::once_flag once_;
  mutable std::vector<int64_t> distinct_;
};

// 512 bits; two codebooks of one shape share them with a probability of about 2^-64 where they differ in one
// place, and less where in more.
using Fingerprint = std::array<uint64_t, 8>;
Fingerprint fingerprint_of(const KernelTable& table, const float* rows, int64_t count);

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
