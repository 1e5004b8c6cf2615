// Sums of the rows of each code, in registers, in the order of its tokens; their rows lie anywhere in memory
// and are asked for ahead.
#pragma once

#include <cstdint>
#include <utility>

#include "training_lanes.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {
namespace {

// out = fresh, or out += it.
template <class W>
VQ_INLINE void put_eight(typename Eight<W>::Vector fresh, bool adds, W* out) {
  typename Eight<W>::Vector old;
  if (adds) {
    load(out, old);
    fresh += old;
  }
  store(out, fresh);
}
template <class W>
VQ_INLINE void put_sum_of_eight(const Doubles& sum, bool adds, W* out) {
  typename Eight<W>::Vector fresh;
  narrow(sum, fresh);
  put_eight<W>(fresh, adds, out);
}
template <class W>
VQ_INLINE void put_one(W fresh, bool adds, W* out) {
  *out = adds ? *out + fresh : fresh;
}

template <class W>
VQ_INLINE void put_row(const W* row, int64_t dim, bool adds, W* out) {
  typename Eight<W>::Vector fresh;
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    load(row + d, fresh);
    put_eight<W>(fresh, adds, out + d);
  }
  for (; d < dim; ++d) put_one(row[d], adds, out + d);
}

template <class W>
void put_sum(const double* total, int64_t dim, bool adds, W* out) {
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) put_sum_of_eight(load_wide(total + d), adds, out + d);
  for (; d < dim; ++d) put_one(static_cast<W>(total[d]), adds, out + d);
}

template <class W>
VQ_INLINE void fetch_row(const W* row, int64_t dim) {
  constexpr int64_t PER_LINE = 64 / sizeof(W);
  for (int64_t d = 0; d < dim; d += PER_LINE) __builtin_prefetch(row + d);
}

// Rows of one matrix that are added up, in this order.
template <class W>
struct Run {
  const W* rows;  // [N, D], stride apart
  int64_t stride;
  const uint32_t* order;  // [count]
  int64_t count;

  const W* operator[](int64_t i) const { return rows + order[i] * stride; }
};

// Where sums begin, and where they go: both are `total` [D] in the middle of a code's tokens.
template <class W>
struct SumEnds {
  double* total;
  W* out;  // [D]
  bool starts;
  bool ends;
  bool adds;  // to out
};

// BLOCKS * 8 dimensions in registers over all rows of a run; as many rows of `next` are asked for meanwhile.
template <int BLOCKS, class W>
VQ_INLINE void sum_blocks(const Run<W>& run, const Run<W>& next, int64_t d, const SumEnds<W>& ends) {
  Doubles sum[BLOCKS];
#pragma GCC unroll 4
  for (int b = 0; b < BLOCKS; ++b) sum[b] = ends.starts ? no_rows() : load_wide(ends.total + d + b * LANES);
  for (int64_t i = 0; i < run.count; ++i) {
    const W* row = run[i] + d;
    if (i < next.count) fetch_row(next[i] + d, BLOCKS * LANES);
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) sum[b] += load_wide(row + b * LANES);
  }
  if (ends.ends) {
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) put_sum_of_eight(sum[b], ends.adds, ends.out + d + b * LANES);
  } else {
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) store(ends.total + d + b * LANES, sum[b]);
  }
}

template <class W>
VQ_INLINE void sum_run(const Run<W>& run, const Run<W>& next, int64_t dim, const SumEnds<W>& ends) {
  constexpr int BLOCKS = Doubles::PARTS > 2 ? 2 : 4;  // of their sums, 16 registers hold no more
  int64_t d = 0;
  for (; d + BLOCKS * LANES <= dim; d += BLOCKS * LANES) sum_blocks<BLOCKS>(run, next, d, ends);
  for (; d + LANES <= dim; d += LANES) sum_blocks<1>(run, next, d, ends);
  for (; d < dim; ++d) {
    double sum = ends.starts ? NO_ROWS : ends.total[d];
    for (int64_t i = 0; i < run.count; ++i) sum += run[i][d];
    if (ends.ends) {
      put_one(static_cast<W>(sum), ends.adds, ends.out + d);
    } else {
      ends.total[d] = sum;
    }
  }
}

// Rows lie anywhere in memory, and the processor would not guess them. Into the first cache: into the second,
// 1024 codes of 16384 tokens of 256 take 1.3 instead of 1.1 ms on a Xeon (Sapphire Rapids). As much is summed
// of a code with many tokens at a time: two such runs share that cache. Rows that are summed in one go want
// fewer: with 28 instead of 16, 65536 tokens of 32 and of 64 dimensions take a quarter longer on a Zen 3.
constexpr int64_t AHEAD_BYTES = 8192, SHORT_ROWS_AHEAD = 16;

template <class W>
VQ_INLINE int64_t rows_ahead(int64_t dim) {
  return 1 + AHEAD_BYTES / (dim * static_cast<int64_t>(sizeof(W)));
}

// Sums of one code after another, in the order of `tokens`.
template <class W>
class CodeSums {
 public:
  CodeSums(const W* rows, int64_t stride, int64_t dim, const CodeTokens& tokens, int64_t first, double* total)
      : rows_(rows),
        stride_(stride),
        dim_(dim),
        tokens_(tokens),
        total_(total),
        sum_short_(choose_short(std::make_integer_sequence<int, MOST_BLOCKS>())),
        ahead_(sum_short_ != nullptr ? SHORT_ROWS_AHEAD : rows_ahead<W>(dim)),
        fetched_(tokens.start[first]) {
    fetch(fetched_, 0);
  }

  VQ_INLINE const W* row(int64_t i) const { return rows_ + tokens_.order[i] * stride_; }

  // The sum in `out`, or the one row that it consists of.
  VQ_INLINE const W* row_or_sum(int64_t g, W* out) {
    const int64_t start = tokens_.start[g], end = tokens_.start[g + 1];
    if (end - start > 1) {
      sum(g, false, out);
      return out;
    }
    fetch(end, 0);
    return row(start);
  }

  VQ_INLINE void sum(int64_t g, bool adds, W* out) {
    const int64_t start = tokens_.start[g], end = tokens_.start[g + 1];
    if (end - start == 1) {
      fetch(end, 0);
      return put_row(row(start), dim_, adds, out);
    }
    if (sum_short_ != nullptr) {
      sum_short_(*this, start, end, adds, out);
      fetched_ = end_of_fetched(end);
      return;
    }
    for (int64_t i = start; i < end; i += ahead_) {
      const int64_t count = end - i < ahead_ ? end - i : ahead_;
      const Run<W> next = fetch(i + count, count);
      sum_run(Run<W>{rows_, stride_, tokens_.order + i, count}, next, dim_,
              SumEnds<W>{total_, out, i == start, i + count == end, adds});
    }
  }

 private:
  // So many blocks of eight dimensions are summed at once: registers hold no more.
  static constexpr int MOST_BLOCKS = Doubles::PARTS > 2 ? 2 : 8;

  using SumShort = void (*)(const CodeSums& sums, int64_t start, int64_t end, bool adds, W* out);

  // Null where a row has fewer than eight dimensions, or more than registers hold.
  template <int... BLOCKS>
  SumShort choose_short(std::integer_sequence<int, BLOCKS...>) const {
    const int64_t blocks = dim_ < LANES ? 0 : (dim_ + LANES - 1) / LANES;
    SumShort chosen = nullptr;
    ((chosen = blocks == BLOCKS + 1 ? &sum_short<BLOCKS + 1> : chosen), ...);
    return chosen;
  }

  // Tokens [start, end) of one code; the last block overlaps the one before it where D is no multiple of
  // eight.
  template <int BLOCKS>
  static void sum_short(const CodeSums& sums, int64_t start, int64_t end, bool adds, W* out) {
    const int64_t last = sums.dim_ - LANES, most = sums.tokens_.count - 1;
    Doubles sum[BLOCKS];
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) sum[b] = no_rows();
    for (int64_t i = start; i < end; ++i) {
      const W* row = sums.row(i);
      fetch_row(sums.row(i + sums.ahead_ < most ? i + sums.ahead_ : most), BLOCKS * LANES);
#pragma GCC unroll 8
      for (int b = 0; b + 1 < BLOCKS; ++b) sum[b] += load_wide(row + b * LANES);
      sum[BLOCKS - 1] += load_wide(row + last);
    }
    typename Eight<W>::Vector end_of_row, old;
    narrow(sum[BLOCKS - 1], end_of_row);
    if (adds) {  // read before it is written, as part of the block before
      load(out + last, old);
      end_of_row += old;
    }
#pragma GCC unroll 8
    for (int b = 0; b + 1 < BLOCKS; ++b) put_sum_of_eight(sum[b], adds, out + b * LANES);
    store(out + last, end_of_row);
  }

  VQ_INLINE int64_t end_of_fetched(int64_t end) const {
    return end + ahead_ < tokens_.count ? end + ahead_ : tokens_.count;
  }

  // Asks for the rows that are needed when those before `end` have been summed, but for `left` or fewer,
  // which are returned.
  VQ_INLINE Run<W> fetch(int64_t end, int64_t left) {
    const int64_t last = end_of_fetched(end);
    for (; fetched_ < last - left; ++fetched_) fetch_row(row(fetched_), dim_);
    const Run<W> rest{rows_, stride_, tokens_.order + fetched_, last - fetched_};
    fetched_ = last;
    return rest;
  }

  const W* rows_;  // [N, D], stride apart
  int64_t stride_;
  int64_t dim_;
  const CodeTokens& tokens_;
  double* total_;  // [D], memory
  SumShort sum_short_;
  int64_t ahead_;
  int64_t fetched_;
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
