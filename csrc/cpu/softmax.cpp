// Softmax over all codes, streamed: its log-sum-exp, entropy, mean and gradients, and samples, without ever
// holding tokens x codes. What each computes is said in vqkernels/ops; in short
//
//   l_nk = scale <x_n, c_k> + bias_k     p_n = softmax_k(l_n)
//
// float32 runs on the instruction set's own loops, float64 on the portable ones.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "../checks.h"
#include "kernel_table.h"
#include "ops.h"
#include "parallel.h"
#include "softmax_blocks.h"
#include "tokens.h"

namespace vqkernels {
namespace cpu {
namespace {

const SoftmaxTable<float>& table_for(float) {
  const char* name = kernels().name;
  if (std::strcmp(name, "avx512") == 0) return *avx512_softmax();
  if (std::strcmp(name, "avx2") == 0) return *avx2_softmax();
  return *portable_softmax();
}
const SoftmaxTable<double>& table_for(double) { return *float64_softmax(); }

// ------------------------------------------------------------------------------------------- checks

using MaybeTensor = std::optional<Tensor>;

void check_vector(const Tensor& tensor, const char* name, const Tensor& codebook) {
  check_rank(tensor, name, 1, "[K]");
  check_like(tensor, name, codebook, "codebook");
  check_size(tensor, name, 0, codebook.size(0), "K of codebook");
}

void check_per_token(const Tensor& tensor, const char* name, const Tensor& x) {
  check_rank(tensor, name, 2, "[B, T]");
  check_like(tensor, name, x, "x");
  check_size(tensor, name, 0, x.size(0), "B of x");
  check_size(tensor, name, 1, x.size(1), "T of x");
}

void check_call(const Tensor& x, const Tensor& codebook, const MaybeTensor& bias) {
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

MaybeTensor contiguous(const MaybeTensor& tensor) {
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
                            const MaybeTensor& dcode_sums, double scale) {
  const int64_t tokens = x.size(0) * x.size(1);
  return {table_for(Word{}),
          tokens_of<Word>(x),
          numbers<Word>(codebook),
          numbers<Word>(bias),
          numbers<Word>(dcode_sums),
          codebook.size(0),
          scale,
          plan_softmax(tokens, codebook.size(0), x.size(2))};
}

template <class Word>
constexpr Word NOT_A_NUMBER = std::numeric_limits<Word>::quiet_NaN();

// ------------------------------------------------------------------------------------------ forward

// 2^(a - b), where both may be -inf.
double ratio(double a, double b) { return a == b ? 1.0 : std::exp2(a - b); }

// lse and entropy of one token from those of its chunks: m, s and u of `fold`, `stride` apart.
template <class Word>
void join_chunks(const double* maximum, const double* sum, const double* moment, int64_t chunks,
                 int64_t stride, Word* lse, Word* entropy) {
  double top = -std::numeric_limits<double>::infinity(), s = 0.0, u = 0.0;
  for (int64_t i = 0; i < chunks; ++i) top = maximum[i * stride] > top ? maximum[i * stride] : top;
  for (int64_t i = 0; i < chunks; ++i) {
    const double m = maximum[i * stride], factor = ratio(m, top);
    s += factor * sum[i * stride];
    u += factor * moment[i * stride];
    if (factor != 0.0 && m != top) u += factor * (m - top) * sum[i * stride];
  }
  *lse = static_cast<Word>(LOG_2 * (top + std::log2(s)));
  *entropy = static_cast<Word>(LOG_2 * (std::log2(s) - u / s));
}

template <class Word>
void forward(const SoftmaxCall<Word>& call, Word* lse, Word* entropy) {  // [N] each
  call.for_strips([&](int64_t begin, int64_t count) {
    const TokenStrip<Word> strip = call.pack_tokens(begin, count, nullptr);
    const int64_t chunks = call.plan.chunks;
    std::vector<double> maximum(chunks * count, -std::numeric_limits<double>::infinity());
    std::vector<double> sum(chunks * count, 0.0), moment(chunks * count, 0.0);
    call.for_blocks(strip, 1.0, false, [&](const SoftmaxVisit<Word>& place) {
      const int64_t at = place.chunk * count + place.token;
      call.table.fold(place.block, maximum.data() + at, sum.data() + at, moment.data() + at);
    });
    for (int64_t n = 0; n < count; ++n) {
      if (strip.finite[n]) {
        join_chunks(&maximum[n], &sum[n], &moment[n], chunks, count, lse + begin + n, entropy + begin + n);
      } else {
        lse[begin + n] = entropy[begin + n] = NOT_A_NUMBER<Word>;
      }
    }
  });
}

// ---------------------------------------------------------------------------------------- code sums

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

template <class Word>
void code_sums(const SoftmaxCall<Word>& call, const Word* lse, const Word* weight,
               Word* out) {  // [N], [N], [K]
  GroupSums sums(call.plan.groups, call.padded_codes());
  call.for_strips([&](int64_t begin, int64_t count) {
    const TokenStrip<Word> strip = call.pack_tokens(begin, count, lse);
    for (int64_t n = 0; n < count; ++n) strip.weight[n] = strip.finite[n] ? weight[begin + n] : Word(0);
    call.for_blocks(strip, 1.0, false, [&](const SoftmaxVisit<Word>& place) {
      call.table.code_sums(place.block, strip.terms(place.token), sums.at(place.group, place.code));
    });
  });
  for (int64_t k = 0; k < call.codes; ++k) out[k] = static_cast<Word>(sums.total(k));
}

// ----------------------------------------------------------------------------------------- backward

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

  void run_strip(const TokenStrip<Word>& strip, Word* rows, GroupSums& sums) const {
    const bool codes_too = dcodebook != nullptr, first = strip.begin == 0;
    const int64_t words = call.plan.block * dim();
    const Buffer<Word> partial(call.plan.chunks * strip.count * dim());
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
    if (codes_too && (groups > 1 || call.x.count() == 0)) {
      Word* all = call.x.count() == 0 ? dcodebook : rows;
      for (int64_t i = 0; i < numbers * (call.x.count() == 0 ? 1 : groups); ++i) all[i] = Word(0);
    }
    GroupSums sums(groups, codes_too ? call.padded_codes() : 0);
    call.for_strips([&](int64_t begin, int64_t count) {
      const TokenStrip<Word> strip = pack(begin, count);
      subtract_means(strip);
      run_strip(strip, rows, sums);
    });
    if (!codes_too) return;
    if (groups > 1) add_groups(rows);
    for (int64_t k = 0; k < call.codes; ++k) dbias[k] = static_cast<Word>(sums.total(k));
  }
};

// ------------------------------------------------------------------------------------------- sample

template <class Word>
struct SoftmaxSampler {
  SoftmaxCall<Word> call;
  const Word* lse;      // [N]
  const Word* uniform;  // [N]
  int64_t* codes;       // [N]

  // What a token still has to go within its chunk.
  struct Draw {
    int64_t chunk;
    double left;
  };

  // The chunk in which the running sum of p first exceeds uniform times all of it; the last with any p
  // otherwise.
  static Draw choose_chunk(const double* mass, int64_t chunks, int64_t stride, double uniform) {
    double all = 0.0, before = 0.0;
    for (int64_t i = 0; i < chunks; ++i) all += mass[i * stride];
    Draw draw{0, 0.0};
    for (int64_t i = 0; i < chunks; ++i) {
      if (mass[i * stride] > 0.0) draw = {i, uniform * all - before};
      before += mass[i * stride];
      if (before > uniform * all) break;
    }
    return draw;
  }

  // The first code whose running sum exceeds what is left, the last with any p if none does.
  static int64_t choose_code(const Word* p, int64_t codes, int64_t first, double* left, int64_t chosen) {
    for (int64_t k = 0; k < codes && *left >= 0.0; ++k) {
      if (p[k] > Word(0)) chosen = first + k;
      *left -= p[k];
    }
    return chosen;
  }

  std::vector<Draw> choose_chunks(const TokenStrip<Word>& strip) const {
    const int64_t chunks = call.plan.chunks, count = strip.count;
    std::vector<double> mass(chunks * count, 0.0), moment(chunks * count, 0.0);
    call.for_blocks(strip, 1.0, false, [&](const SoftmaxVisit<Word>& place) {
      const int64_t at = place.chunk * count + place.token;
      call.table.row_sums(place.block, strip.terms(place.token), place.scratch.dcode_sums.get(),
                          mass.data() + at, moment.data() + at);
    });
    std::vector<Draw> draws(count);
    for (int64_t n = 0; n < count; ++n) {
      draws[n] = choose_chunk(&mass[n], chunks, count, uniform[strip.begin + n]);
    }
    return draws;
  }

  // Tokens of a strip by the chunk they drew, in their order within it; none for a token that is not finite.
  std::vector<std::vector<int64_t>> by_chunk(const TokenStrip<Word>& strip,
                                             const std::vector<Draw>& draws) const {
    std::vector<std::vector<int64_t>> tokens(call.plan.chunks);
    for (int64_t n = 0; n < strip.count; ++n) {
      codes[strip.begin + n] = -1;
      if (strip.finite[n]) tokens[draws[n].chunk].push_back(n);
    }
    return tokens;
  }

  // Up to BLOCK_TOKENS tokens side by side, with the codes of an open block.
  void draw_from_block(const TokenStrip<Word>& strip, const int64_t* tokens, int64_t count, int64_t code,
                       int64_t code_count, SoftmaxScratch<Word>& scratch, const Buffer<Word>& rows,
                       std::vector<Draw>& draws) const {
    const int64_t dim = call.dim();
    Word lse_here[BLOCK_TOKENS];
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(rows.get() + i * dim, strip.x.get() + tokens[i] * dim, sizeof(Word) * dim);
      lse_here[i] = strip.lse[tokens[i]];
    }
    const ScoreBlock<Word> block{scratch.scores.get(), nullptr, count,
                                 round_up(code_count, call.table.width)};
    call.table.score(rows.get(), scratch.panels.get(), scratch.bias.get(), count, block.codes, dim,
                     block.scores);
    call.table.probabilities(block, {lse_here, nullptr, nullptr, nullptr});
    for (int64_t i = 0; i < count; ++i) {
      int64_t& chosen = codes[strip.begin + tokens[i]];
      chosen =
          choose_code(block.scores + i * SCORES_STRIDE, code_count, code, &draws[tokens[i]].left, chosen);
    }
  }

  void draw_from_chunk(const TokenStrip<Word>& strip, int64_t chunk, const std::vector<int64_t>& tokens,
                       std::vector<Draw>& draws) const {
    SoftmaxScratch<Word> scratch = call.make_scratch(false, false);
    const Buffer<Word> rows(BLOCK_TOKENS * call.dim());
    const int64_t end = std::min(call.codes, (chunk + 1) * call.plan.chunk);
    std::vector<int64_t> open = tokens;
    for (int64_t code = chunk * call.plan.chunk; code < end && !open.empty(); code += call.plan.block) {
      const int64_t code_count = std::min(end - code, call.plan.block);
      call.open_block(code, code_count, scratch);
      const int64_t count = static_cast<int64_t>(open.size());
      for (int64_t first = 0; first < count; first += BLOCK_TOKENS) {
        draw_from_block(strip, open.data() + first, std::min(count - first, BLOCK_TOKENS), code, code_count,
                        scratch, rows, draws);
      }
      std::erase_if(open, [&](int64_t n) { return !(draws[n].left >= 0.0); });
    }
  }

  void run() const {
    call.for_strips([&](int64_t begin, int64_t count) {
      const TokenStrip<Word> strip = call.pack_tokens(begin, count, lse);
      std::vector<Draw> draws = choose_chunks(strip);
      const std::vector<std::vector<int64_t>> tokens = by_chunk(strip, draws);
      const double operations = call.operations(count, 1.0) / call.plan.chunks;
      for_each_range(call.plan.chunks, 1, operations,
                     [&](int64_t chunk, int64_t) { draw_from_chunk(strip, chunk, tokens[chunk], draws); });
    });
  }
};

}  // namespace

// ---------------------------------------------------------------------------------------------- ops

std::tuple<Tensor, Tensor> softmax_forward(Tensor x, Tensor codebook, MaybeTensor bias, double scale) {
  check_call(x, codebook, bias);
  codebook = torch::stable::contiguous(codebook);
  bias = contiguous(bias);
  Tensor lse = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor entropy = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  dispatch_word(x, [&](auto word) {
    using Word = decltype(word);
    forward(make_call<Word>(x, codebook, bias, std::nullopt, scale), results<Word>(lse),
            results<Word>(entropy));
  });
  return {lse, entropy};
}

Tensor softmax_code_sums(Tensor x, Tensor codebook, MaybeTensor bias, double scale, Tensor lse,
                         Tensor weight) {
  check_call(x, codebook, bias);
  check_per_token(lse, "lse", x);
  check_per_token(weight, "weight", x);
  codebook = torch::stable::contiguous(codebook);
  bias = contiguous(bias);
  lse = torch::stable::contiguous(lse);
  weight = torch::stable::contiguous(weight);
  Tensor sums = torch::stable::new_empty(x, {codebook.size(0)});
  dispatch_word(x, [&](auto word) {
    using Word = decltype(word);
    code_sums(make_call<Word>(x, codebook, bias, std::nullopt, scale), numbers<Word>(lse),
              numbers<Word>(weight), results<Word>(sums));
  });
  return sums;
}

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
    SoftmaxGradient<Word>{make_call<Word>(x, codebook, bias, dcode_sums, scale),
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

Tensor softmax_sample(Tensor x, Tensor codebook, MaybeTensor bias, double scale, Tensor lse, Tensor uniform) {
  check_call(x, codebook, bias);
  check_per_token(lse, "lse", x);
  check_per_token(uniform, "uniform", x);
  codebook = torch::stable::contiguous(codebook);
  bias = contiguous(bias);
  lse = torch::stable::contiguous(lse);
  uniform = torch::stable::contiguous(uniform);
  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
  dispatch_word(x, [&](auto word) {
    using Word = decltype(word);
    SoftmaxSampler<Word>{make_call<Word>(x, codebook, bias, std::nullopt, scale), numbers<Word>(lse),
                         numbers<Word>(uniform), results<int64_t>(codes)}
        .run();
  });
  return codes;
}

}  // namespace cpu
}  // namespace vqkernels
