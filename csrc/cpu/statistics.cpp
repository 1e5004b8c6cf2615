// Counts and sums of the tokens of every code, and the codebook's gradient. All sums run in token order in
// float64, so that thread count and run do not show in any bit.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "groups.h"
#include "ops.h"
#include "parallel.h"
#include "tokens.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t AHEAD = 6;  // rows lie anywhere in memory, and the processor would not guess them

template <class T>
void prefetch_row(const Tokens<const T>& x, int64_t n) {
  constexpr int64_t PER_LINE = 64 / sizeof(T);
  const T* row = x.row(n);
  for (int64_t d = 0; d < x.dim; d += PER_LINE) __builtin_prefetch(row + d, 0, 2);
}

// Whether tokens are better read along the dimensions, many at a time.
template <class T>
bool side_by_side(const Tokens<T>& x) {
  return x.length_stride < x.dim_stride && x.length > 1;
}

// A token as a wide row: in place where it is one, else in `scratch` [D].
template <class T>
const Wide<T>* wide_row(const Tokens<const T>& x, int64_t n, Wide<T>* scratch) {
  const T* row = x.row(n);
  if constexpr (std::is_same_v<T, Wide<T>>) {
    if (x.rows_are_dense()) return row;
  }
  for (int64_t d = 0; d < x.dim; ++d) scratch[d] = static_cast<Wide<T>>(row[d * x.dim_stride]);
  return scratch;
}

template <class W>
struct SumScratch {
  std::vector<double> total;
  std::vector<W> rows, others;
};

// Sums over one code after another: add(token, scratch) adds to scratch.total, emit(code, first dimension,
// count of dimensions, total) takes the result.
template <class W, class Prefetch, class Add, class Emit>
void sum_by_code(const Groups& groups, int64_t dim, const Prefetch& prefetch, const Add& add,
                 const Emit& emit) {
  const CodeTokens tokens = groups.tokens();
  const double cost = 4.0 * (tokens.count + tokens.used) * dim;
  const int64_t per_item = codes_at_a_time(tokens.used, cost);
  for_each_item<SumScratch<W>>(
      ceil_div(tokens.used, per_item), cost,
      [&] { return SumScratch<W>{std::vector<double>(dim), std::vector<W>(dim), std::vector<W>(dim)}; },
      [&](int64_t item, SumScratch<W>& scratch) {
        const int64_t first = item * per_item, end = std::min(tokens.used, first + per_item);
        for (int64_t g = first; g < end; ++g) {
          if (tokens.size_of(g) == 0) continue;
          std::fill(scratch.total.begin(), scratch.total.end(), NO_ROWS);
          for (int64_t i = tokens.start[g]; i < tokens.start[g + 1]; ++i) {
            if (i + AHEAD < tokens.count) prefetch(tokens.order[i + AHEAD]);
            add(tokens.order[i], scratch);
          }
          emit(tokens.code_of(g), 0, dim, scratch.total.data());
        }
      });
}

// The same for maps: some dimensions after others, all tokens in order, so the additions are those of
// sum_by_code. fill(begin, end, first dimension, count, scratch) puts what is added into scratch.rows [end -
// begin, count].
template <class W, class Fill, class Emit>
void sum_by_dimension(const Groups& groups, int64_t tokens, int64_t dim, const Fill& fill, const Emit& emit) {
  constexpr int64_t BLOCK = 64, MOST_DIMENSIONS = 8;
  const double cost = 4.0 * (tokens + groups.used) * dim;
  const int64_t width = std::min(MOST_DIMENSIONS, ceil_div(dim, useful_threads(cost)));
  const Buffer<int64_t> group = group_of_tokens(groups, tokens);
  const CodeTokens by_code = groups.tokens();
  const TrainingLoops<W>& loops = training_loops<W>();
  for_each_item<SumScratch<W>>(
      ceil_div(dim, width), cost,
      [&] {
        return SumScratch<W>{std::vector<double>(groups.used * width), std::vector<W>(BLOCK * width),
                             std::vector<W>(BLOCK * width)};
      },
      [&](int64_t item, SumScratch<W>& scratch) {
        const int64_t first = item * width, count = std::min(width, dim - first);
        std::fill(scratch.total.begin(), scratch.total.end(), NO_ROWS);
        for (int64_t begin = 0; begin < tokens; begin += BLOCK) {
          const int64_t end = std::min(tokens, begin + BLOCK);
          fill(begin, end, first, count, scratch);
          loops.add_rows(scratch.rows.data(), group.get() + begin, end - begin, count, scratch.total.data());
        }
        for (int64_t g = 0; g < groups.used; ++g) {
          if (by_code.size_of(g) > 0)
            emit(by_code.code_of(g), first, count, scratch.total.data() + g * count);
        }
      });
}

template <class T>
Tokens<const T> some_dimensions(Tokens<const T> x, int64_t first, int64_t count) {
  x.data += first * x.dim_stride;
  x.dim = count;
  return x;
}

// Rows that lie in memory as they are summed.
template <class W>
void sum_dense_rows(const Tokens<const W>& x, const Groups& groups, W* out, bool adds) {  // out [K, D]
  const TrainingLoops<W>& loops = training_loops<W>();
  const CodeTokens tokens = groups.tokens();
  const double cost = 4.0 * (tokens.count + tokens.used) * x.dim;
  const int64_t per_item = codes_at_a_time(tokens.used, cost);
  for_each_item<std::vector<double>>(
      ceil_div(tokens.used, per_item), cost, [&] { return std::vector<double>(x.dim); },
      [&](int64_t item, std::vector<double>& total) {
        const int64_t first = item * per_item, end = std::min(tokens.used, first + per_item);
        loops.sum_codes(x.data, x.spacing(), tokens, first, end, x.dim, total.data(), adds, out);
      });
}

template <class T, class Emit>
void sum_tokens(const Tokens<const T>& x, const Groups& groups, const Emit& emit) {
  using W = Wide<T>;
  const TrainingLoops<W>& loops = training_loops<W>();
  if (side_by_side(x)) {
    return sum_by_dimension<W>(
        groups, x.count(), x.dim,
        [&](int64_t begin, int64_t end, int64_t first, int64_t count, SumScratch<W>& scratch) {
          load_rows(some_dimensions(x, first, count), begin, end, scratch.rows.data());
        },
        emit);
  }
  sum_by_code<W>(
      groups, x.dim, [&](int64_t n) { prefetch_row(x, n); },
      [&](int64_t n, SumScratch<W>& scratch) {
        loops.add_row(wide_row(x, n, scratch.rows.data()), x.dim, scratch.total.data());
      },
      emit);
}

// 2 derror (q - x)
template <class T, class Emit>
void sum_pulls(const Tokens<const T>& x, const Tokens<const T>& quantized, const TokenValues<Wide<T>>& derror,
               const Groups& groups, const Emit& emit) {
  using W = Wide<T>;
  const TrainingLoops<W>& loops = training_loops<W>();
  if (side_by_side(x)) {
    return sum_by_dimension<W>(
        groups, x.count(), x.dim,
        [&](int64_t begin, int64_t end, int64_t first, int64_t count, SumScratch<W>& scratch) {
          load_rows(some_dimensions(x, first, count), begin, end, scratch.others.data());
          load_rows(some_dimensions(quantized, first, count), begin, end, scratch.rows.data());
          for (int64_t i = 0; i < end - begin; ++i) {
            const W weight = W(2) * derror[begin + i];
            for (int64_t d = i * count; d < (i + 1) * count; ++d) {
              scratch.rows[d] = weight * (scratch.rows[d] - scratch.others[d]);
            }
          }
        },
        emit);
  }
  sum_by_code<W>(
      groups, x.dim,
      [&](int64_t n) {
        prefetch_row(x, n);
        prefetch_row(quantized, n);
      },
      [&](int64_t n, SumScratch<W>& scratch) {
        loops.add_pull(wide_row(x, n, scratch.rows.data()), wide_row(quantized, n, scratch.others.data()),
                       W(2) * derror[n], x.dim, scratch.total.data());
      },
      emit);
}

// Results in a dense [K, D]: zero where a code has no token.
template <class Out>
void clear_rows(Out* rows, int64_t count) {
  for_each_range(count, 1 << 16, 1.0 * count,
                 [&](int64_t begin, int64_t end) { std::fill(rows + begin, rows + end, Out(0)); });
}

// Overwrites, or adds each code's sum as a whole.
template <class Out>
auto write_to(Out* rows, int64_t dim, bool adds) {  // rows [K, D]
  const auto put = training_loops<Out>().put_sum;
  return [rows, dim, adds, put](int64_t code, int64_t first, int64_t count, const double* total) {
    put(total, count, adds, rows + code * dim + first);
  };
}

const int64_t* data_of(const Tensor& codes) { return static_cast<const int64_t*>(codes.const_data_ptr()); }

// Nothing is written before all codes are known to be below `size`.
template <class T>
void statistics_into(const Tokens<const T>& x, const int64_t* codes, int64_t size, Wide<T>* counts,
                     Wide<T>* sums, bool adds) {
  using W = Wide<T>;
  const Groups groups = group_by_code(codes, x.count(), size);
  const CodeTokens tokens = groups.tokens();
  for (int64_t g = 0; g < tokens.used; ++g) {
    W& count = counts[tokens.code_of(g)];
    count = (adds ? count : W(0)) + static_cast<W>(tokens.size_of(g));
  }
  if (sums == nullptr) return;
  if constexpr (std::is_same_v<T, W>) {
    if (!side_by_side(x) && usable_as_rows(x)) return sum_dense_rows(x, groups, sums, adds);
  }
  sum_tokens(x, groups, write_to(sums, x.dim, adds));
}

}  // namespace

std::tuple<Tensor, Tensor> codebook_stats(Tensor x, Tensor codes, int64_t codebook_size) {
  check_tokens(x, "x");
  check_codes(codes, x);
  check(codebook_size >= 1, "codebook_size: expected at least 1, got ", codebook_size);
  codes = torch::stable::contiguous(codes);
  const ScalarType type = wide_type(x);
  Tensor counts = torch::stable::new_empty(x, {codebook_size}, type);
  Tensor sums = torch::stable::new_empty(x, {codebook_size, x.size(2)}, type);
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto* count = static_cast<Wide<T>*>(counts.mutable_data_ptr());
    auto* sum = static_cast<Wide<T>*>(sums.mutable_data_ptr());
    clear_rows(count, codebook_size);
    clear_rows(sum, codebook_size * x.size(2));
    statistics_into<T>(tokens_of<T>(x), data_of(codes), codebook_size, count, sum, false);
  });
  return {counts, sums};
}

void add_statistics_(Tensor x, Tensor codes, Tensor counts, std::optional<Tensor> sums) {
  check_tokens(x, "x");
  check_codes(codes, x);
  check_rank(counts, "counts", 1, "[K]");
  check_type(counts, "counts", wide_type(x));
  check(counts.is_contiguous(), "counts: expected a contiguous tensor");
  if (sums.has_value()) {
    check_rank(*sums, "sums", 2, "[K, D]");
    check_type(*sums, "sums", wide_type(x));
    check_size(*sums, "sums", 0, counts.size(0), "K of counts");
    check_size(*sums, "sums", 1, x.size(2), "D of x");
    check(sums->is_contiguous(), "sums: expected a contiguous tensor");
  }
  codes = torch::stable::contiguous(codes);
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto* sum = sums.has_value() ? static_cast<Wide<T>*>(sums->mutable_data_ptr()) : nullptr;
    auto* count = static_cast<Wide<T>*>(counts.mutable_data_ptr());
    statistics_into<T>(tokens_of<T>(x), data_of(codes), counts.size(0), count, sum, true);
  });
}

Tensor codebook_gradient(Tensor x, Tensor quantized, Tensor codes, Tensor derror, int64_t codebook_size) {
  check_tokens(x, "x");
  check_tokens_like(quantized, "quantized", x);
  check_codes(codes, x);
  check_token_values(derror, "derror", x, wide_type(x));
  check(codebook_size >= 1, "codebook_size: expected at least 1, got ", codebook_size);
  codes = torch::stable::contiguous(codes);
  const Groups groups = group_by_code(data_of(codes), x.size(0) * x.size(1), codebook_size);
  Tensor dcodebook = torch::stable::new_empty(x, {codebook_size, x.size(2)});
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    T* rows = static_cast<T*>(dcodebook.mutable_data_ptr());
    clear_rows(rows, codebook_size * x.size(2));
    const auto emit = [rows, dim = x.size(2)](int64_t code, int64_t first, int64_t count,
                                              const double* total) {
      // rounded as the reference's float32 sums are
      for (int64_t d = 0; d < count; ++d) {
        rows[code * dim + first + d] = static_cast<T>(static_cast<Wide<T>>(total[d]));
      }
    };
    sum_pulls<T>(tokens_of<T>(x), tokens_of<T>(quantized), token_values_of<Wide<T>>(derror), groups, emit);
  });
  return dcodebook;
}

}  // namespace cpu
}  // namespace vqkernels
