// float64 inputs: scores S_k = |ch_k|^2 / 2 - x.ch_k in float64 on the ordinary units, with a bound of their
// rounding. Euclidean: ch = c. Cosine: ch = c / |c|, no |ch|^2 term.
//
// One block multiplies a tile of tokens with the codebook, tile by tile, and only the two lowest scores of a
// split are kept. There is no wider format to rerank in: what float64 leaves open goes the exact road.
#pragma once

#include "search.cuh"

namespace vqkernels::cuda {

// Largest values over the codebook. Zero bytes to begin with; NaN wherever a code is beyond bounding.
struct DoubleSummary {
  double norm;        // |ch|
  double residual;    // |dc|
  double half_norm;   // |ch|^2 / 2
  double non_finite;  // 1 if some entry is NaN or Inf
};

struct PreparedDoubles {
  const double* codes;  // [K, D]
  double* half_norm;    // [K]
  DoubleSummary* summary;
};

constexpr double kLargestSum = 1e307;

// An upper bound for a norm of `dim` entries; the last term is what squares below the smallest double can
// hide.
VQ_DEVICE double norm_above(double square, int64_t dim) {
  return square_root(square) * (1 + static_cast<double>(dim + 8) * 2 * kUnit) +
         square_root(static_cast<double>(dim)) * 0x1p-536;
}

// Writes c / |c| and returns its squared norm; every lane of the warp calls it.
VQ_DEVICE double normalize_code(const double* code, int64_t dim, double* unit) {
  double largest = 0, square = 0, rounded = 0;
  for (int64_t d = team_lane<32>(); d < dim; d += 32) largest = std::fmax(largest, std::fabs(code[d]));
  PowerOfTwo scale = power_of_two_for(team_max<32>(largest));
  for (int64_t d = team_lane<32>(); d < dim; d += 32)
    square = std::fma(scale(code[d]), scale(code[d]), square);
  square = team_sum<32>(square);
  double inverse = square > 0 ? inverse_sqrt_in_float_range(square) : 0;
  for (int64_t d = team_lane<32>(); d < dim; d += 32) {
    unit[d] = scale(code[d]) * inverse;
    rounded = std::fma(unit[d], unit[d], rounded);
  }
  return rounded;
}

template <typename T>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
prepare_doubles_kernel(Search<T> search, PreparedDoubles prepared,
                       T* unit) {  // [K, D], written for cosine only
  int64_t dim = search.x.dim;
  DoubleSummary mine{0, 0, 0, 0};
  for (int64_t k = team_first<32>(); k < search.codebook_size; k += team_step<32>()) {
    const T* code = search.code(k);
    double square = 0, bad = 0;
    for (int64_t d = team_lane<32>(); d < dim; d += 32) {
      square = std::fma(code[d], code[d], square);
      if (!std::isfinite(code[d])) bad = 1;
    }
    square = search.cosine ? normalize_code(code, dim, unit + k * dim) : square;
    square = team_sum<32>(square);
    bad = team_max<32>(bad);
    double norm = norm_above(square, dim);
    if (team_lane<32>() == 0) prepared.half_norm[k] = search.cosine ? 0.0 : 0.5 * square;
    mine.norm = larger_or_nan(mine.norm, norm);
    if (search.cosine)
      mine.residual = larger_or_nan(mine.residual, static_cast<double>(dim + 16) * kUnit * norm);
    if (!search.cosine) mine.half_norm = larger_or_nan(mine.half_norm, 0.5 * norm * norm);
    mine.non_finite = larger_or_nan(mine.non_finite, bad);
  }
  if (team_lane<32>() != 0) return;
  atomic_max(&prepared.summary->norm, mine.norm);
  atomic_max(&prepared.summary->residual, mine.residual);
  atomic_max(&prepared.summary->half_norm, mine.half_norm);
  atomic_max(&prepared.summary->non_finite, mine.non_finite);
}

// Scores further apart than this are in the right order: twice the bound of one score's error. Infinity where
// nothing can be said (the score could overflow), NaN for a token without an answer.
VQ_DEVICE double score_gap(double norm, bool finite, const DoubleSummary& codebook, int64_t dim,
                           bool cosine) {
  if (!finite || codebook.non_finite != 0) return NAN;
  double terms = static_cast<double>(dim + 4);
  double share = terms * kUnit;
  double size = codebook.half_norm + norm * codebook.norm;
  bool bounded = share < 0.25 && size < kLargestSum;
  if (!bounded) return INFINITY;
  double rounding = codebook.residual * (codebook.norm + norm + codebook.residual);
  double accumulation = share / (1 - share) * size + terms * (kUnit * codebook.half_norm + 0x1p-1022);
  double tie = cosine ? norm * 0x1p-89 : 0.0;
  return 2.000002 * (rounding + accumulation + tie);  // the bound is itself computed in float64
}

template <typename T, int LANES>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
bound_doubles_kernel(Search<T> search, PreparedDoubles prepared,
                     double* gaps) {  // [B * T]
  DoubleSummary summary = *prepared.summary;
  for (int64_t n = team_first<LANES>(); n < search.x.count(); n += team_step<LANES>()) {
    const T* token = search.x.row(n);
    double square = 0, bad = 0;
    for (int64_t d = team_lane<LANES>(); d < search.x.dim; d += LANES) {
      double entry = search.x.at(token, d);
      square = std::fma(entry, entry, square);
      if (!std::isfinite(entry)) bad = 1;
    }
    double norm = norm_above(team_sum<LANES>(square), search.x.dim);
    bool finite = team_max<LANES>(bad) == 0;
    double gap = score_gap(norm, finite, summary, search.x.dim, search.cosine);
    if (team_lane<LANES>() == 0) gaps[n] = gap;
  }
}

constexpr int kTileSide = 16;  // a block is 16 x 16 threads
constexpr int kTileThreads = kTileSide * kTileSide;
constexpr int kTileBlocks = 2;
constexpr int kTileDepth = 16;                 // dimensions held in shared memory at once
constexpr int kMicro = 4;                      // each thread owns 4 x 4 scores
constexpr int kTileSize = kTileSide * kMicro;  // tokens and codes per tile
constexpr CoarseTile kDoubleTile{kTileSize, kTileSize, 1, kTileBlocks};

struct DoubleTile {
  // Packs of 16 bytes, the unit of a thread's reads; one more a row keeps transposing stores off one bank.
  struct alignas(16) Pack {
    double entry[2];
  };
  Pack tokens[kTileDepth][kTileSize / 2 + 1];
  Pack codes[kTileDepth][kTileSize / 2 + 1];
  int64_t offsets[kTileSize];  // of the tile's tokens, in elements; -1 past the end
};

// Where a thread's i-th token or code lies in the tile.
VQ_DEVICE int tile_position(int side, int i) { return i / 2 * (kTileSide * 2) + side * 2 + i % 2; }

template <typename T>
VQ_DEVICE void load_tile(DoubleTile& tile, const Search<T>& search, const double* codes, int64_t k0,
                         int64_t d0) {
  bool tokens_first = search.x.tokens_adjacent();
  int64_t dim = search.x.dim;
#pragma unroll 2
  for (int i = thread_index(); i < kTileSize * kTileDepth; i += kTileThreads) {
    int row = tokens_first ? i % kTileSize : i / kTileDepth;
    int depth = tokens_first ? i / kTileSize : i % kTileDepth;
    bool inside = tile.offsets[row] >= 0 && d0 + depth < dim;
    tile.tokens[depth][row / 2].entry[row % 2] =
        inside ? search.x.data[tile.offsets[row] + (d0 + depth) * search.x.stride_d] : 0.0;
  }
#pragma unroll 2
  for (int i = thread_index(); i < kTileSize * kTileDepth; i += kTileThreads) {
    int row = i / kTileDepth, depth = i % kTileDepth;
    bool inside = k0 + row < search.codebook_size && d0 + depth < dim;
    tile.codes[depth][row / 2].entry[row % 2] = inside ? codes[(k0 + row) * dim + d0 + depth] : 0.0;
  }
}

VQ_DEVICE void multiply_tile(const DoubleTile& tile, int side_n, int side_k,
                             double (&product)[kMicro][kMicro]) {
#pragma unroll 8
  for (int depth = 0; depth < kTileDepth; ++depth) {
    DoubleTile::Pack c[2] = {tile.codes[depth][side_k], tile.codes[depth][kTileSide + side_k]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      DoubleTile::Pack x = tile.tokens[depth][half * kTileSide + side_n];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kMicro; ++j) {
          double& sum = product[half * 2 + i][j];
          sum = std::fma(x.entry[i], c[j / 2].entry[j % 2], sum);
        }
      }
    }
  }
}

template <typename T>
VQ_KERNEL(kTileThreads, kTileBlocks)
double_kernel(Search<T> search, PreparedDoubles prepared, CoarsePlan plan,
              Best<double>* states) {  // [B * T, plan.states()]
  DoubleTile& tile = shared_memory<DoubleTile>();
  int side_k = thread_index() % kTileSide, side_n = thread_index() / kTileSide;
  int64_t tokens = search.x.count();
  for (int64_t item = block_index(); item < plan.items(); item += grid_blocks()) {
    int64_t n0 = item % plan.token_tiles * kTileSize, split = item / plan.token_tiles;
    for (int i = thread_index(); i < kTileSize; i += kTileThreads) {
      tile.offsets[i] = n0 + i < tokens ? search.x.offset(n0 + i) : -1;
    }
    barrier();
    Best<double> best[kMicro];
#pragma unroll
    for (int i = 0; i < kMicro; ++i) best[i] = no_best<double>();
    int64_t first = split * plan.granules_per_split * kGranule,
            end = first + plan.granules_per_split * kGranule;
    for (int64_t k0 = first; k0 < end && k0 < search.codebook_size; k0 += kTileSize) {
      double product[kMicro][kMicro] = {};
      for (int64_t d0 = 0; d0 < search.x.dim; d0 += kTileDepth) {
        load_tile(tile, search, prepared.codes, k0, d0);
        barrier();
        multiply_tile(tile, side_n, side_k, product);
        barrier();
      }
#pragma unroll
      for (int j = 0; j < kMicro; ++j) {
        int64_t k = k0 + tile_position(side_k, j);
        double half_norm = k < search.codebook_size ? prepared.half_norm[k] : INFINITY;
#pragma unroll
        for (int i = 0; i < kMicro; ++i) best[i].offer(half_norm - product[i][j], static_cast<int32_t>(k));
      }
    }
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
      for (int mask = kTileSide / 2; mask > 0; mask /= 2) best[i].merge(best[i].from_lane(mask));
      int64_t n = n0 + tile_position(side_n, i);
      if (side_k == 0 && n < tokens) states[plan.state(n, split, 0)] = best[i];
    }
  }
}

}  // namespace vqkernels::cuda
