// Sorting tokens by code, in time O(N + K) where codes are few and O(N) where they are many.
#include "groups.h"

#include <algorithm>
#include <cstdlib>

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t MOST_CODES_PER_TOKEN = 4;  // beyond it, tables of K numbers cost more than sorting N pairs
constexpr double OPERATIONS_A_TOKEN = 32.0;  // in time
constexpr int64_t PLACES_AHEAD = 24;         // places lie anywhere in memory

[[noreturn]] void refuse(int64_t code, int64_t codebook_size) {
  check(false, "codes: expected values below codebook_size = ", codebook_size, ", got ", code);
  std::abort();
}

bool is_valid(int64_t code, int64_t codebook_size) {
  if (code >= codebook_size) refuse(code, codebook_size);
  return code >= 0;
}

// tokens[k] = how many of the `count` have code k; returns the first code that is none, or the last one.
int64_t count_tokens(const int64_t* codes,  // [count]
                     int64_t count, int64_t codebook_size,
                     int64_t* tokens) {  // [K]
  std::fill_n(tokens, codebook_size, 0);
  int64_t code = -1;
  for (int64_t n = 0; n < count; ++n) {
    code = codes[n];
    if (code >= codebook_size) break;
    if (code >= 0) ++tokens[code];
  }
  return code;
}

// Every thread has a run of tokens and its own places for them, which come after those of the runs before.
// They are asked for ahead: on a Xeon (Sapphire Rapids) half the time that 65536 tokens of 16384 codes would
// take to go there.
void group_by_counting(const int64_t* codes, int64_t count, int64_t codebook_size, Groups& groups) {
  const double cost = OPERATIONS_A_TOKEN * count;
  const int64_t most_parts = std::max<int64_t>(1, count / codebook_size);  // each has a table
  const int64_t part = ceil_div(count, std::min(useful_threads(cost), most_parts));
  const int64_t parts = ceil_div(count, part);
  const Buffer<int64_t> next(parts * codebook_size);
  const Buffer<int64_t> last(parts);
  for_each_range(count, part, cost, [&](int64_t begin, int64_t end) {
    const int64_t p = begin / part;
    last[p] = count_tokens(codes + begin, end - begin, codebook_size, next.get() + p * codebook_size);
  });
  for (int64_t p = 0; p < parts; ++p) is_valid(last[p], codebook_size);
  const int64_t most = std::min(count, codebook_size);
  groups.code.resize(most + 1);  // one more, so that what has no token can be written, too
  groups.start.resize(most + 1);
  int64_t used = 0, start = 0;
  for (int64_t k = 0; k < codebook_size; ++k) {
    groups.code[used] = k;
    groups.start[used] = start;
    const int64_t before = start;
    for (int64_t i = k; i < parts * codebook_size; i += codebook_size) {
      const int64_t tokens = next[i];
      next[i] = start;
      start += tokens;
    }
    used += start > before;
  }
  groups.code.resize(used);
  groups.start.resize(used);
  groups.start.push_back(start);
  for_each_range(count, part, cost, [&](int64_t begin, int64_t end) {
    int64_t* place = next.get() + begin / part * codebook_size;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t later = codes[std::min(n + PLACES_AHEAD, end - 1)];
      if (later >= 0) __builtin_prefetch(groups.order.get() + place[later], 1);
      if (codes[n] >= 0) groups.order[place[codes[n]]++] = n;
    }
  });
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
  std::vector<int64_t> tokens(codebook_size);
  is_valid(count_tokens(codes, count, codebook_size, tokens.data()), codebook_size);
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
