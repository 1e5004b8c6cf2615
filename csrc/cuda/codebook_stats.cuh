// Counts and sums of the tokens of each code, bitwise the same on every run.
//
// The tokens are sorted by code (stable), the sorted order is cut into chunks, and every sum runs in that
// order: first within a chunk, then over the chunks of a code that spans several. A codebook that has
// collapsed onto one code is thus N / chunk parallel sums. No atomics; float64 sums, rounded once.
#pragma once

#include "tokens.cuh"

namespace vqkernels::cuda {

// The tokens in the order of their codes.
struct SortedCodes {
  const int64_t* codes;  // [N], ascending; -1 first
  const int64_t* order;  // [N], the token of each position
  int64_t count;         // N
  int64_t chunk;         // positions per chunk
  int64_t codebook_size;

  VQ_DEVICE bool counts(int64_t code) const { return code >= 0 && code < codebook_size; }
  VQ_DEVICE bool continues_before(int64_t position) const {
    return position > 0 && position < count && codes[position] == codes[position - 1];
  }
};

// Sums of runs that cross a chunk's borders: the run that came in from the chunk before, the run that goes on
// after it.
struct ChunkSums {
  double* incoming;  // [chunks, D]
  double* outgoing;  // [chunks, D]
};

// `lanes` adjacent threads share a chunk or a code, each with its own dimensions.
inline int dimension_lanes(int64_t dim) {
  int lanes = 1;
  while (lanes < dim && lanes < kTeamThreads) lanes *= 2;
  return lanes;
}

// Short enough for parallel work, long enough that no code needs many chunks: about sqrt(N) / 4.
inline int64_t chunk_length(int64_t count) {
  int64_t chunk = 32;
  while (chunk < 1024 && 16 * chunk * chunk < count) chunk *= 2;
  return chunk;
}

// Where each code's run begins and ends.
template <typename Index>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
find_runs_kernel(SortedCodes sorted,
                 Index* starts,  // [K], zero to begin with
                 Index* ends) {  // [K], zero to begin with
  for (int64_t i = team_first<1>(); i < sorted.count; i += team_step<1>()) {
    int64_t code = sorted.codes[i];
    if (!sorted.counts(code)) continue;
    if (!sorted.continues_before(i)) starts[code] = i;
    if (!sorted.continues_before(i + 1)) ends[code] = i + 1;
  }
}

template <typename S>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
write_counts_kernel(const int64_t* starts,  // [K]
                    const int64_t* ends,    // [K]
                    int64_t codebook_size,
                    S* counts) {  // [K]
  for (int64_t k = team_first<1>(); k < codebook_size; k += team_step<1>())
    counts[k] = static_cast<S>(ends[k] - starts[k]);
}

// One dimension of one chunk: whole runs go to `sums`, runs across a border to `parts`.
template <typename T>
VQ_DEVICE void sum_chunk(const Tokens<const T>& x, const SortedCodes& sorted, int64_t chunk, int64_t d,
                         ChunkSums parts, Scalar<T>* sums) {
  int64_t begin = chunk * sorted.chunk,
          end = begin + sorted.chunk < sorted.count ? begin + sorted.chunk : sorted.count;
  bool came_in = sorted.continues_before(begin) && sorted.counts(sorted.codes[begin]);
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    int64_t code = sorted.codes[i];
    if (!sorted.counts(code)) continue;
    sum += widen(x.at(x.row(sorted.order[i]), d));
    bool goes_on = sorted.continues_before(i + 1);
    if (goes_on && i + 1 < end) continue;
    if (came_in) {
      parts.incoming[chunk * x.dim + d] = sum;
    } else if (goes_on) {
      parts.outgoing[chunk * x.dim + d] = sum;
    } else {
      sums[code * x.dim + d] = static_cast<Scalar<T>>(sum);
    }
    came_in = false;
    sum = 0;
  }
}

template <typename T>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
sum_chunks_kernel(Tokens<const T> x, SortedCodes sorted, int lanes, ChunkSums parts,
                  Scalar<T>* sums) {  // [K, D], zero to begin with
  int64_t chunks = ceil_div(sorted.count, sorted.chunk), step = grid_blocks() * block_threads() / lanes;
  for (int64_t chunk = team_first<1>() / lanes; chunk < chunks; chunk += step) {
    for (int64_t d = thread_index() % lanes; d < x.dim; d += lanes)
      sum_chunk(x, sorted, chunk, d, parts, sums);
  }
}

// Puts together the runs that leave a chunk they began in.
template <typename S>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
join_chunks_kernel(SortedCodes sorted, int64_t dim, int lanes, ChunkSums parts,
                   const int64_t* starts,  // [K]
                   const int64_t* ends,    // [K]
                   S* sums) {              // [K, D]
  int64_t chunks = ceil_div(sorted.count, sorted.chunk), step = grid_blocks() * block_threads() / lanes;
  for (int64_t chunk = team_first<1>() / lanes; chunk < chunks; chunk += step) {
    int64_t next = (chunk + 1) * sorted.chunk;
    if (!sorted.continues_before(next)) continue;
    int64_t code = sorted.codes[next];
    if (!sorted.counts(code) || starts[code] < chunk * sorted.chunk) continue;  // began in an earlier chunk
    int64_t last = (ends[code] - 1) / sorted.chunk;
    for (int64_t d = thread_index() % lanes; d < dim; d += lanes) {
      double sum = parts.outgoing[chunk * dim + d];
      for (int64_t other = chunk + 1; other <= last; ++other) sum += parts.incoming[other * dim + d];
      sums[code * dim + d] = static_cast<S>(sum);
    }
  }
}

template <typename T, typename Launcher>
void codebook_stats(Launcher& launcher, Tokens<const T> x, const int64_t* codes, int64_t codebook_size,
                    Scalar<T>* counts, Scalar<T>* sums) {
  using S = Scalar<T>;
  int64_t n = x.count(), dim = x.dim;
  launcher.zero(sums, sizeof(S) * codebook_size * dim);
  int64_t* starts = launcher.template allocate<int64_t>(2 * codebook_size);
  int64_t* ends = starts + codebook_size;
  launcher.zero(starts, sizeof(int64_t) * 2 * codebook_size);
  if (n > 0) {
    SortedCodes sorted{nullptr, nullptr, n, chunk_length(n), codebook_size};
    launcher.sort(codes, n, sorted.codes, sorted.order);
    int64_t chunks = ceil_div(n, sorted.chunk);
    int lanes = dimension_lanes(dim);
    ChunkSums parts{launcher.template allocate<double>(chunks * dim),
                    launcher.template allocate<double>(chunks * dim)};
    launcher.launch(find_runs_kernel<int64_t>, team_blocks(n, 1), kTeamThreads, sorted, starts, ends);
    launcher.launch(sum_chunks_kernel<T>, team_blocks(chunks, lanes), kTeamThreads, x, sorted, lanes, parts,
                    sums);
    launcher.launch(join_chunks_kernel<S>, team_blocks(chunks, lanes), kTeamThreads, sorted, dim, lanes,
                    parts, starts, ends, sums);
  }
  launcher.launch(write_counts_kernel<S>, team_blocks(codebook_size, 1), kTeamThreads, starts, ends,
                  codebook_size, counts);
}

}  // namespace vqkernels::cuda
