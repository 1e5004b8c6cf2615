// Tokens sorted by code, in their order within a code: what every sum over the tokens of a code walks along,
// so that neither thread count nor run shows in any bit.
#pragma once

#include <cstdint>
#include <vector>

#include "../checks.h"
#include "parallel.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {

struct Groups {
  std::vector<int64_t> code;   // [used] ascending
  std::vector<int64_t> start;  // [used + 1] of each code's tokens in `order`
  Buffer<int64_t> order;       // [tokens with a code]

  int64_t used() const { return static_cast<int64_t>(code.size()); }
  CodeTokens tokens() const { return {code.data(), start.data(), order.get(), used(), start.back()}; }
};

// How many of `codes` with so many operations in all one thread takes at a time.
inline int64_t codes_at_a_time(int64_t codes, double operations) {
  constexpr double OPERATIONS = 1 << 19;
  return 1 + static_cast<int64_t>(OPERATIONS / (operations + 1.0) * static_cast<double>(codes));
}

// Throws where a code is not below codebook_size; tokens with a negative one are left out.
Groups group_by_code(const int64_t* codes,  // [count]
                     int64_t count, int64_t codebook_size);

// How many tokens each code has; throws as group_by_code does.
std::vector<int64_t> tokens_of_codes(const int64_t* codes,  // [count]
                                     int64_t count, int64_t codebook_size);

// The group of every token, -1 for those without a code.
Buffer<int64_t> group_of_tokens(const Groups& groups, int64_t count);  // -> [count]

}  // namespace cpu
}  // namespace vqkernels
