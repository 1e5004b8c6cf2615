// The coarse pass on the matrix units of sm_75 and later: mma.sync, fed by cp.async where there is one.
//
// A block multiplies 128 tokens with the codes of its split, 128 at a time, and each of its four warps 64
// tokens with 64 codes. Shared memory holds a few steps of 32 columns; a step's copies run while earlier ones
// multiply.
#pragma once

#include "coarse.cuh"

namespace vqkernels::cuda {

constexpr int kMmaThreads = 128;
constexpr int kMmaBlocks = 2;
constexpr int kMmaTokens = 128;
constexpr int kMmaCodes = 128;
constexpr int kMmaStep = 32;  // columns of the operands
constexpr int kStepChunks = kMmaStep / 8;
constexpr int kMmaRows = 8;  // tokens that one thread meets: 4 products of 16 rows, rows g and g + 8
constexpr CoarseTile kMmaTile{kMmaTokens, kMmaCodes, 8, kMmaBlocks};

struct MmaStage {
  Chunk tokens[kMmaTokens * kStepChunks];
  Chunk codes[kMmaCodes * kStepChunks];
};
struct MmaMemory {
  MmaStage stages[kCopyStages];
};

// Eight successive rows' chunks of the same columns, which ldmatrix reads at once, lie in eight different
// sixteenths of the 128 bytes of a bank cycle.
VQ_DEVICE int chunk_place(int row, int chunk) { return row * kStepChunks + (chunk ^ (row >> 1 & 3)); }

// One step of one tile: which rows and columns to copy, or to multiply.
struct MmaStep {
  int64_t code_row;  // of the tile's first code
  int64_t column;
};

VQ_DEVICE void copy_rows(Chunk* shared, const float16* operand, int64_t first, int64_t rows, int64_t depth,
                         int64_t column) {
#pragma unroll
  for (int i = thread_index(); i < 128 * kStepChunks; i += kMmaThreads) {
    int row = i / kStepChunks, chunk = i % kStepChunks;
    bool valid = first + row < rows && column + 8 * chunk < depth;
    int64_t from = valid ? (first + row) * depth + column + 8 * chunk : 0;
    copy_async(&shared[chunk_place(row, chunk)], reinterpret_cast<const Chunk*>(operand + from), valid);
  }
}

// The products of one 16-column half of a step: rows `side_n`.. of the tokens with the codes of blocks of 32
// `side_k` and `side_k + 2`, so that a lane's granules are all of one group.
VQ_DEVICE void multiply_half(const MmaStage& stage, int half, int side_n, int side_k,
                             float (&sums)[4][8][4]) {
  int lane = thread_index() % 32;
  uint32_t tokens[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int row = 64 * side_n + 16 * i + lane % 16;
    load_matrices(tokens[i], &stage.tokens[chunk_place(row, 2 * half + lane / 16)]);
  }
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    int row = 32 * side_k + 64 * (j / 4) + 8 * (j % 4) + lane / 16 * 8 + lane % 8;
    uint32_t codes[4];
    load_matrices(codes, &stage.codes[chunk_place(row, 2 * half + lane / 8 % 2)]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply_16x8x16(sums[i][j], tokens[i], codes[0], codes[1]);
      multiply_16x8x16(sums[i][j + 1], tokens[i], codes[2], codes[3]);
    }
  }
}

// Adds a tile's scores to the states and clears the sums.
template <bool SPLIT>
VQ_DEVICE void fold_scores(const Operands& operands, int64_t n0, int64_t code_row, int side_n, int side_k,
                           float (&sums)[4][8][4], Best<float> (&best)[kMmaRows]) {
  int g = thread_index() % 32 / 4, q = thread_index() % 4;
  float scale[kMmaRows];
#pragma unroll
  for (int i = 0; i < kMmaRows; ++i) {
    int64_t n = n0 + 64 * side_n + 8 * i + g;
    scale[i] = SPLIT ? 1.0f : (n < operands.token_count ? operands.scale[n] : 1.0f);
  }
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    int64_t row = code_row + 32 * side_k + 64 * block;
    float bias[kGranule];
#pragma unroll
    for (int i = 0; i < kGranule; ++i)
      bias[i] = SPLIT ? 0.0f : operands.bias[row + 8 * (i / 2) + 2 * q + i % 2];
#pragma unroll
    for (int i = 0; i < kMmaRows; ++i) {
      offer_granule<SPLIT>(best[i], row / kGranule + q, [&](int at) {
        float sum = sums[i / 2][4 * block + at / 2][2 * (i % 2) + at % 2];
        return SPLIT ? sum : std::fma(bias[at], scale[i], sum);
      });
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][j][k] = 0;
    }
  }
}

// One block's work: a tile of tokens with one split of the codes.
template <bool SPLIT>
VQ_DEVICE void score_item(const Operands& operands, const CoarsePlan& plan, MmaMemory& memory, int64_t n0,
                          int64_t split, Best<float>* states) {
  int lane = thread_index() % 32, side_n = thread_index() / 64, side_k = thread_index() / 32 % 2;
  int64_t first = split * plan.granules_per_split;
  int64_t granules = smaller(plan.granules_per_split, plan.granules - first);
  int64_t steps_per_tile = ceil_div(operands.depth, kMmaStep);
  int64_t steps = granules * kGranule / kMmaCodes * steps_per_tile;
  bool tokens_stay = kCopyStages % steps_per_tile == 0;  // every stage meets the same columns again and again
  MmaStep copied{first * kGranule, 0}, multiplied = copied;
  int copy_stage = 0, stage = 0;
  auto copy_next = [&](int64_t step) {
    if (step < steps) {
      MmaStage& to = memory.stages[copy_stage];
      if (step < kCopyStages || !tokens_stay) {
        copy_rows(to.tokens, operands.tokens, n0, operands.token_count, operands.depth, copied.column);
      }
      copy_rows(to.codes, operands.codes, copied.code_row, operands.code_rows, operands.depth, copied.column);
      copied.column += kMmaStep;
      if (copied.column >= operands.depth) copied = {copied.code_row + kMmaCodes, 0};
      copy_stage = copy_stage + 1 == kCopyStages ? 0 : copy_stage + 1;
    }
    commit_copies();  // even if empty: the wait below counts groups
  };
  Best<float> best[kMmaRows];
  float sums[4][8][4] = {};
#pragma unroll
  for (int i = 0; i < kMmaRows; ++i) best[i] = no_best<float>();
  for (int step = 0; step < kCopyStages - 1; ++step) copy_next(step);
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<kCopyStages - 2>();
    barrier();  // this step's data is there, and nobody reads the stage that comes next any more
    copy_next(step + kCopyStages - 1);
    const MmaStage& now = memory.stages[stage];
    multiply_half(now, 0, side_n, side_k, sums);
    if (multiplied.column + 16 < operands.depth) multiply_half(now, 1, side_n, side_k, sums);
    stage = stage + 1 == kCopyStages ? 0 : stage + 1;
    multiplied.column += kMmaStep;
    if (multiplied.column < operands.depth) continue;
    fold_scores<SPLIT>(operands, n0, multiplied.code_row, side_n, side_k, sums, best);
    multiplied = {multiplied.code_row + kMmaCodes, 0};
  }
  wait_copies<0>();
#pragma unroll
  for (int i = 0; i < kMmaRows; ++i) {
    int64_t n = n0 + 64 * side_n + 8 * i + lane / 4;
    if (n < operands.token_count) states[plan.state(n, split, 4 * side_k + lane % 4)] = best[i];
  }
}

template <bool SPLIT>
VQ_KERNEL(kMmaThreads, kMmaBlocks)
mma_kernel(Operands operands, CoarsePlan plan,
           Best<float>* states) {  // [N, plan.states()]
  MmaMemory& memory = shared_memory<MmaMemory>();
  int64_t n0 = block_index() % plan.token_tiles * kMmaTokens, split = block_index() / plan.token_tiles;
  score_item<SPLIT>(operands, plan, memory, n0, split, states);
}

}  // namespace vqkernels::cuda
