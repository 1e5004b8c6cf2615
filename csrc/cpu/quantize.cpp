// The lookup of the chosen codes, and the gradient of a quantized token with respect to the token.
#include <cmath>
#include <cstdint>
#include <limits>

#include "../checks.h"
#include "ops.h"
#include "parallel.h"
#include "tokens.h"

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

// Sum of term(d) over [0, dim): eight partial sums, added in a fixed order.
template <class Value, class Term>
Value sum_terms(int64_t dim, const Term& term) {
  constexpr int PARTS = 8;
  Value parts[PARTS] = {};
  int64_t d = 0;
  for (; d + PARTS <= dim; d += PARTS) {
    for (int i = 0; i < PARTS; ++i) parts[i] += term(d + i);
  }
  Value sum = 0;
  for (; d < dim; ++d) sum += term(d);
  for (int i = 0; i < PARTS; ++i) sum += parts[i];
  return sum;
}

// -------------------------------------------------------------------------------------------- gather

template <class T>
void copy_code(const T* code, int64_t stride, int64_t dim, Wide<T>* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<Wide<T>>(code[d * stride]);
}

template <class T>
Wide<T> squared_error(const Wide<T>* x, const Wide<T>* quantized, int64_t dim) {
  return sum_terms<Wide<T>>(dim, [&](int64_t d) {
    const Wide<T> difference = x[d] - quantized[d];
    return difference * difference;
  });
}

template <class T>
void gather_into(const Tokens<const T>& x, const Tensor& codebook, const int64_t* codes,
                 const Tokens<T>& quantized, Wide<T>* error) {
  struct Scratch {
    Buffer<Wide<T>> x, quantized;
  };
  const T* book = static_cast<const T*>(codebook.const_data_ptr());
  const int64_t code_stride = codebook.stride(0), dim_stride = codebook.stride(1), dim = x.dim;
  const int64_t step = tokens_per_block(dim);
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
            for (int64_t d = 0; d < dim; ++d) row[d] = std::numeric_limits<Wide<T>>::quiet_NaN();
            error[n] = std::numeric_limits<Wide<T>>::quiet_NaN();
          } else {
            copy_code(book + codes[n] * code_stride, dim_stride, dim, row);
            error[n] = squared_error<T>(tokens[n - begin], row, dim);
          }
        }
        if (out.data == scratch.quantized.get()) store_rows(quantized, begin, end, out.data);
      });
}

// ------------------------------------------------------------------------------------------ backward

// One token of the backward pass.
template <class W>
struct TokenGradient {
  const W* x;           // [D]
  const W* quantized;   // [D]
  const W* dquantized;  // [D]
  W* dx;                // [D]
  int64_t dim;
  W pull;  // 2 derror

  // dx = dquantized + 2 derror (x - quantized)
  void straight_through() const {
    for (int64_t d = 0; d < dim; ++d) dx[d] = dquantized[d] + pull * (x[d] - quantized[d]);
  }

  // With u = x/|x|, v = q/|q|, w = (u + v)/|u + v|, lambda = |q|/|x| (Fifty et al. 2024, section 4.1):
  // dx = lambda (g - 2 (g.w) w + 2 (g.v) u) + 2 derror (x - q)
  void rotation() const {
    const double x_norm = std::sqrt(sum_terms<double>(dim, [&](int64_t d) { return double(x[d]) * x[d]; }));
    const double q_norm =
        std::sqrt(sum_terms<double>(dim, [&](int64_t d) { return double(quantized[d]) * quantized[d]; }));
    if (x_norm == 0.0 || q_norm == 0.0) return straight_through();
    const double to_u = 1.0 / x_norm, to_v = 1.0 / q_norm;
    const auto bisector = [&](int64_t d) { return x[d] * to_u + quantized[d] * to_v; };
    const double square = sum_terms<double>(dim, [&](int64_t d) { return bisector(d) * bisector(d); });
    const double along_bisector =
        sum_terms<double>(dim, [&](int64_t d) { return dquantized[d] * bisector(d); });
    const double along_v =
        sum_terms<double>(dim, [&](int64_t d) { return dquantized[d] * (quantized[d] * to_v); });
    const double reflect = square < 1e-12 ? 0.0 : 2.0 * along_bisector / square;
    const double scale = q_norm * to_u;
    for (int64_t d = 0; d < dim; ++d) {
      const double turned = dquantized[d] - reflect * bisector(d) + 2.0 * along_v * (x[d] * to_u);
      dx[d] = static_cast<W>(scale * turned + pull * (x[d] - quantized[d]));
    }
  }
};

template <class T>
struct BackwardViews {
  Tokens<const T> x;
  Tokens<const T> quantized;
  Tokens<const T> dquantized;
  Tokens<T> dx;
};

template <class T>
void backward_into(const BackwardViews<T>& views, const int64_t* codes, const Wide<T>* derror,
                   bool rotation) {
  using W = Wide<T>;
  struct Scratch {
    Buffer<W> x, quantized, dquantized, dx;
  };
  const int64_t dim = views.x.dim, total = views.x.count(), step = tokens_per_block(dim);
  const auto make = [&] {
    return Scratch{Buffer<W>(step * dim), Buffer<W>(step * dim), Buffer<W>(step * dim),
                   Buffer<W>(step * dim)};
  };
  for_each_item<Scratch>(
      ceil_div(total, step), 16.0 * total * dim, make, [&](int64_t item, Scratch& scratch) {
        const int64_t begin = item * step, end = total - begin < step ? total : begin + step;
        const auto x = read_rows(views.x, begin, end, scratch.x.get());
        const auto quantized = read_rows(views.quantized, begin, end, scratch.quantized.get());
        const auto dquantized = read_rows(views.dquantized, begin, end, scratch.dquantized.get());
        const auto dx = rows_to_write(views.dx, begin, scratch.dx.get());
        for (int64_t i = 0; i < end - begin; ++i) {
          const W pull = W(2) * derror[begin + i];
          const TokenGradient<W> token{x[i], quantized[i], dquantized[i], dx[i], dim, pull};
          if (codes[begin + i] < 0) {
            for (int64_t d = 0; d < dim; ++d) token.dx[d] = token.dquantized[d];
          } else if (rotation) {
            token.rotation();
          } else {
            token.straight_through();
          }
        }
        if (dx.data == scratch.dx.get()) store_rows(views.dx, begin, end, dx.data);
      });
}

}  // namespace

std::tuple<Tensor, Tensor> gather(Tensor x, Tensor codebook, Tensor codes) {
  check_tokens(x, "x");
  check_codebook(codebook, x);
  check_codes(codes, x);
  codes = torch::stable::contiguous(codes);
  const int64_t* chosen = static_cast<const int64_t*>(codes.const_data_ptr());
  check_below(chosen, x.size(0) * x.size(1), codebook.size(0));
  Tensor quantized = torch::stable::empty_like(x);
  Tensor error = torch::stable::new_empty(x, {x.size(0), x.size(1)}, wide_type(x));
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    gather_into<T>(tokens_of<T>(x), codebook, chosen, mutable_tokens_of<T>(quantized),
                   static_cast<Wide<T>*>(error.mutable_data_ptr()));
  });
  return {quantized, error};
}

Tensor quantize_backward(Tensor x, Tensor quantized, Tensor codes, Tensor dquantized, Tensor derror,
                         bool rotation) {
  check_tokens(x, "x");
  check_tokens_like(quantized, "quantized", x);
  check_tokens_like(dquantized, "dquantized", x);
  check_codes(codes, x);
  check_rank(derror, "derror", 2, "[B, T]");
  check_type(derror, "derror", wide_type(x));
  check_size(derror, "derror", 0, x.size(0), "B of x");
  check_size(derror, "derror", 1, x.size(1), "T of x");
  codes = torch::stable::contiguous(codes);
  derror = torch::stable::contiguous(derror);
  Tensor dx = torch::stable::empty_like(x);
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const BackwardViews<T> views{tokens_of<T>(x), tokens_of<T>(quantized), tokens_of<T>(dquantized),
                                 mutable_tokens_of<T>(dx)};
    backward_into<T>(views, static_cast<const int64_t*>(codes.const_data_ptr()),
                     static_cast<const Wide<T>*>(derror.const_data_ptr()), rotation);
  });
  return dx;
}

}  // namespace cpu
}  // namespace vqkernels
