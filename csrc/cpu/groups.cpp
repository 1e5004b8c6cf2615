// Sorting tokens by code, in time O(N + K) where codes are few and O(N) where they are many.
#include "groups.h"

#include <algorithm>
#include <cstdlib>

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t MOST_CODES_PER_TOKEN = 4;  // beyond it, tables of K numbers cost more than sorting N pairs

[[noreturn]] void refuse(int64_t code, int64_t codebook_size) {
  check(false, "codes: expected values below codebook_size = ", codebook_size, ", got ", code);
  std::abort();
}

bool is_valid(int64_t code, int64_t codebook_size) {
  if (code >= codebook_size) refuse(code, codebook_size);
  return code >= 0;
}

void group_by_counting(const int64_t* codes, int64_t count, int64_t codebook_size, Groups& groups) {
  std::vector<int64_t> next = tokens_of_codes(codes, count, codebook_size);
  const int64_t most = std::min(count, codebook_size);
  groups.code.resize(most + 1);  // one more, so that what has no token can be written, too
  groups.start.resize(most + 1);
  int64_t used = 0, start = 0;
  for (int64_t k = 0; k < codebook_size; ++k) {
    const int64_t tokens = next[k];
    groups.code[used] = k;
    groups.start[used] = start;
    used += tokens > 0;
    next[k] = start;
    start += tokens;
  }
  groups.code.resize(used);
  groups.start.resize(used);
  for (int64_t n = 0; n < count; ++n) {
    if (codes[n] >= 0) groups.order[next[codes[n]]++] = n;
  }
  groups.start.push_back(start);
}

struct Entry {
  int64_t code;
  int64_t token;
};

// Digit by digit from the lowest; equal codes keep their order.
void group_by_digits(const int64_t* codes, int64_t count, int64_t codebook_size, Groups& groups) {
  constexpr int BITS = 11;
  constexpr int64_t DIGITS = int64_t(1) << BITS;
  Buffer<Entry> entries(count), other(count);
  int64_t valid = 0;
  for (int64_t n = 0; n < count; ++n) {
    if (is_valid(codes[n], codebook_size)) entries[valid++] = {codes[n], n};
  }
  for (int shift = 0; (codebook_size - 1) >> shift > 0; shift += BITS) {
    int64_t next[DIGITS + 1] = {};
    for (int64_t i = 0; i < valid; ++i) ++next[1 + ((entries[i].code >> shift) & (DIGITS - 1))];
    for (int64_t digit = 0; digit < DIGITS; ++digit) next[digit + 1] += next[digit];
    for (int64_t i = 0; i < valid; ++i) other[next[(entries[i].code >> shift) & (DIGITS - 1)]++] = entries[i];
    std::swap(entries, other);
  }
  groups.code.reserve(valid);
  groups.start.reserve(valid + 1);
  for (int64_t i = 0; i < valid; ++i) {
    groups.order[i] = entries[i].token;
    if (i > 0 && entries[i].code == entries[i - 1].code) continue;
    groups.code.push_back(entries[i].code);
    groups.start.push_back(i);
  }
  groups.start.push_back(valid);
}

}  // namespace

std::vector<int64_t> tokens_of_codes(const int64_t* codes, int64_t count, int64_t codebook_size) {
  std::vector<int64_t> tokens(codebook_size, 0);
  for (int64_t n = 0; n < count; ++n) {
    if (is_valid(codes[n], codebook_size)) ++tokens[codes[n]];
  }
  return tokens;
}

Groups group_by_code(const int64_t* codes, int64_t count, int64_t codebook_size) {
  Groups groups{{}, {}, Buffer<int64_t>(count)};
  if (codebook_size <= MOST_CODES_PER_TOKEN * count) {
    group_by_counting(codes, count, codebook_size, groups);
  } else {
    group_by_digits(codes, count, codebook_size, groups);
  }
  return groups;
}

Buffer<int64_t> group_of_tokens(const Groups& groups, int64_t count) {
  Buffer<int64_t> group(count);
  for (int64_t n = 0; n < count; ++n) group[n] = -1;
  for (int64_t g = 0; g < groups.used(); ++g) {
    for (int64_t i = groups.start[g]; i < groups.start[g + 1]; ++i) group[groups.order[i]] = g;
  }
  return group;
}

}  // namespace cpu
}  // namespace vqkernels
