// Scores S_k = |ch_k|^2 / 2 - xh.ch_k of every token against every code, of which only the two lowest are
// kept.
//
// One block multiplies a tile of tokens with the codebook, tile by tile, like a matrix product whose result
// never leaves the registers. Where there are too few tokens to fill the device, several blocks share them
// and split the codebook.
#pragma once

#include "nearest_prepare.cuh"

namespace vqkernels::cuda {

constexpr int32_t kNoCode = INT32_MAX;

// The lowest score, the code that has it (the lowest such code), and the lowest score among all others.
template <typename S>
struct Best {
  S first;
  S second;
  int32_t code;

  VQ_DEVICE void offer(S score, int32_t k) {  // codes must come in ascending order
    if (score < first) {
      second = first;
      first = score;
      code = k;
    } else if (score < second) {
      second = score;
    }
  }

  VQ_DEVICE void merge(const Best& other) {
    bool theirs = other.first < first || (other.first == first && other.code < code);
    S loser = theirs ? first : other.first;
    S second_best = theirs ? other.second : second;
    first = theirs ? other.first : first;
    code = theirs ? other.code : code;
    second = loser < second_best ? loser : second_best;
  }

  VQ_DEVICE Best from_lane(int mask) const {
    return {shuffle_xor(first, mask), shuffle_xor(second, mask), shuffle_xor(code, mask)};
  }
};

template <typename S>
VQ_DEVICE Best<S> no_best() {
  return {static_cast<S>(INFINITY), static_cast<S>(INFINITY), kNoCode};
}

constexpr int kTileSide = 16;  // a block is 16 x 16 threads
constexpr int kTileThreads = kTileSide * kTileSide;
constexpr int kTileBlocks = 2;
constexpr int kTileDepth = 16;  // dimensions held in shared memory at once

// Each thread owns MICRO x MICRO scores, in packs of 16 bytes, the unit of its shared-memory reads.
template <typename S>
struct Tile {
  static constexpr int kPack = 16 / sizeof(S);
  static constexpr int kMicro = 2 * kPack;
  static constexpr int kSize = kTileSide * kMicro;  // tokens and codes per tile: 128 float, 64 double
  static constexpr int kPacks = kSize / kPack;

  struct alignas(16) Pack {
    S entry[kPack];
  };
  Pack tokens[kTileDepth][kPacks + 1];  // one more pack a row keeps transposing stores off one bank
  Pack codes[kTileDepth][kPacks + 1];
  int64_t offsets[kSize];              // of the tile's tokens, in elements; -1 past the end
  Best<S> best[kMicro][kTileThreads];  // each thread's own, parked here while registers hold the products

  // Where a thread's i-th token or code lies in the tile.
  static VQ_DEVICE int position(int side, int i) {
    return i / kPack * (kTileSide * kPack) + side * kPack + i % kPack;
  }
};

template <typename T>
VQ_DEVICE void load_tokens(Tile<Scalar<T>>& tile, const Search<T>& search, const Scalar<T>* mean,
                           int64_t d0) {
  using S = Scalar<T>;
  constexpr int kSize = Tile<S>::kSize, kPack = Tile<S>::kPack;
  bool tokens_first = search.x.tokens_adjacent();
  const T* first = search.x.data + d0 * search.x.stride_d;
  int depths = static_cast<int>(smaller(search.x.dim - d0, kTileDepth));
#pragma unroll 2
  for (int i = thread_index(); i < kSize * kTileDepth; i += kTileThreads) {
    int row = tokens_first ? i % kSize : i / kTileDepth;
    int depth = tokens_first ? i / kSize : i % kTileDepth;
    int64_t offset = tile.offsets[row];
    S value = 0;
    if (offset >= 0 && depth < depths)
      value = widen(first[offset + depth * search.x.stride_d]) - mean[d0 + depth];
    tile.tokens[depth][row / kPack].entry[row % kPack] = value;
  }
}

template <typename S>
VQ_DEVICE void load_codes(Tile<S>& tile, const S* centred, int64_t codebook_size, int64_t dim, int64_t k0,
                          int64_t d0) {
  constexpr int kSize = Tile<S>::kSize, kPack = Tile<S>::kPack;
  const S* first = centred + k0 * dim + d0;
  int rows = static_cast<int>(smaller(codebook_size - k0, kSize)),
      depths = static_cast<int>(smaller(dim - d0, kTileDepth));
#pragma unroll 2
  for (int i = thread_index(); i < kSize * kTileDepth; i += kTileThreads) {
    int row = i / kTileDepth, depth = i % kTileDepth;
    S value = row < rows && depth < depths ? first[row * dim + depth] : 0;
    tile.codes[depth][row / kPack].entry[row % kPack] = value;
  }
}

template <typename S>
VQ_DEVICE void multiply_tile(const Tile<S>& tile, int side_n, int side_k,
                             S (&product)[Tile<S>::kMicro][Tile<S>::kMicro]) {
  using Pack = typename Tile<S>::Pack;
  constexpr int kMicro = Tile<S>::kMicro, kPack = Tile<S>::kPack;
#pragma unroll 8
  for (int depth = 0; depth < kTileDepth; ++depth) {
    Pack c[2] = {tile.codes[depth][side_k], tile.codes[depth][kTileSide + side_k]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pack x = tile.tokens[depth][half * kTileSide + side_n];
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
#pragma unroll
        for (int j = 0; j < kMicro; ++j) {
          S& sum = product[half * kPack + i][j];
          sum = std::fma(x.entry[i], c[j / kPack].entry[j % kPack], sum);
        }
      }
    }
  }
}

// Adds the scores of one tile of codes to the thread's best; all threads of the block call it together.
template <typename T>
VQ_DEVICE void score_tile(Tile<Scalar<T>>& tile, const Search<T>& search,
                          const PreparedCodebook<Scalar<T>>& prepared, int64_t k0) {
  using S = Scalar<T>;
  constexpr int kMicro = Tile<S>::kMicro;
  int side_k = thread_index() % kTileSide, side_n = thread_index() / kTileSide;
  S product[kMicro][kMicro] = {};
  for (int64_t d0 = 0; d0 < search.x.dim; d0 += kTileDepth) {
    load_tokens(tile, search, prepared.mean, d0);
    load_codes(tile, prepared.centred, search.codebook_size, search.x.dim, k0, d0);
    barrier();
    multiply_tile(tile, side_n, side_k, product);
    barrier();
  }
  S half_norm[kMicro];
#pragma unroll
  for (int j = 0; j < kMicro; ++j) {
    int64_t k = k0 + Tile<S>::position(side_k, j);
    half_norm[j] = k < search.codebook_size ? prepared.half_norm[k] : static_cast<S>(INFINITY);
  }
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    Best<S> best = tile.best[i][thread_index()];
#pragma unroll
    for (int j = 0; j < kMicro; ++j) {
      best.offer(half_norm[j] - product[i][j], static_cast<int32_t>(k0 + Tile<S>::position(side_k, j)));
    }
    tile.best[i][thread_index()] = best;
  }
}

// How the scores are shared out: item = split * token_tiles + token tile.
struct ScorePlan {
  int64_t token_tiles;
  int64_t splits;
  int64_t code_tiles_per_split;
};

template <typename S>
ScorePlan plan_scores(int64_t tokens, int64_t codebook_size, int64_t processors) {
  int64_t token_tiles = ceil_div(tokens, Tile<S>::kSize),
          code_tiles = ceil_div(codebook_size, Tile<S>::kSize);
  int64_t wanted = ceil_div(2 * processors, token_tiles);  // two blocks fit on a multiprocessor
  int64_t splits = wanted < code_tiles ? wanted : code_tiles;
  int64_t per_split = ceil_div(code_tiles, splits);
  return {token_tiles, ceil_div(code_tiles, per_split), per_split};
}

template <typename T>
VQ_KERNEL(kTileThreads, kTileBlocks)
score_kernel(Search<T> search, PreparedCodebook<Scalar<T>> prepared, ScorePlan plan,
             Best<Scalar<T>>* partial) {  // [splits, B * T]
  using S = Scalar<T>;
  constexpr int kMicro = Tile<S>::kMicro, kSize = Tile<S>::kSize;
  Tile<S>& tile = shared_memory<Tile<S>>();
  int side_k = thread_index() % kTileSide, side_n = thread_index() / kTileSide;
  int64_t tokens = search.x.count();
  for (int64_t item = block_index(); item < plan.token_tiles * plan.splits; item += grid_blocks()) {
    int64_t n0 = item % plan.token_tiles * kSize, split = item / plan.token_tiles;
    for (int i = thread_index(); i < kSize; i += kTileThreads) {
      tile.offsets[i] = n0 + i < tokens ? search.x.offset(n0 + i) : -1;
    }
    barrier();
    for (int i = 0; i < kMicro; ++i) tile.best[i][thread_index()] = no_best<S>();
    int64_t first = split * plan.code_tiles_per_split * kSize,
            end = first + plan.code_tiles_per_split * kSize;
    for (int64_t k0 = first; k0 < end && k0 < search.codebook_size; k0 += kSize) {
      score_tile(tile, search, prepared, k0);
    }
    for (int i = 0; i < kMicro; ++i) {
      Best<S> best = tile.best[i][thread_index()];
      for (int mask = kTileSide / 2; mask > 0; mask /= 2) best.merge(best.from_lane(mask));
      int64_t n = n0 + Tile<S>::position(side_n, i);
      if (side_k == 0 && n < tokens) partial[split * tokens + n] = best;
    }
  }
}

}  // namespace vqkernels::cuda
