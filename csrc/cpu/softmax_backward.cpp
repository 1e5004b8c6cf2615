// Gradients of the streaming softmax. The logits are made twice, first for the mean of a token's f, then for
// the gradients themselves: one product for x, one for the codebook.
#include <cstdint>
#include <optional>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "softmax_call.h"

namespace vqkernels {
namespace cpu {
namespace {

template <class Word>
struct SoftmaxGradient {
  SoftmaxCall<Word> call;
  const Word* lse;                              // [N]
  const Word* dlse;                             // [N]
  const Word* dentropy;                         // [N]
  const Word* weight;                           // [N]
  std::optional<Tokens<const Word>> direction;  // [B, T, D]
  Tokens<Word> dx;                              // [B, T, D]
  Word* dcodebook;                              // [K, D] or null
  Word* dbias;                                  // [K] or null

  int64_t dim() const { return call.dim(); }

  TokenStrip<Word> pack(int64_t begin, int64_t count) const {
    TokenStrip<Word> strip = call.pack_tokens(begin, count, lse);
    if (direction) {
      strip.direction = Buffer<Word>(count * dim());
      load_rows(*direction, begin, begin + count, strip.direction.get());
    }
    for (int64_t n = 0; n < count; ++n) {
      const bool finite = strip.finite[n];
      strip.entropy[n] = finite ? static_cast<Word>(-LOG_2 * dentropy[begin + n]) : Word(0);
      strip.weight[n] = finite ? weight[begin + n] : Word(0);
      for (int64_t d = 0; d < dim() && direction && !finite; ++d) strip.direction[n * dim() + d] = Word(0);
    }
    return strip;
  }

  // constant = dlse - r. The sum of p, which is 1 but for rounding, is divided by: so the gradients of a
  // token's logits keep their sum where lse is large and its last bit is not small.
  void subtract_means(const TokenStrip<Word>& strip) const {
    const int64_t chunks = call.plan.chunks, count = strip.count;
    std::vector<double> mass(chunks * count, 0.0), moment(chunks * count, 0.0);
    call.for_blocks(
        strip, direction ? 2.0 : 1.0, direction.has_value(), [&](const SoftmaxVisit<Word>& place) {
          const int64_t at = place.chunk * count + place.token;
          call.table.row_sums(place.block, strip.terms(place.token), place.scratch.dcode_sums.get(),
                              mass.data() + at, moment.data() + at);
        });
    for (int64_t n = 0; n < count; ++n) {
      double all = 0.0, f = 0.0;
      for (int64_t i = 0; i < chunks; ++i) {
        all += mass[i * count + n];
        f += moment[i * count + n];
      }
      strip.constant[n] = strip.finite[n] ? static_cast<Word>(dlse[strip.begin + n] - f / all) : Word(0);
    }
  }

  void store_dx(const TokenStrip<Word>& strip, const Buffer<Word>& partial) const {  // [chunks, count, D]
    const int64_t numbers = strip.count * dim();
    for_each_item<Buffer<Word>>(
        ceil_div(strip.count, BLOCK_TOKENS), 1.0 * numbers * call.plan.chunks,
        [&] { return Buffer<Word>(BLOCK_TOKENS * dim()); },
        [&](int64_t item, Buffer<Word>& rows) {
          const int64_t first = item * BLOCK_TOKENS;
          const int64_t last = first + BLOCK_TOKENS < strip.count ? first + BLOCK_TOKENS : strip.count;
          for (int64_t i = first * dim(); i < last * dim(); ++i) {
            double sum = 0.0;
            for (int64_t chunk = 0; chunk < call.plan.chunks; ++chunk) sum += partial[chunk * numbers + i];
            rows[i - first * dim()] =
                strip.finite[i / dim()] ? static_cast<Word>(call.scale * sum) : NOT_A_NUMBER<Word>;
          }
          store_rows(dx, strip.begin + first, strip.begin + last, rows.get());
        });
  }

  // What every strip needs anew; fresh memory would cost more than what keeping logits saves.
  struct Store {
    Buffer<Word> partial;        // [chunks, strip, D]
    Buffer<Word> scores, along;  // see TokenStrip
  };

  Store make_store() const {
    const int64_t longest = call.plan.strip < call.x.count() ? call.plan.strip : call.x.count();
    const int64_t kept = call.plan.keep ? call.kept_numbers(longest) : 0;
    return {Buffer<Word>(call.plan.chunks * longest * dim()), Buffer<Word>(kept),
            Buffer<Word>(direction ? kept : 0)};
  }

  void run_strip(const TokenStrip<Word>& strip, const Buffer<Word>& partial, Word* rows,
                 GroupSums& sums) const {
    const bool codes_too = dcodebook != nullptr, first = strip.begin == 0;
    const int64_t words = call.plan.block * dim();
    const auto begin = [&](int64_t token, int64_t tokens, int64_t chunk) {
      Word* out = partial.get() + (chunk * strip.count + token) * dim();
      for (int64_t i = 0; i < tokens * dim(); ++i) out[i] = Word(0);
    };
    const auto open = [&](const SoftmaxVisit<Word>& place) {
      for (int64_t i = 0; i < words && codes_too; ++i) place.scratch.dpanels[i] = Word(0);
    };
    const auto visit = [&](const SoftmaxVisit<Word>& place) {
      call.table.gradients(place.block, strip.terms(place.token), place.scratch.dcode_sums.get(),
                           codes_too ? sums.at(place.group, place.code) : place.scratch.totals.get());
      call.table.add_dx(place.block, place.scratch.panels.get(), dim(),
                        partial.get() + (place.chunk * strip.count + place.token) * dim());
      if (!codes_too) return;
      call.table.add_dcodes(place.block, strip.x.get() + place.token * dim(), dim(),
                            place.scratch.dpanels.get());
    };
    // x was packed times scale / log 2
    const auto close = [&](const SoftmaxVisit<Word>& place) {
      if (!codes_too) return;
      Word* out = rows + (place.group * call.codes + place.code) * dim();
      call.table.unpack_codes(place.scratch.dpanels.get(), place.codes, dim(), static_cast<Word>(LOG_2),
                              !first, out);
    };
    const double products = 2.0 + (direction ? 1.0 : 0.0) + (codes_too ? 1.0 : 0.0);
    call.for_blocks(strip, products, direction.has_value(), codes_too, begin, open, visit, close);
    store_dx(strip, partial);
  }

  void add_groups(const Word* rows) const {  // [groups, K, D]
    const int64_t numbers = call.codes * dim(), groups = call.plan.groups;
    for_each_range(numbers, 1 << 14, 1.0 * numbers * groups, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double sum = 0.0;
        for (int64_t group = 0; group < groups; ++group) sum += rows[group * numbers + i];
        dcodebook[i] = static_cast<Word>(sum);
      }
    });
  }

  void run() const {
    const bool codes_too = dcodebook != nullptr;
    const int64_t numbers = codes_too ? call.codes * dim() : 0, groups = call.plan.groups;
    const Buffer<Word> apart(groups > 1 ? groups * numbers : 0);
    Word* rows = groups > 1 ? apart.get() : dcodebook;
    if (call.x.count() == 0) {  // else the first strip writes every row of every group
      for (int64_t i = 0; i < numbers; ++i) dcodebook[i] = Word(0);
    }
    const Store store = make_store();
    GroupSums sums(groups, codes_too ? call.padded_codes() : 0);
    call.for_strips([&](int64_t begin, int64_t count) {
      TokenStrip<Word> strip = pack(begin, count);
      strip.scores = store.scores.get();
      strip.along = store.along.get();
      subtract_means(strip);
      strip.scored = call.plan.keep;
      run_strip(strip, store.partial, rows, sums);
    });
    if (!codes_too) return;
    if (groups > 1) add_groups(rows);
    for (int64_t k = 0; k < call.codes; ++k) dbias[k] = static_cast<Word>(sums.total(k));
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> softmax_backward(Tensor x, Tensor codebook, MaybeTensor bias, double scale,
                                                    Tensor lse, Tensor dlse, Tensor dentropy, Tensor weight,
                                                    MaybeTensor dcode_sums, MaybeTensor direction,
                                                    bool need_codebook) {
  check_call(x, codebook, bias);
  check_per_token(lse, "lse", x);
  check_per_token(dlse, "dlse", x);
  check_per_token(dentropy, "dentropy", x);
  check_per_token(weight, "weight", x);
  if (dcode_sums) check_vector(*dcode_sums, "dcode_sums", codebook);
  if (direction) check_tokens_like(*direction, "direction", x);
  codebook = torch::stable::contiguous(codebook);
  bias = contiguous(bias);
  dcode_sums = contiguous(dcode_sums);
  lse = torch::stable::contiguous(lse);
  dlse = torch::stable::contiguous(dlse);
  dentropy = torch::stable::contiguous(dentropy);
  weight = torch::stable::contiguous(weight);
  const int64_t codes = need_codebook ? codebook.size(0) : 0;
  Tensor dx = torch::stable::empty_like(x);
  Tensor dcodebook = torch::stable::new_empty(x, {codes, x.size(2)});
  Tensor dbias = torch::stable::new_empty(x, {codes});
  dispatch_word(x, [&](auto word) {
    using Word = decltype(word);
    SoftmaxGradient<Word>{make_call<Word>(x, codebook, bias, dcode_sums, scale, true),
                          numbers<Word>(lse),
                          numbers<Word>(dlse),
                          numbers<Word>(dentropy),
                          numbers<Word>(weight),
                          direction ? std::optional(tokens_of<Word>(*direction)) : std::nullopt,
                          mutable_tokens_of<Word>(dx),
                          need_codebook ? results<Word>(dcodebook) : nullptr,
                          need_codebook ? results<Word>(dbias) : nullptr}
        .run();
  });
  return {dx, dcodebook, dbias};
}

}  // namespace cpu
}  // namespace vqkernels
