// Statistics and moving average in one: the sum of a code's tokens is made where it is used, and no array of
// sums goes through memory.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../checks.h"
#include "ema.h"
#include "groups.h"
#include "ops.h"
#include "parallel.h"
#include "tokens.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {
namespace {

template <class W>
struct State {
  W* codebook;      // [K, D]
  W* cluster_size;  // [K]
  W* embed_sum;     // [K, D]
  int64_t size;
  int64_t dim;

  double update_sizes(const EmaStep& step, const Groups& groups) const {
    const CodeTokens tokens = groups.tokens();
    return sum_of_blocks(size, [&](int64_t begin, int64_t end) {
      W counts[SIZES_BLOCK];
      std::fill(counts, counts + (end - begin), W(0));
      for (int64_t g = groups.from(begin); g < tokens.used && tokens.code_of(g) < end; ++g) {
        counts[tokens.code_of(g) - begin] = static_cast<W>(tokens.size_of(g));
      }
      return training_loops<W>().learn_sizes(step, counts, nullptr, end - begin, cluster_size + begin);
    });
  }

  void update_rows(const EmaStep& step, const Tokens<const W>& x, const Groups& groups) const {
    struct Scratch {
      std::vector<double> total;
      std::vector<W> sum;
    };
    const TrainingLoops<W>& loops = training_loops<W>();
    const CodeTokens tokens = groups.tokens();
    const double cost = (4.0 * tokens.count + 8.0 * size) * dim;
    const int64_t grain = codes_at_a_time(size, cost);
    for_each_item<Scratch>(
        ceil_div(size, grain), cost, [&] { return Scratch{std::vector<double>(dim), std::vector<W>(dim)}; },
        [&](int64_t item, Scratch& scratch) {
          const int64_t begin = item * grain, end = std::min(size, begin + grain);
          loops.learn_codes(step, cluster_size, x.data, x.spacing(), tokens, groups.from(begin), begin, end,
                            dim, scratch.total.data(), scratch.sum.data(), embed_sum, codebook);
        });
  }
};

// Tokens of another layout or type than the rows': sums as an array.
void step_with_sums(const Tensor& x, const Tensor& codes, const Tensor& codebook, const Tensor& cluster_size,
                    const Tensor& embed_sum, double decay, double eps, bool normalize, bool plain) {
  const auto [counts, sums] = codebook_stats(x, codes, codebook.size(0));
  const Tensor revive = torch::stable::new_zeros(x, {codebook.size(0)}, ScalarType::Bool);
  ema_update_(codebook, cluster_size, embed_sum, counts, sums, revive, decay, eps, 1.0, normalize, plain,
              false);
}

template <class W>
bool sums_in_place(const Tokens<const W>& x) {
  return usable_as_rows(x) && (x.length_stride >= x.dim_stride || x.length <= 1);
}

template <class W>
void step_in_place(const Tokens<const W>& x, const int64_t* codes, const State<W>& state, double decay,
                   double eps, bool normalize, bool plain) {
  const Groups groups = group_by_code(codes, x.count(), state.size);
  if (groups.tokens().count == 0) return;
  EmaStep step{decay, eps, 1.0, 1.0, normalize};
  step.preserve = preserved(state.update_sizes(step, groups), state.size, eps, plain);
  state.update_rows(step, x, groups);
}

}  // namespace

void ema_step_(Tensor x, Tensor codes, Tensor codebook, Tensor cluster_size, Tensor embed_sum, double decay,
               double eps, bool normalize, bool plain) {
  check_tokens(x, "x");
  check_codes(codes, x);
  check_codebook_state(codebook, cluster_size, embed_sum);
  check_type(codebook, "codebook", wide_type(x));
  check_size(codebook, "codebook", 1, x.size(2), "D of x");
  codes = torch::stable::contiguous(codes);
  const auto step = [&](auto number) {
    using W = decltype(number);
    if (x.scalar_type() != codebook.scalar_type() || !sums_in_place(tokens_of<W>(x))) {
      return step_with_sums(x, codes, codebook, cluster_size, embed_sum, decay, eps, normalize, plain);
    }
    const State<W> state{static_cast<W*>(codebook.mutable_data_ptr()),
                         static_cast<W*>(cluster_size.mutable_data_ptr()),
                         static_cast<W*>(embed_sum.mutable_data_ptr()), codebook.size(0), codebook.size(1)};
    step_in_place(tokens_of<W>(x), static_cast<const int64_t*>(codes.const_data_ptr()), state, decay, eps,
                  normalize, plain);
  };
  codebook.scalar_type() == ScalarType::Double ? step(double{}) : step(float{});
}

}  // namespace cpu
}  // namespace vqkernels
