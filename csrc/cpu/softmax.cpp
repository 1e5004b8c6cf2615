// Softmax over all codes, streamed: its log-sum-exp, entropy and sums by code, and samples, without ever
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

#include "ops.h"
#include "parallel.h"
#include "softmax_call.h"

namespace vqkernels {
namespace cpu {
namespace {

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

// ------------------------------------------------------------------------------------------- sample

template <class Word>
struct SoftmaxSampler {
  SoftmaxCall<Word> call;
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

  // In units of the token's largest score, which stands in for its lse: at scores of 1e9 the rounding of lse
  // is far more than all that separates the likely codes, and every p could vanish beside it.
  std::vector<Draw> choose_chunks(TokenStrip<Word>& strip) const {
    const int64_t chunks = call.plan.chunks, count = strip.count;
    std::vector<double> maximum(chunks * count, -std::numeric_limits<double>::infinity());
    std::vector<double> mass(chunks * count, 0.0), moment(chunks * count, 0.0);
    call.for_blocks(strip, 1.0, false, [&](const SoftmaxVisit<Word>& place) {
      const int64_t at = place.chunk * count + place.token;
      call.table.fold(place.block, maximum.data() + at, mass.data() + at, moment.data() + at);
    });
    std::vector<Draw> draws(count);
    for (int64_t n = 0; n < count; ++n) {
      double top = -std::numeric_limits<double>::infinity();
      for (int64_t i = 0; i < chunks; ++i) top = std::max(top, maximum[i * count + n]);
      for (int64_t i = 0; i < chunks; ++i) mass[i * count + n] *= ratio(maximum[i * count + n], top);
      draws[n] = choose_chunk(&mass[n], chunks, count, uniform[strip.begin + n]);
      strip.lse[n] = static_cast<Word>(top);
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
    const ScoreBlock<Word> block{scratch.scores.get(), nullptr, call.plan.stride(), count,
                                 round_up(code_count, call.table.width)};
    call.table.score(rows.get(), scratch.panels.get(), scratch.bias.get(), count, block.codes, dim,
                     block.scores, block.stride);
    call.table.probabilities(block, {lse_here, nullptr, nullptr, nullptr});
    for (int64_t i = 0; i < count; ++i) {
      int64_t& chosen = codes[strip.begin + tokens[i]];
      chosen = choose_code(block.scores + i * block.stride, code_count, code, &draws[tokens[i]].left, chosen);
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
      TokenStrip<Word> strip = call.pack_tokens(begin, count, nullptr);
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

Tensor softmax_sample(Tensor x, Tensor codebook, MaybeTensor bias, double scale, Tensor uniform) {
  check_call(x, codebook, bias);
  check_per_token(uniform, "uniform", x);
  codebook = torch::stable::contiguous(codebook);
  bias = contiguous(bias);
  uniform = torch::stable::contiguous(uniform);
  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
  dispatch_word(x, [&](auto word) {
    using Word = decltype(word);
    SoftmaxSampler<Word>{make_call<Word>(x, codebook, bias, std::nullopt, scale), numbers<Word>(uniform),
                         results<int64_t>(codes)}
        .run();
  });
  return codes;
}

}  // namespace cpu
}  // namespace vqkernels
