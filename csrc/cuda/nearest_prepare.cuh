// What the search computes before it scores anything: the centred codebook, and how far a score can be off.
//
// Euclidean: with mu the codebook's mean, argmin |x - c|^2 = argmin s_k, s_k = |c'|^2 / 2 - x'.c', x' = x -
// mu, c' = c - mu. The search uses the rounded xh = fl(x'), ch = fl(c'). With dx = x' - xh and dc = c' - ch,
//   s_k - (|ch|^2 / 2 - xh.ch) = ch.dc + |dc|^2 / 2 - dx.ch - xh.dc - dx.dc,
// which the measured norms of dx and dc bound. Cosine: mu = 0, ch = c / |c|, no |ch|^2 term.
#pragma once

#include <cstring>
#include <type_traits>

#include "../exact.h"
#include "tokens.cuh"

namespace vqkernels::cuda {

// One search, as every kernel of it gets it.
template <typename T>
struct Search {
  Tokens<const T> x;      // [B, T, D]
  const T* codebook;      // [K, D]
  int64_t codebook_size;  // K
  bool cosine;
};

// Largest values over the codebook. Zero bytes to begin with; NaN wherever a code is beyond bounding.
struct CodebookSummary {
  double norm;        // |ch|
  double residual;    // |dc|
  double half_norm;   // |ch|^2 / 2
  double non_finite;  // 1 if some entry is NaN or Inf
};

template <typename S>
struct PreparedCodebook {
  S* mean;       // [D]
  S* centred;    // [K, D]
  S* half_norm;  // [K]
  CodebookSummary* summary;
};

constexpr double kUnit = 0x1p-53;  // unit roundoff of float64
constexpr int64_t kMeanBlocks = 64;
constexpr int64_t kMeanRows = 64;  // rows per block: any mu is right, so a sample of 4096 codes is enough

template <typename S>
struct Roundoff {  // of float32
  static constexpr double unit = 0x1p-24, smallest = 0x1p-126, largest = 1e38;
};
template <>
struct Roundoff<double> {
  static constexpr double unit = 0x1p-53, smallest = 0x1p-1022, largest = 1e307;
};

// Of a value >= 0; -1023 for subnormals, which a scaling by 2^1023 brings above 2^-52.
VQ_DEVICE int exponent_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return static_cast<int>((bits >> 52) & 0x7ff) - 1023;
}

VQ_DEVICE double two_to_the(int exponent) {
  uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// A power of two that brings `largest` near 1, as two factors: 2^1074 is no double.
struct PowerOfTwo {
  double factor, factor2;
  VQ_DEVICE double operator()(double value) const { return value * factor * factor2; }
};

VQ_DEVICE PowerOfTwo power_of_two_for(double largest) {
  int exponent = -exponent_of(largest);
  return {two_to_the(exponent / 2), two_to_the(exponent - exponent / 2)};
}

// For values that float32 holds: two Newton steps from its 22 bits. Less code than the float64 root.
VQ_DEVICE double inverse_sqrt_in_float_range(double value) {
  double root = inverse_sqrt(static_cast<float>(value));
  for (int step = 0; step < 2; ++step) root *= 1.5 - 0.5 * value * root * root;
  return root;
}

// Within a few units of float64; 0, infinity and NaN stay what they are.
VQ_DEVICE double square_root(double square) {
  if (!(square > 0 && square < INFINITY)) return square;
  int half = exponent_of(square) >> 1;
  double scaled = square * two_to_the(-half) * two_to_the(-half);  // in [1, 4) unless subnormal
  return scaled * inverse_sqrt_in_float_range(scaled) * two_to_the(half);
}

// An upper bound for a norm of `dim` entries that was computed in float64. The last term is what squares
// below the smallest double can hide, and only float64 inputs have such squares.
template <typename T>
VQ_DEVICE double norm_above(double square, int64_t dim) {
  double norm = square_root(square) * (1 + static_cast<double>(dim + 8) * 2 * kUnit);
  if (std::is_same<T, double>::value) norm += square_root(static_cast<double>(dim)) * 0x1p-536;
  return norm;
}

template <typename T>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
sum_codes_kernel(Search<T> search,
                 int64_t rows,       // sampled
                 double* partial) {  // [kMeanBlocks, D]
  int64_t dim = search.x.dim;
  for (int64_t d = thread_index(); d < dim; d += block_threads()) {
    double sum = 0;
    for (int64_t row = block_index(); row < rows; row += grid_blocks()) {
      int64_t k = row * search.codebook_size / rows;
      sum += widen(search.codebook[k * dim + d]);
    }
    partial[block_index() * dim + d] = sum;
  }
}

template <typename S>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
finish_mean_kernel(const double* partial,  // [blocks, D]
                   int64_t blocks, int64_t rows, int64_t dim,
                   S* mean) {  // [D]
  for (int64_t d = team_first<1>(); d < dim; d += team_step<1>()) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += partial[block * dim + d];
    mean[d] = static_cast<S>(sum / static_cast<double>(rows));
  }
}

VQ_DEVICE double larger_or_nan(double a, double b) { return a > b || a != a ? a : b; }

// One code's sums; every lane of the warp ends with the same.
struct CodeSums {
  double square;    // |ch|^2
  double residual;  // |dc|^2
  double bad;       // 1 if some entry is NaN or Inf
};

template <typename T>
VQ_DEVICE CodeSums centre_code(const T* code, int64_t dim, const Scalar<T>* mean, Scalar<T>* centred) {
  CodeSums sums{0, 0, 0};
  for (int64_t d = team_lane<32>(); d < dim; d += 32) {
    Scalar<T> entry = widen(code[d]), value = entry - mean[d];
    double left = static_cast<double>(entry) - static_cast<double>(mean[d]) - static_cast<double>(value);
    centred[d] = value;
    sums.square = std::fma(static_cast<double>(value), static_cast<double>(value), sums.square);
    sums.residual = std::fma(left, left, sums.residual);
    if (!std::isfinite(entry)) sums.bad = 1;
  }
  return sums;
}

template <typename T>
VQ_DEVICE CodeSums normalize_code(const T* code, int64_t dim, Scalar<T>* unit) {
  double largest = 0, square = 0;
  CodeSums sums{0, 0, 0};
  for (int64_t d = team_lane<32>(); d < dim; d += 32) {
    double entry = widen(code[d]);
    if (!std::isfinite(entry)) sums.bad = 1;
    largest = std::fmax(largest, std::fabs(entry));
  }
  PowerOfTwo scale = power_of_two_for(team_max<32>(largest));
  for (int64_t d = team_lane<32>(); d < dim; d += 32) {
    double entry = scale(widen(code[d]));
    square = std::fma(entry, entry, square);
  }
  square = team_sum<32>(square);
  double inverse = square > 0 ? inverse_sqrt_in_float_range(square) : 0;
  for (int64_t d = team_lane<32>(); d < dim; d += 32) {
    double entry = scale(widen(code[d])) * inverse;
    Scalar<T> value = static_cast<Scalar<T>>(entry);
    double left = entry - static_cast<double>(value);
    unit[d] = value;
    sums.square = std::fma(static_cast<double>(value), static_cast<double>(value), sums.square);
    sums.residual = std::fma(left, left, sums.residual);
  }
  return sums;
}

template <typename T, bool COSINE>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
prepare_codebook_kernel(Search<T> search, PreparedCodebook<Scalar<T>> prepared) {
  int64_t dim = search.x.dim;
  CodebookSummary mine{0, 0, 0, 0};
  for (int64_t k = team_first<32>(); k < search.codebook_size; k += team_step<32>()) {
    const T* code = search.codebook + k * dim;
    Scalar<T>* centred = prepared.centred + k * dim;
    CodeSums sums;
    if constexpr (COSINE) {
      sums = normalize_code(code, dim, centred);
    } else {
      sums = centre_code(code, dim, prepared.mean, centred);
    }
    double square = team_sum<32>(sums.square);
    double norm = norm_above<T>(square, dim);
    // c - mu (or c / |c|) was itself rounded in float64 before ch was taken from it
    double unmeasured = (COSINE ? static_cast<double>(dim + 16) : 4.0) * kUnit * norm;
    double residual = norm_above<T>(team_sum<32>(sums.residual), dim) + unmeasured;
    double half = COSINE ? 0.0 : 0.5 * norm * norm;
    double bad = team_max<32>(sums.bad);
    if (team_lane<32>() == 0) prepared.half_norm[k] = static_cast<Scalar<T>>(COSINE ? 0.0 : 0.5 * square);
    mine.norm = larger_or_nan(mine.norm, norm);
    mine.residual = larger_or_nan(mine.residual, residual);
    mine.half_norm = larger_or_nan(mine.half_norm, half);
    mine.non_finite = larger_or_nan(mine.non_finite, bad);
  }
  if (team_lane<32>() != 0) return;
  atomic_max(&prepared.summary->norm, mine.norm);
  atomic_max(&prepared.summary->residual, mine.residual);
  atomic_max(&prepared.summary->half_norm, mine.half_norm);
  atomic_max(&prepared.summary->non_finite, mine.non_finite);
}

// Norms of one token; every lane of the team gets the same.
struct TokenNorms {
  double rounded;   // |xh|
  double residual;  // |dx|
  bool finite;
};

template <typename T, int LANES>
VQ_DEVICE TokenNorms token_norms(const Search<T>& search, const Scalar<T>* mean, int64_t n) {
  const T* token = search.x.row(n);
  double square = 0, residual = 0, bad = 0;
  for (int64_t d = team_lane<LANES>(); d < search.x.dim; d += LANES) {
    Scalar<T> entry = widen(search.x.at(token, d)), value = entry - mean[d];
    double left = static_cast<double>(entry) - static_cast<double>(mean[d]) - static_cast<double>(value);
    square = std::fma(static_cast<double>(value), static_cast<double>(value), square);
    residual = std::fma(left, left, residual);
    if (!std::isfinite(entry)) bad = 1;
  }
  double norm = norm_above<T>(team_sum<LANES>(square), search.x.dim);
  double left = norm_above<T>(team_sum<LANES>(residual), search.x.dim) + 4 * kUnit * norm;
  return {norm, left, team_max<LANES>(bad) == 0};
}

// Scores further apart than this are in the right order: twice the bound of one score's error.
// Infinity where nothing can be said (the score could overflow), NaN for a token without an answer.
template <typename S>
VQ_DEVICE double score_gap(TokenNorms token, CodebookSummary codebook, int64_t dim, bool cosine) {
  if (!token.finite || codebook.non_finite != 0) return NAN;
  double terms = static_cast<double>(dim + 4);
  double share = terms * Roundoff<S>::unit;
  double size = codebook.half_norm + token.rounded * codebook.norm;
  bool bounded = share < 0.25 && size < Roundoff<S>::largest;
  if (!bounded) return INFINITY;
  double rounding = token.residual * codebook.norm +
                    codebook.residual * (codebook.norm + token.rounded + token.residual + codebook.residual);
  double accumulation =
      share / (1 - share) * size + terms * (kUnit * codebook.half_norm + Roundoff<S>::smallest);
  double tie = cosine ? token.rounded * 0x1p-89 : 0.0;
  return 2.000002 * (rounding + accumulation + tie);  // the bound is itself computed in float64
}

template <typename T, int LANES>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
bound_tokens_kernel(Search<T> search, PreparedCodebook<Scalar<T>> prepared,
                    double* gaps) {  // [B * T]
  CodebookSummary summary = *prepared.summary;
  for (int64_t n = team_first<LANES>(); n < search.x.count(); n += team_step<LANES>()) {
    TokenNorms norms = token_norms<T, LANES>(search, prepared.mean, n);
    double gap = score_gap<Scalar<T>>(norms, summary, search.x.dim, search.cosine);
    if (team_lane<LANES>() == 0) gaps[n] = gap;
  }
}

}  // namespace vqkernels::cuda
