// Sorting tokens by code, in time O(N + K) where codes are few and O(N) where they are many.
#include "groups.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <utility>
#include <vector>

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t MOST_CODES_PER_TOKEN = 4;  // beyond it, tables of K numbers cost more than sorting N pairs
constexpr double OPERATIONS_A_TOKEN = 32.0;  // in time
constexpr int64_t PLACES_AHEAD = 24;         // places lie anywhere in memory
constexpr int64_t BUCKETS = 16, BUCKETS_A_THREAD = 4;
// Threads that one is not slower than: two in buckets take 0.67 of its time on a Xeon (Sapphire Rapids), but
// 2.7 on a Zen 3, whose cores are slow to pass lines on (65536 tokens, 16384 codes).
constexpr int64_t ALONE = 2;

[[noreturn]] void refuse(int64_t code, int64_t codebook_size) {
  check(false, "codes: expected values below codebook_size = ", codebook_size, ", got ", code);
  std::abort();
}

bool is_valid(int64_t code, int64_t codebook_size) {
  if (code >= codebook_size) refuse(code, codebook_size);
  return code >= 0;
}

// Tokens in their own order.
struct Tokens {
  const int64_t* codes;

  int64_t code(int64_t i) const { return codes[i]; }
  uint32_t token(int64_t i) const { return static_cast<uint32_t>(i); }
};

// Some of them, with codes counted from the bucket's first one.
struct Bucket {
  struct Entry {
    uint32_t code;
    uint32_t token;
  };
  const Entry* entries;

  int64_t code(int64_t i) const { return entries[i].code; }
  uint32_t token(int64_t i) const { return entries[i].token; }
};

// Sorts `count` items; `order` and the numbers in `start` count from `first`. Returns the first code that is
// not below `size`, and then has done nothing, or a smaller number. Places are asked for ahead: on a Xeon
// with AMX 65536 tokens of 16384 codes take a sixth less so.
template <class Items>
int64_t sort_by_counting(const Items& items, int64_t count, int64_t size, uint32_t first,
                         uint32_t* table,    // [size], memory
                         uint32_t* start,    // [size]
                         uint32_t* order) {  // of all tokens
  std::fill_n(table, size, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t code = items.code(i);
    if (code >= size) return code;
    if (code >= 0) ++table[code];
  }
  for (int64_t k = 0; k < size; ++k) {
    const uint32_t tokens = table[k];
    start[k] = table[k] = first;
    first += tokens;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t code = items.code(i), later = items.code(std::min(i + PLACES_AHEAD, count - 1));
    if (later >= 0) __builtin_prefetch(order + table[later], 1);
    if (code >= 0) order[table[code]++] = items.token(i);
  }
  return -1;
}

// Threads put runs of tokens into buckets of neighbouring codes, then sort bucket after bucket, so that no
// two of them write close to each other.
void sort_in_buckets(const int64_t* codes, int64_t count, int64_t codebook_size, int64_t threads,
                     Groups& groups) {
  const int64_t buckets = std::max(BUCKETS, BUCKETS_A_THREAD * threads);
  int shift = 0;
  while ((codebook_size - 1) >> shift >= buckets) ++shift;
  const double cost = OPERATIONS_A_TOKEN * count;
  const int64_t part = ceil_div(count, threads), parts = ceil_div(count, part);
  std::vector<int64_t> places(parts * buckets), last(parts);
  for_each_range(count, part, cost, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> tokens(buckets);
    int64_t code = -1;
    for (int64_t n = begin; n < end; ++n) {
      code = codes[n];
      if (code >= codebook_size) break;
      if (code >= 0) ++tokens[code >> shift];
    }
    last[begin / part] = code;
    std::copy(tokens.begin(), tokens.end(), places.begin() + begin / part * buckets);
  });
  for (const int64_t code : last) is_valid(code, codebook_size);
  std::vector<int64_t> first(buckets + 1);
  int64_t place = 0;
  for (int64_t b = 0; b < buckets; ++b) {
    first[b] = place;
    for (int64_t i = b; i < parts * buckets; i += buckets) place += std::exchange(places[i], place);
  }
  first[buckets] = place;
  groups.start[codebook_size] = static_cast<uint32_t>(place);
  const Buffer<Bucket::Entry> entries(count);
  for_each_range(count, part, cost, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> next(places.begin() + begin / part * buckets,
                              places.begin() + (begin / part + 1) * buckets);
    const int64_t low = (int64_t{1} << shift) - 1;
    for (int64_t n = begin; n < end; ++n) {
      if (codes[n] < 0) continue;
      entries[next[codes[n] >> shift]++] = {static_cast<uint32_t>(codes[n] & low), static_cast<uint32_t>(n)};
    }
  });
  for_each_item<std::vector<uint32_t>>(
      buckets, cost, [&] { return std::vector<uint32_t>(int64_t{1} << shift); },
      [&](int64_t b, std::vector<uint32_t>& table) {
        const int64_t code = b << shift, end = std::min((b + 1) << shift, codebook_size);
        if (code >= end) return;
        sort_by_counting(Bucket{entries.get() + first[b]}, first[b + 1] - first[b], end - code,
                         static_cast<uint32_t>(first[b]), table.data(), groups.start.get() + code,
                         groups.order.get());
      });
}

// Every code is a group, those without tokens too.
void group_by_counting(const int64_t* codes, int64_t count, int64_t codebook_size, Groups& groups) {
  groups.used = codebook_size;
  groups.start = Buffer<uint32_t>(codebook_size + 1);
  const int64_t threads = useful_threads(OPERATIONS_A_TOKEN * count);
  if (threads > ALONE) return sort_in_buckets(codes, count, codebook_size, threads, groups);
  const Buffer<uint32_t> table(codebook_size);
  is_valid(sort_by_counting(Tokens{codes}, count, codebook_size, 0, table.get(), groups.start.get(),
                            groups.order.get()),
           codebook_size);
  groups.start[codebook_size] = codebook_size > 0 ? table[codebook_size - 1] : 0;
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
  groups.start = Buffer<uint32_t>(valid + 1);
  for (int64_t i = 0; i < valid; ++i) {
    groups.order[i] = static_cast<uint32_t>(entries[i].token);
    if (i > 0 && entries[i].code == entries[i - 1].code) continue;
    groups.start[groups.code.size()] = static_cast<uint32_t>(i);
    groups.code.push_back(entries[i].code);
  }
  groups.used = static_cast<int64_t>(groups.code.size());
  groups.start[groups.used] = static_cast<uint32_t>(valid);
}

}  // namespace

Groups group_by_code(const int64_t* codes, int64_t count, int64_t codebook_size) {
  check(count <= std::numeric_limits<uint32_t>::max(), "codes: expected fewer than 2^32 tokens, got ", count);
  Groups groups{0, {}, Buffer<uint32_t>(), Buffer<uint32_t>(count)};
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
  for (int64_t g = 0; g < groups.used; ++g) {
    for (uint32_t i = groups.start[g]; i < groups.start[g + 1]; ++i) group[groups.order[i]] = g;
  }
  return group;
}

}  // namespace cpu
}  // namespace vqkernels
