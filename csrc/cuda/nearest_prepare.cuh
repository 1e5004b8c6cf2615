// The operands of the coarse pass, and what bounds the error of its scores.
//
// Euclidean: with mu any point, argmin |x - c|^2 = argmin s_k, s_k = |c'|^2 / 2 - x'.c', x' = x - mu,
// c' = c - mu. The nearer mu lies to the codes, the less their fp16 roundings lose; every block takes the
// trimmed mean of a few codes, the same ones everywhere. Cosine: mu = 0, c' = c / |c|, no |c'|^2 term.
//
// Codes are scaled by one power of two, 2^b ("code units"), tokens by 2^a each ("token units"), where a < b
// only for tokens so far out that fp16 would overflow. Rounding to fp16 is exact to undo: with v = fl(2^a
// x'), the parts v - hi and v - hi - lo are floats without any error, so float32 measures the residuals.
#pragma once

#include "search.cuh"

namespace vqkernels::cuda {

// Largest values over the codebook, in code units; zero bytes to begin with.
struct CodebookBound {
  float norm;        // |c'| of those that fit fp16
  float residual;    // |c' - ch - cl|
  float excess;      // of a residual over its relative bound kRelative * |c'|: fp16's subnormals
  float low;         // |cl|
  float excluded;    // 1 / |c'| of codes that do not fit; 0 if all do
  float non_finite;  // 1 if some entry is NaN or Inf
  float unit;        // 2^b, as two factors
  float unit2;
};
constexpr int kMaxima = 6;

// One token's, in token units. norm is NaN for a token that has no answer, infinity for one beyond bounding.
struct TokenBound {
  float norm;      // |x'|
  float residual;  // |x' - xh - xl|
  float low;       // |xl|
  float scale;     // 2^(a - b)
};

struct Prepared {
  Operands operands;
  float16* tokens;  // operands' memory, to be written
  float16* codes;
  float* bias;
  float* scale;
  TokenBound* bounds;  // [B * T]
  CodebookBound* codebook;
  float* centres;       // [blocks, D], each block's own copy
  int64_t code_blocks;  // blocks that prepare codes; the others prepare tokens
};

template <bool SPLIT>
struct Terms {
  static constexpr int kCount = SPLIT ? 3 : 1;
  static constexpr int kTail = SPLIT ? 3 : 0;    // columns of the half norm
  static constexpr int kLanes = SPLIT ? 8 : 32;  // of a team, where a row's entries are adjacent
  static constexpr float kLargestNorm = SPLIT ? 4096 : 32768;  // |c'|^2 / 2 / 256, or an entry, fits fp16
  static constexpr float kRelative = SPLIT ? 0x1p-21f : 0x1.01p-11f;  // of the residual, subnormals aside
};

template <bool SPLIT>
int64_t operand_depth(int64_t dim) {
  return ceil_div(Terms<SPLIT>::kCount * dim + Terms<SPLIT>::kTail, kDepthStep) * kDepthStep;
}

constexpr int kSample = 10;  // codes whose trimmed mean is mu
constexpr int kTeamWarps = kTeamThreads / 32;

struct PrepareMemory {
  float entries[kMaxima][kTeamWarps];
};

VQ_DEVICE float power_of_two(int exponent) {
  uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Of a value >= 0; -127 for subnormals, 128 for infinity.
VQ_DEVICE int exponent_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return static_cast<int>(bits >> 23) - 127;
}

// v(d) = 2^exponent (x[d] - mu[d]) in float32, with one rounding (2^-149 aside), times `inverse`.
struct Scaling {
  const float* centre;
  float factor, factor2;
  float inverse;  // 1 / |c| of cosine's codes

  VQ_DEVICE Scaling(const float* centre, int exponent)
      : centre(centre),
        factor(power_of_two(exponent / 2)),
        factor2(power_of_two(exponent - exponent / 2)),
        inverse(1) {}

  VQ_DEVICE float operator()(float entry, int64_t d) const {
    float value = (entry - centre[d]) * factor * factor2;
    return value * inverse;
  }
};

// An upper bound for a norm whose squares were summed in float32.
VQ_DEVICE float norm_above(float square, int64_t dim) {
  return std::sqrt(square) * (1 + static_cast<float>(dim + 16) * 0x1p-23f) + 0x1p-60f;
}

// The largest of each entry over the block, in every thread.
VQ_DEVICE void block_max(PrepareMemory& memory, float (&entries)[kMaxima]) {
#pragma unroll
  for (int i = 0; i < kMaxima; ++i) entries[i] = team_max<32>(entries[i]);
  barrier();
  if (thread_index() % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kMaxima; ++i) memory.entries[i][thread_index() / 32] = entries[i];
  }
  barrier();
#pragma unroll
  for (int i = 0; i < kMaxima; ++i) {
    for (int warp = 0; warp < kTeamWarps; ++warp) entries[i] = std::fmax(entries[i], memory.entries[i][warp]);
  }
}

// Writes mu to `centre` and returns b: the codes' typical distance from mu, along its widest dimension,
// becomes 1 to 2. One outlier in the sample moves neither.
template <typename T>
VQ_DEVICE int choose_frame(const Search<T>& search, PrepareMemory& memory, float* centre) {
  float widest[kMaxima] = {};
  for (int64_t d = thread_index(); d < search.x.dim; d += kTeamThreads) {
    float sample[kSample], low = INFINITY, high = -INFINITY, spread = 0, farthest = 0;
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kSample; ++i) {
      sample[i] = widen(search.code(i * search.codebook_size / kSample)[d]);
      sum += sample[i];
      low = std::fmin(low, sample[i]);
      high = std::fmax(high, sample[i]);
    }
    float mean = static_cast<float>((sum - low - high) / (kSample - 2));
    if (search.cosine || !std::isfinite(mean)) mean = 0;
    centre[d] = mean;
#pragma unroll
    for (int i = 0; i < kSample; ++i) {
      float distance = std::fabs(sample[i] - mean) * (1.0f / (kSample - 1));
      spread += distance;
      farthest = std::fmax(farthest, distance);
    }
    widest[0] = std::fmax(widest[0], spread - farthest);
  }
  block_max(memory, widest);  // its barriers also publish the centre
  return search.cosine || widest[0] == 0 ? 0 : -exponent_of(widest[0]);
}

struct RowSums {
  float square;    // of v
  float residual;  // of v - hi (- lo)
  float low;       // of lo
};

// The last three columns in split mode.
struct Tail {
  float16 columns[3];
};

// One row of an operand, in packs of eight columns. `low_term` is which of the three terms holds the low
// parts.
template <bool SPLIT, int LANES, typename Value>
VQ_DEVICE RowSums write_row(Chunk* out, int64_t dim, int64_t depth, int low_term, float sign,
                            const Tail& tail, bool write, Value value) {
  RowSums sums{0, 0, 0};
  for (int64_t chunk = team_lane<LANES>(); chunk < depth / 8; chunk += LANES) {
    alignas(16) float16 entries[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int64_t column = chunk * 8 + i;
      int term = SPLIT ? (column >= dim) + (column >= 2 * dim) + (column >= 3 * dim) : 3 * (column >= dim);
      narrow(entries[i], 0.0f);
      if (term < 3) {
        float16 high, low;
        float v = value(column - term * dim);
        narrow(high, v);
        float rest = v - widen(high);
        narrow(low, SPLIT ? rest : 0.0f);
        narrow(entries[i], sign * widen(SPLIT && term == low_term ? low : high));
        if (term == 0) {
          rest -= widen(low);
          sums.square = std::fma(v, v, sums.square);
          sums.residual = std::fma(rest, rest, sums.residual);
          sums.low = std::fma(widen(low), widen(low), sums.low);
        }
      } else if (SPLIT) {
        int64_t at = column - 3 * dim;
        if (at < 3) entries[i] = at == 0 ? tail.columns[0] : at == 1 ? tail.columns[1] : tail.columns[2];
      }
    }
    if (write) memcpy(&out[chunk], entries, sizeof(Chunk));
  }
  return {team_sum<LANES>(sums.square), team_sum<LANES>(sums.residual), team_sum<LANES>(sums.low)};
}

// 256 h1 + h2 + h3, to 2^-33 of itself or 2^-25.
VQ_DEVICE Tail half_norm_columns(float half_norm) {
  Tail tail;
  narrow(tail.columns[0], half_norm * 0x1p-8f);
  if (half_norm == INFINITY)
    half_norm = 0;  // the first column says it
  else
    half_norm -= widen(tail.columns[0]) * 256;
  narrow(tail.columns[1], half_norm);
  narrow(tail.columns[2], half_norm - widen(tail.columns[1]));
  return tail;
}

template <typename T, bool SPLIT>
VQ_DEVICE void prepare_codes(const Search<T>& search, const Prepared& prepared, PrepareMemory& memory,
                             const float* centre, int exponent) {
  constexpr int LANES = Terms<SPLIT>::kLanes;
  const Operands& operands = prepared.operands;
  int64_t dim = search.x.dim;
  float maxima[kMaxima] = {};
  int64_t step = prepared.code_blocks * kTeamThreads / LANES;
  for (int64_t row = team_first<LANES>(); row < operands.code_rows;
       row += step) {  // warps are whole: rows are padded
    int64_t k = code_of_row(row);
    bool real = k < search.codebook_size;
    const T* code = search.code(real ? k : 0);
    float largest = 0, bad = 0, square = 0;
    for (int64_t d = team_lane<LANES>(); d < dim; d += LANES) {
      float entry = widen(code[d]);
      largest = std::fmax(largest, std::fabs(entry));
      if (!std::isfinite(entry)) bad = 1;
    }
    bool finite = team_max<LANES>(bad) == 0;
    largest = team_max<LANES>(largest);
    Scaling scaling(centre, search.cosine && finite ? -exponent_of(largest) : exponent);
    for (int64_t d = team_lane<LANES>(); d < dim; d += LANES) {
      float value = scaling(widen(code[d]), d);
      square = std::fma(value, value, square);
    }
    square = team_sum<LANES>(square);
    float norm = norm_above(square, dim);
    if (search.cosine) scaling.inverse = square > 0 ? inverse_sqrt(square) : 0;
    bool fits = real && finite && (search.cosine || norm <= Terms<SPLIT>::kLargestNorm);
    float half_norm = fits ? (search.cosine ? 0.0f : 0.5f * square) : INFINITY;
    Chunk* out = reinterpret_cast<Chunk*>(prepared.codes + row * operands.depth);
    RowSums sums =
        write_row<SPLIT, LANES>(out, dim, operands.depth, 1, -1.0f, half_norm_columns(half_norm), true,
                                [&](int64_t d) { return fits ? scaling(widen(code[d]), d) : 0.0f; });
    if (!SPLIT && team_lane<LANES>() == 0) prepared.bias[row] = half_norm;
    if (!real) continue;
    if (!finite) maxima[5] = 1;
    if (finite && !fits) maxima[4] = std::fmax(maxima[4], 1 / std::fmin(norm, 3e38f));
    norm = norm_above(sums.square, dim);
    // besides what was measured, v itself is rounded, and 1 / |c| summed in float32
    float unmeasured = search.cosine ? static_cast<float>(dim / 8 + 24) * 0x1p-24f : 0x1p-23f;
    float residual = norm_above(sums.residual, dim) + unmeasured * norm;
    maxima[0] = std::fmax(maxima[0], norm);
    maxima[1] = std::fmax(maxima[1], residual);
    maxima[2] = std::fmax(maxima[2], residual - Terms<SPLIT>::kRelative * norm);
    maxima[3] = std::fmax(maxima[3], norm_above(sums.low, dim));
  }
  block_max(memory, maxima);
  if (thread_index() != 0) return;
  CodebookBound& bound = *prepared.codebook;
  float* targets[kMaxima] = {&bound.norm, &bound.residual, &bound.excess,
                             &bound.low,  &bound.excluded, &bound.non_finite};
#pragma unroll
  for (int i = 0; i < kMaxima; ++i) {
    if (maxima[i] > 0) atomic_max(targets[i], maxima[i]);
  }
  if (block_index() != 0) return;
  bound.unit = power_of_two(exponent / 2);
  bound.unit2 = power_of_two(exponent - exponent / 2);
}

template <typename T, bool SPLIT, int LANES>
VQ_DEVICE void prepare_tokens(const Search<T>& search, const Prepared& prepared, const float* centre,
                              int exponent) {
  const Operands& operands = prepared.operands;
  int64_t dim = search.x.dim, tokens = operands.token_count;
  int64_t first = ((block_index() - prepared.code_blocks) * kTeamThreads + thread_index()) / LANES;
  int64_t step = (grid_blocks() - prepared.code_blocks) * kTeamThreads / LANES;
  int team = thread_index() % 32 / LANES;
  for (int64_t n = first; n - team < tokens; n += step) {  // warps stay whole
    bool write = n < tokens;
    const T* token = search.x.row(write ? n : tokens - 1);
    float largest = 0, bad = 0;
    for (int64_t d = team_lane<LANES>(); d < dim; d += LANES) {
      float entry = widen(search.x.at(token, d));
      largest = std::fmax(largest, std::fabs(entry - centre[d]));
      if (!std::isfinite(entry)) bad = 1;
    }
    bool finite = team_max<LANES>(bad) == 0;
    largest = team_max<LANES>(largest);
    int mine = -exponent_of(largest);  // brings the largest entry to 1 to 2
    if (!search.cosine) mine = smaller(mine + 14, exponent);
    int shift = search.cosine ? 0 : mine - exponent;
    bool fits = finite && largest < INFINITY && shift >= -24;  // 2^-24 is the smallest scale that fp16 holds
    if (!fits) mine = exponent, shift = 0;
    float scale = power_of_two(shift);
    Scaling scaling(centre, mine);
    Tail tail;
    narrow(tail.columns[0], 256 * scale);
    narrow(tail.columns[1], scale);
    narrow(tail.columns[2], scale);
    Chunk* out = reinterpret_cast<Chunk*>(prepared.tokens + n * operands.depth);
    RowSums sums = write_row<SPLIT, LANES>(out, dim, operands.depth, 2, 1.0f, tail, write, [&](int64_t d) {
      return fits ? scaling(widen(search.x.at(token, d)), d) : 0.0f;
    });
    if (!write || team_lane<LANES>() != 0) continue;
    float norm = norm_above(sums.square, dim), residual = norm_above(sums.residual, dim) + 0x1p-23f * norm;
    if (!fits) norm = finite ? INFINITY : NAN;
    prepared.bounds[n] = {norm, residual, norm_above(sums.low, dim), scale};
    if (!SPLIT) prepared.scale[n] = scale;
  }
}

// The first `code_blocks` blocks prepare codes, the others tokens.
template <typename T, bool SPLIT, int LANES>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
prepare_kernel(Search<T> search, Prepared prepared) {
  PrepareMemory& memory = shared_memory<PrepareMemory>();
  float* centre = prepared.centres + block_index() * search.x.dim;
  int exponent = choose_frame(search, memory, centre);
  if (block_index() < prepared.code_blocks) {
    prepare_codes<T, SPLIT>(search, prepared, memory, centre, exponent);
  } else {
    prepare_tokens<T, SPLIT, LANES>(search, prepared, centre, exponent);
  }
}

// Tokens alone, in the frame of codes that were prepared before.
template <typename T, bool SPLIT, int LANES>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
prepare_tokens_kernel(Search<T> search, Prepared prepared) {
  const CodebookBound& bound = *prepared.codebook;
  int exponent = exponent_of(bound.unit) + exponent_of(bound.unit2);
  prepare_tokens<T, SPLIT, LANES>(search, prepared, prepared.centres, exponent);
}

// Twice the most that the score of a code within `reach` of mu (code units) can be off, in token units;
// infinity where nothing can be said, NaN for a token without an answer. With xh + xl + dx = x' and the same
// for c',
//   x'.c' - (xh.ch + xh.cl + xl.ch) = dx.c' + (xh + xl).dc + xl.cl,
// and the matrix units' sums, which may cut each term at 2^-23 of the largest: at most depth * 2^-22 of
// |x||c| and of the half norm. The rest is the rounding of the half norm itself.
template <bool SPLIT>
VQ_DEVICE double score_gap(const TokenBound& x, const CodebookBound& c, double reach, int64_t dim,
                           int64_t depth, bool cosine) {
  if (c.non_finite != 0 || x.norm != x.norm) return NAN;
  double slack = 1 - static_cast<double>(dim + 16) * 0x1p-22;  // norm_above may have made a norm look larger
  if (reach * c.excluded >= slack) return INFINITY;            // a code left out could be the nearest
  double accumulation = static_cast<double>(depth) * 0x1p-22;
  if (!(x.norm < INFINITY) || accumulation > 0.25) return INFINITY;
  double norm = smaller<double>(c.norm, reach);
  double residual = smaller<double>(c.residual, Terms<SPLIT>::kRelative * reach + c.excess);
  double low = smaller<double>(c.low, 0x1p-10 * reach + 0x1p-20);
  double rounding = x.residual * norm + (x.norm + x.residual) * residual + x.low * low;
  double half_norm = cosine ? 0.0 : 0.5 * norm * norm * x.scale;
  double halves = static_cast<double>(dim / 8 + 32) * 0x1p-24 * half_norm + 0x1p-24 * x.scale;
  double sums = 1.01 * accumulation * ((x.norm + x.residual) * (norm + residual) + half_norm);
  double tie = cosine ? x.norm * 0x1p-89 : 0.0;
  return 2.00001 * (rounding + halves + sums + tie);
}

}  // namespace vqkernels::cuda
