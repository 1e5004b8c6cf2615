// What the ops of the streaming softmax share: their table, argument checks and the call they make of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "../checks.h"
#include "kernel_table.h"
#include "softmax_blocks.h"
#include "tokens.h"

namespace vqkernels {
namespace cpu {

inline const SoftmaxTable<float>& table_for(float) {
  const char* name = kernels().name;
  if (std::strcmp(name, "avx512") == 0) return *avx512_softmax();
  if (std::strcmp(name, "avx2") == 0) return *avx2_softmax();
  return *portable_softmax();
}
inline const SoftmaxTable<double>& table_for(double) { return *float64_softmax(); }

using MaybeTensor = std::optional<Tensor>;

inline void check_vector(const Tensor& tensor, const char* name, const Tensor& codebook) {
  check_rank(tensor, name, 1, "[K]");
  check_like(tensor, name, codebook, "codebook");
  check_size(tensor, name, 0, codebook.size(0), "K of codebook");
}

inline void check_per_token(const Tensor& tensor, const char* name, const Tensor& x) {
  check_rank(tensor, name, 2, "[B, T]");
  check_like(tensor, name, x, "x");
  check_size(tensor, name, 0, x.size(0), "B of x");
  check_size(tensor, name, 1, x.size(1), "T of x");
}

inline void check_call(const Tensor& x, const Tensor& codebook, const MaybeTensor& bias) {
  check_rank(x, "x", 3, "[B, T, D]");
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
        "x: expected float32 or float64, got ", x.scalar_type());
  check(x.size(2) >= 1, "x: expected D >= 1, got shape ", shape_of(x));
  check_codebook(codebook, x);
  if (bias) check_vector(*bias, "bias", codebook);
}

// Calls f(Word{}).
template <class F>
auto dispatch_word(const Tensor& x, const F& f) {
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

inline MaybeTensor contiguous(const MaybeTensor& tensor) {
  return tensor ? MaybeTensor(torch::stable::contiguous(*tensor)) : tensor;
}

template <class Word>
const Word* numbers(const MaybeTensor& tensor) {
  return tensor ? static_cast<const Word*>(tensor->const_data_ptr()) : nullptr;
}

template <class Word>
Word* results(const Tensor& tensor) {
  return static_cast<Word*>(tensor.mutable_data_ptr());
}

template <class Word>
SoftmaxCall<Word> make_call(const Tensor& x, const Tensor& codebook, const MaybeTensor& bias,
                            const MaybeTensor& dcode_sums, double scale, bool twice = false) {
  const int64_t tokens = x.size(0) * x.size(1);
  return {table_for(Word{}),
          tokens_of<Word>(x),
          numbers<Word>(codebook),
          numbers<Word>(bias),
          numbers<Word>(dcode_sums),
          codebook.size(0),
          scale,
          plan_softmax(tokens, codebook.size(0), x.size(2), twice)};
}

template <class Word>
inline constexpr Word NOT_A_NUMBER = std::numeric_limits<Word>::quiet_NaN();

// Sums over tokens, one set a group of tokens.
class GroupSums {
 public:
  GroupSums(int64_t groups, int64_t codes) : codes_(codes), groups_(groups), sums_(groups * codes, 0.0) {}
  double* at(int64_t group, int64_t code) { return sums_.data() + group * codes_ + code; }
  double total(int64_t code) const {
    double sum = 0.0;
    for (int64_t group = 0; group < groups_; ++group) sum += sums_[group * codes_ + code];
    return sum;
  }

 private:
  int64_t codes_, groups_;
  std::vector<double> sums_;  // [groups, codes]
};

}  // namespace cpu
}  // namespace vqkernels
