// Tokens sorted by code, in their order within a code: what every sum over the tokens of a code walks along,
// so that neither thread count nor run shows in any bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../checks.h"
#include "parallel.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {

struct Groups {
  int64_t used;
  std::vector<int64_t> code;  // [used] ascending, none of them without tokens; empty: group g is code g
  Buffer<uint32_t> start;     // [used + 1] of each group's tokens in `order`
  Buffer<uint32_t> order;     // [tokens with a code]

  CodeTokens tokens() const {
    return {code.empty() ? nullptr : code.data(), start.get(), order.get(), used, start[used]};
  }
  // The first group whose code is not below k.
  int64_t from(int64_t k) const {
    if (code.empty()) return k;
    return std::lower_bound(code.begin(), code.end(), k) - code.begin();
  }
};

// How many of `codes` with so many operations in all one thread takes at a time.
inline int64_t codes_at_a_time(int64_t codes, double operations) {
  constexpr double OPERATIONS = 1 << 19;
  return 1 + static_cast<int64_t>(OPERATIONS / (operations + 1.0) * static_cast<double>(codes));
}

// Throws where a code is not below codebook_size, or tokens are 2^32 or more; tokens with a negative code are
// left out.
Groups group_by_code(const int64_t* codes,  // [count]
                     int64_t count, int64_t codebook_size);

// The group of every token, -1 for those without a code.
Buffer<int64_t> group_of_tokens(const Groups& groups, int64_t count);  // -> [count]

}  // namespace cpu
}  // namespace vqkernels
