// Channels-first maps of floats to rows and back, in tiles of 4 x 4 and vectors that every architecture has.
#pragma once

#include <cstdint>
#include <cstring>

namespace vqkernels {
namespace cpu {

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourIndices __attribute__((vector_size(16)));

template <int A, int B, int C, int D>
inline Four pick(Four a, Four b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, A, B, C, D);
#else
  return __builtin_shuffle(a, b, FourIndices{A, B, C, D});
#endif
}

inline Four load_four(const float* from) {
  Four four;
  std::memcpy(&four, from, sizeof(four));
  return four;
}

// out[j, i] = in[i, j] for a tile of 4 x 4
inline void transpose_tile(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  const Four a = load_four(in), b = load_four(in + in_stride);
  const Four c = load_four(in + 2 * in_stride), d = load_four(in + 3 * in_stride);
  const Four ac_low = pick<0, 4, 1, 5>(a, c), ac_high = pick<2, 6, 3, 7>(a, c);
  const Four bd_low = pick<0, 4, 1, 5>(b, d), bd_high = pick<2, 6, 3, 7>(b, d);
  const Four rows[4] = {pick<0, 4, 1, 5>(ac_low, bd_low), pick<2, 6, 3, 7>(ac_low, bd_low),
                        pick<0, 4, 1, 5>(ac_high, bd_high), pick<2, 6, 3, 7>(ac_high, bd_high)};
  for (int row = 0; row < 4; ++row) std::memcpy(out + row * out_stride, &rows[row], sizeof(Four));
}

// Strips of 32 tokens, two cache lines of the map, so that each of its lines is met once (where maps are 4
// KiB wide, strips of one line took five times as long to write, strips of four at D = 256 three times as
// long to read); in a strip tiles of four dimensions by four tokens, and single elements where those do not
// fit.
constexpr int64_t MAP_STRIP = 32, MAP_TILE = 4;

// The lines of the next strip, from dimension d on: they lie a page or so apart, where no prefetcher of the
// CPU looks, and from memory the walk takes a third of the time with it. Beyond the map's end it does no
// harm.
template <int WRITE>
inline void fetch_next_strip(const float* map, int64_t stride, int64_t base, int64_t d) {
  constexpr int64_t LINE = 64, SIZE = static_cast<int64_t>(sizeof(float));
  for (int64_t row = d; row < d + MAP_TILE; ++row) {
    const auto next = reinterpret_cast<uintptr_t>(map) + (row * stride + base + MAP_STRIP) * SIZE;
    for (int64_t byte = 0; byte < MAP_STRIP * SIZE; byte += LINE) {
      __builtin_prefetch(reinterpret_cast<const void*>(next + byte), WRITE);
    }
  }
}

template <class Fetch, class Tile, class Element>
void walk_map(int64_t tokens, int64_t dim, const Fetch& fetch, const Tile& tile, const Element& element) {
  for (int64_t base = 0; base < tokens; base += MAP_STRIP) {
    const int64_t end = tokens - base < MAP_STRIP ? tokens : base + MAP_STRIP;
    for (int64_t d = 0; d < dim; d += MAP_TILE) {
      fetch(base, d);
      int64_t n = base;
      for (; d + MAP_TILE <= dim && n + MAP_TILE <= end; n += MAP_TILE) tile(n, d);
      for (int64_t left = d; left < dim && left < d + MAP_TILE; ++left) {
        for (int64_t rest = n; rest < end; ++rest) element(rest, left);
      }
    }
  }
}

inline void map_to_rows(const float* map,  // [D, tokens], stride apart
                        int64_t stride, int64_t tokens, int64_t dim,
                        float* rows) {  // [tokens, D]
  walk_map(
      tokens, dim, [&](int64_t base, int64_t d) { fetch_next_strip<0>(map, stride, base, d); },
      [&](int64_t n, int64_t d) { transpose_tile(map + d * stride + n, stride, rows + n * dim + d, dim); },
      [&](int64_t n, int64_t d) { rows[n * dim + d] = map[d * stride + n]; });
}

inline void rows_to_map(const float* rows,  // [tokens, D]
                        int64_t tokens, int64_t dim,
                        float* map,  // [D, tokens], stride apart
                        int64_t stride) {
  walk_map(
      tokens, dim, [&](int64_t base, int64_t d) { fetch_next_strip<1>(map, stride, base, d); },
      [&](int64_t n, int64_t d) { transpose_tile(rows + n * dim + d, dim, map + d * stride + n, stride); },
      [&](int64_t n, int64_t d) { map[d * stride + n] = rows[n * dim + d]; });
}

}  // namespace cpu
}  // namespace vqkernels
