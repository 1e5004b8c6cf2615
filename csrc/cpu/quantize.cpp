// The lookup of the chosen codes, and the gradient of a quantized token with respect to the token.
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

#include "../checks.h"
#include "ops.h"
#include "parallel.h"
#include "tokens.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t BLOCK_ENTRIES = 16 * 1024;  // of a block of tokens; a few such blocks fit the L2 cache

int64_t tokens_per_block(int64_t dim) {
  return BLOCK_ENTRIES / dim > TOKEN_STRIP ? BLOCK_ENTRIES / dim : TOKEN_STRIP;
}

void check_below(const int64_t* codes, int64_t count, int64_t codebook_size) {
  int64_t largest = -1;
  for (int64_t n = 0; n < count; ++n) largest = codes[n] > largest ? codes[n] : largest;
  check(largest < codebook_size, "codes: expected values below K = ", codebook_size, ", got ", largest);
}

// -------------------------------------------------------------------------------------------- gather

// The codebook's rows, dense and wide: itself where it is that, else one row at a time in `scratch`.
template <class T>
struct CodeReader {
  const T* data;  // [K, D]
  int64_t code_stride;
  int64_t dim_stride;
  int64_t dim;

  const Wide<T>* row(int64_t code, Wide<T>* scratch) const {
    const T* first = data + code * code_stride;
    if constexpr (std::is_same_v<T, Wide<T>>) {
      if (dim_stride == 1) return first;
    }
    for (int64_t d = 0; d < dim; ++d) scratch[d] = static_cast<Wide<T>>(first[d * dim_stride]);
    return scratch;
  }
};

template <class T>
void gather_into(const Tokens<const T>& x, const Tensor& codebook, const int64_t* codes, const bool* mask,
                 const Tokens<T>& quantized, Wide<T>* error) {
  struct Scratch {
    Buffer<Wide<T>> x, quantized;
  };
  const TrainingLoops<Wide<T>>& loops = training_loops<Wide<T>>();
  const int64_t dim = x.dim, step = tokens_per_block(dim);
  const CodeReader<T> book{static_cast<const T*>(codebook.const_data_ptr()), codebook.stride(0),
                           codebook.stride(1), dim};
  for_each_item<Scratch>(
      ceil_div(x.count(), step), 8.0 * x.count() * dim,
      [&] { return Scratch{Buffer<Wide<T>>(step * dim), Buffer<Wide<T>>(step * dim)}; },
      [&](int64_t item, Scratch& scratch) {
        const int64_t begin = item * step, end = x.count() - begin < step ? x.count() : begin + step;
        const auto tokens = read_rows(x, begin, end, scratch.x.get());
        const auto out = rows_to_write(quantized, begin, scratch.quantized.get());
        for (int64_t n = begin; n < end; ++n) {
          Wide<T>* row = out[n - begin];
          if (codes[n] < 0) {
            const Wide<T> filler =
                mask != nullptr && !mask[n] ? Wide<T>(0) : std::numeric_limits<Wide<T>>::quiet_NaN();
            for (int64_t d = 0; d < dim; ++d) row[d] = filler;
            error[n] = filler;
          } else {
            error[n] = loops.copy_code(book.row(codes[n], row), tokens[n - begin], dim, row);
          }
        }
        if (out.data == scratch.quantized.get()) store_rows(quantized, begin, end, out.data);
      });
}

// ------------------------------------------------------------------------------------------ backward

template <class T>
struct BackwardViews {
  Tokens<const T> x;
  Tokens<const T> quantized;
  Tokens<const T> dquantized;  // data null: zero
  TokenValues<Wide<T>> derror;
  Tokens<T> dx;
  const int64_t* codes;  // [N]
  const bool* mask;      // [N] or null
  bool rotation;
};

template <class W>
void backward_token(const TrainingLoops<W>& loops, const W* x, const W* quantized, const W* dquantized,
                    int64_t dim, W pull, bool rotation, W* dx) {
  const bool turns = rotation && dquantized != nullptr;
  (turns ? loops.rotation : loops.straight_through)(x, quantized, dquantized, dim, pull, dx);
}

template <class W>
void pass_through(const W* dquantized, int64_t dim, W* dx) {  // null: zero
  for (int64_t d = 0; d < dim; ++d) dx[d] = dquantized == nullptr ? W(0) : dquantized[d];
}

template <class T>
void backward_into(const BackwardViews<T>& views) {
  using W = Wide<T>;
  struct Scratch {
    Buffer<W> x, quantized, dquantized, dx;
  };
  const TrainingLoops<W>& loops = training_loops<W>();
  const int64_t dim = views.x.dim, total = views.x.count(), step = tokens_per_block(dim);
  const auto make = [&] {
    return Scratch{Buffer<W>(step * dim), Buffer<W>(step * dim), Buffer<W>(step * dim),
                   Buffer<W>(step * dim)};
  };
  for_each_item<Scratch>(
      ceil_div(total, step), 16.0 * total * dim, make, [&](int64_t item, Scratch& scratch) {
        const int64_t begin = item * step, end = total - begin < step ? total : begin + step;
        const bool given = views.dquantized.data != nullptr;
        const auto x = read_rows(views.x, begin, end, scratch.x.get());
        const auto quantized = read_rows(views.quantized, begin, end, scratch.quantized.get());
        RowBlock<const W> dquantized{nullptr, 0};
        if (given) dquantized = read_rows(views.dquantized, begin, end, scratch.dquantized.get());
        const auto dx = rows_to_write(views.dx, begin, scratch.dx.get());
        for (int64_t i = 0; i < end - begin; ++i) {
          const int64_t n = begin + i;
          const W* gradient = given ? dquantized[i] : nullptr;
          if (views.mask != nullptr && !views.mask[n]) {
            pass_through<W>(nullptr, dim, dx[i]);
          } else if (views.codes[n] < 0) {
            pass_through(gradient, dim, dx[i]);
          } else {
            backward_token(loops, x[i], quantized[i], gradient, dim, W(2) * views.derror[n], views.rotation,
                           dx[i]);
          }
        }
        if (dx.data == scratch.dx.get()) store_rows(views.dx, begin, end, dx.data);
      });
}

std::tuple<Tensor, Tensor> look_up(const Tensor& x, const Tensor& codebook, const Tensor& codes,
                                   const bool* mask) {
  Tensor quantized = torch::stable::empty_like(x);
  Tensor error = torch::stable::new_empty(x, {x.size(0), x.size(1)}, wide_type(x));
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    gather_into<T>(tokens_of<T>(x), codebook, static_cast<const int64_t*>(codes.const_data_ptr()), mask,
                   mutable_tokens_of<T>(quantized), static_cast<Wide<T>*>(error.mutable_data_ptr()));
  });
  return {quantized, error};
}

}  // namespace

std::tuple<Tensor, Tensor> gather(Tensor x, Tensor codebook, Tensor codes) {
  check_tokens(x, "x");
  check_codebook(codebook, x);
  check_codes(codes, x);
  codes = torch::stable::contiguous(codes);
  check_below(static_cast<const int64_t*>(codes.const_data_ptr()), x.size(0) * x.size(1), codebook.size(0));
  return look_up(x, codebook, codes, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> quantize(Tensor x, Tensor codebook, std::optional<Tensor> mask,
                                            bool cosine, bool exact) {
  auto [codes, distance] = nearest(x, codebook, cosine, exact);
  const DenseMask real(mask, x);
  if (real.get() != nullptr) {
    int64_t* chosen = static_cast<int64_t*>(codes.mutable_data_ptr());
    const int64_t count = x.size(0) * x.size(1);
    for (int64_t n = 0; n < count; ++n) chosen[n] = real.get()[n] ? chosen[n] : -1;
  }
  auto [quantized, error] = look_up(x, codebook, codes, real.get());
  return {quantized, codes, error};
}

Tensor quantize_backward(Tensor x, Tensor quantized, Tensor codes, std::optional<Tensor> dquantized,
                         std::optional<Tensor> derror, bool rotation, std::optional<Tensor> mask) {
  check_tokens(x, "x");
  check_tokens_like(quantized, "quantized", x);
  if (dquantized.has_value()) check_tokens_like(*dquantized, "dquantized", x);
  check_codes(codes, x);
  if (derror.has_value()) check_token_values(*derror, "derror", x, wide_type(x));
  const DenseMask real(mask, x);
  codes = torch::stable::contiguous(codes);
  Tensor dx = torch::stable::empty_like(x);
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    Tokens<const T> none = tokens_of<T>(x);
    none.data = nullptr;
    backward_into<T>({tokens_of<T>(x), tokens_of<T>(quantized),
                      dquantized.has_value() ? tokens_of<T>(*dquantized) : none,
                      derror.has_value() ? token_values_of<Wide<T>>(*derror) : TokenValues<Wide<T>>{},
                      mutable_tokens_of<T>(dx), static_cast<const int64_t*>(codes.const_data_ptr()),
                      real.get(), rotation});
  });
  return dx;
}

}  // namespace cpu
}  // namespace vqkernels
