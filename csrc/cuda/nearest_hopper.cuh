// The coarse pass for Hopper (sm_90a): tensor cores and the bulk copy engine, with a role for every
// warpgroup.
//
// A block keeps 256 tokens in shared memory and streams the codes past them, 128 at a time, through a ring of
// stages that one thread fills by bulk tensor copies. Two warpgroups multiply: each has 128 of the tokens,
// holds their 128 x 128 scores in registers and folds them there. The second one starts a little after the
// first and keeps that distance: while one folds, the tensor cores work for the other.
//
// Why tall tiles: for a product of 64 tokens, 128 codes and 16 dimensions the tensor cores need 64 cycles and
// read 6 KiB of shared memory, three quarters of what it delivers; the copies into it take another eighth.
// Tiles of 128 x 256 would read less (5 KiB) but copy twice as much from the L2 cache: a code's bytes are
// good for as many products as there are tokens in the tile, so that 132 multiprocessors at full speed ask it
// for 3.7 TB/s with 256 of them, for 7.4 TB/s with 128.
#pragma once

#include "coarse.cuh"
#include "primitives_sm90.cuh"

namespace vqkernels::cuda::hopper {

constexpr int kGroupThreads = 128;  // a warpgroup
constexpr int kGroups = 2;          // that multiply
constexpr int kGroupWarps = kGroupThreads / 32;
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kGroupTokens = 2 * kProductRows;   // two products side by side in a warpgroup's registers
constexpr int kTokens = kGroups * kGroupTokens;  // in a tile
constexpr int kCodes = kProductColumns;          // in a tile
constexpr int kLanes = 4;                        // that share a token's scores
constexpr int kRows = 4;                         // tokens that a thread shares in
struct Tile : CoarseTile {};                     // a type of its own, which has a plan_coarse of its own
constexpr Tile kTile{{kTokens, kCodes, kLanes, 1}};
constexpr int kTileGranules = kCodes / kGranule;
constexpr int kMaxStages = 8;
constexpr int kTokenSlots = 2;
constexpr int kStepBytes = kProductDepth * 2;
constexpr int kSharedLimit = 227 * 1024;  // of a block
constexpr int kBlockBarrier = 0, kStartBarrier = 1;

// 65536 registers: 240 for each of the 256 threads that multiply (128 hold scores), 24 for the loader's 128.
constexpr int kLoaderRegisters = 24;
constexpr int kMultiplierRegisters = 240;

// One coarse pass. A work item is a tile of tokens with a run of successive splits; item = run * token_tiles
// + token tile. Dimensions come in blocks of WIDTH bytes a row: the box of a copy, the pattern of a swizzle.
struct Pass {
  CoarsePlan plan;
  int64_t tokens;  // N
  int64_t runs;
  int64_t splits_per_run;
  int64_t tiles_per_split;
  int64_t tiles;   // of codes
  int blocks;      // of dimensions
  int last_steps;  // of kProductDepth dimensions, in the last block
  int stages;
  int token_slots;
  float one;            // 1, see set_if
  int lead;             // blocks that the first warpgroup is ahead of the second
  const float* bias;    // [code_rows], plain only
  const float* scale;   // [N], plain only
  Best<float>* states;  // [N, splits, kLanes]

  VQ_HOST_DEVICE int64_t items() const { return plan.token_tiles * runs; }
  VQ_HOST_DEVICE int64_t first_token(int64_t item) const { return item % plan.token_tiles * kTokens; }
  VQ_HOST_DEVICE int64_t first_split(int64_t item) const { return item / plan.token_tiles * splits_per_run; }
  VQ_HOST_DEVICE int64_t end_split(int64_t item) const {
    return smaller(first_split(item) + splits_per_run, plan.splits);
  }
  VQ_HOST_DEVICE int64_t first_tile(int64_t split) const { return smaller(split * tiles_per_split, tiles); }
};

// Where things lie in the block's shared memory.
template <int WIDTH>
struct Layout {
  static constexpr int kTokenBlock = kTokens * WIDTH;
  static constexpr int kStage = kCodes * WIDTH;
  static constexpr int kBarriers = (2 * kMaxStages + kTokenSlots) * 8;
  static constexpr int kAlignment = 1024;  // after which the pattern of a 128-byte swizzle repeats

  SharedAddress tokens;    // [token_slots][blocks][kTokens][WIDTH]
  SharedAddress stages;    // [stages][kCodes][WIDTH]
  SharedAddress barriers;  // full and empty of each stage, then empty of each token slot

  VQ_DEVICE explicit Layout(const Pass& pass) {
    tokens = (dynamic_shared_memory() + kAlignment - 1) / kAlignment * kAlignment;
    stages = tokens + pass.token_slots * pass.blocks * kTokenBlock;
    barriers = stages + pass.stages * kStage;
  }
  static int bytes(int token_slots, int blocks, int stages) {
    return kAlignment + token_slots * blocks * kTokenBlock + stages * kStage + kBarriers;
  }

  VQ_DEVICE SharedAddress stage(int i) const { return stages + i * kStage; }
  VQ_DEVICE SharedAddress full(int i) const { return barriers + 16 * i; }
  VQ_DEVICE SharedAddress empty(int i) const { return barriers + 16 * i + 8; }
  VQ_DEVICE SharedAddress tokens_empty(int slot) const { return barriers + 16 * kMaxStages + 8 * slot; }
};

// A place in a ring of buffers; its parity changes with every round.
struct Place {
  int at = 0;
  uint32_t parity = 0;

  VQ_DEVICE void advance(int size) {
    if (++at < size) return;
    at = 0;
    parity ^= 1;
  }
};

// "Matrix descriptor": rows of WIDTH bytes, swizzled; eight rows make a pattern, and patterns follow each
// other.
template <int WIDTH>
VQ_DEVICE uint64_t descriptor(SharedAddress rows) {
  constexpr uint64_t kSwizzle = WIDTH == 128 ? 1 : WIDTH == 64 ? 2 : 3;
  constexpr uint64_t kStride = 8 * WIDTH;  // between patterns; the other offset has no meaning here and is 1
  return kSwizzle << 62 | kStride / 16 << 32 | uint64_t{1} << 16 | (rows & 0x3ffff) / 16;
}

template <int WIDTH>
VQ_DEVICE void init_barriers(const Layout<WIDTH>& shared) {
  if (thread_index() == 0) {
    for (int i = 0; i < kMaxStages; ++i) {
      init_barrier(shared.full(i), 1);
      init_barrier(shared.empty(i), kGroups * kGroupWarps);
    }
    for (int i = 0; i < kTokenSlots; ++i) init_barrier(shared.tokens_empty(i), kGroups * kGroupWarps);
    fence_barrier_init();
  }
  sync_named(kBlockBarrier, kThreads);
}

// The loader: one thread. It waits until a buffer has been read, then asks for the next copy into it. An
// item's tokens come with the blocks of its first tile of codes, on the same barriers, so that products can
// start with the first block.
template <int WIDTH>
VQ_DEVICE void load(const Pass& pass, const Layout<WIDTH>& shared, const TensorMap& tokens,
                    const TensorMap& codes) {
  using L = Layout<WIDTH>;
  constexpr int kColumns = WIDTH / 2;  // of fp16
  Place stage, slot;
  for (int64_t item = block_index(); item < pass.items(); item += grid_blocks()) {
    int n0 = static_cast<int>(pass.first_token(item));
    SharedAddress to = shared.tokens + slot.at * pass.blocks * L::kTokenBlock;
    int64_t first = pass.first_tile(pass.first_split(item)), end = pass.first_tile(pass.end_split(item));
    wait(shared.tokens_empty(slot.at), slot.parity ^ 1);
    for (int64_t tile = first; tile < end; ++tile) {
      for (int block = 0; block < pass.blocks; ++block) {
        SharedAddress full = shared.full(stage.at);
        wait(shared.empty(stage.at), stage.parity ^ 1);
        arrive_expecting(full, L::kStage + (tile == first ? L::kTokenBlock : 0));
        if (tile == first) copy_box(to + block * L::kTokenBlock, tokens, block * kColumns, n0, full);
        copy_box(shared.stage(stage.at), codes, block * kColumns, static_cast<int>(tile * kCodes), full);
        stage.advance(pass.stages);
      }
    }
    slot.advance(pass.token_slots);
  }
}

// This warp reads the buffer no more. Every warp says so, since each waits for its own products only.
VQ_DEVICE void release(SharedAddress empty) {
  if (thread_index() % 32 == 0) arrive(empty);
}

// A warpgroup's progress.
struct Reader {
  Place stage;
  Place slot;
  int lead;  // blocks until the second warpgroup may start
};

// Starts the products of one block. STEPS is a constant: with branches between the products, ptxas puts a
// fence of its own before each of them.
template <int WIDTH, int STEPS>
VQ_DEVICE void multiply_block(SharedAddress tokens, SharedAddress codes, bool add,
                              float (&product)[kProductRegisters]) {
  uint64_t x = descriptor<WIDTH>(tokens), c = descriptor<WIDTH>(codes);
  fence_products(product);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    // a swizzle acts on the address itself, so that a step along the rows is just an offset
    constexpr uint64_t kOffset = kStepBytes / 16, kSecondHalf = kProductRows * WIDTH / 16;
    multiply<0>(product, x + step * kOffset, c + step * kOffset, add || step > 0);
    multiply<1>(product, x + kSecondHalf + step * kOffset, c + step * kOffset, add || step > 0);
  }
  commit_products();
}

template <int WIDTH>
VQ_DEVICE void multiply_steps(int steps, SharedAddress tokens, SharedAddress codes, bool add,
                              float (&product)[kProductRegisters]) {
  constexpr int kSteps = WIDTH / kStepBytes;
  if (steps == kSteps) return multiply_block<WIDTH, kSteps>(tokens, codes, add, product);
  if constexpr (kSteps == 4) {
    if (steps == 3) return multiply_block<WIDTH, 3>(tokens, codes, add, product);
    if (steps == 2) return multiply_block<WIDTH, 2>(tokens, codes, add, product);
    multiply_block<WIDTH, 1>(tokens, codes, add, product);
  }
}

// Products of one tile of codes with the tokens at `tokens`. At most two blocks' products are under way. The
// last buffer is released inside of the loop, too: after it, ptxas would put that off until the scores are
// folded, and the loader would wait for as long.
template <int WIDTH>
VQ_DEVICE void multiply_tile(const Pass& pass, const Layout<WIDTH>& shared, SharedAddress tokens,
                             Reader& reader, float (&product)[kProductRegisters]) {
  int last = 0;
  for (int block = 0;; ++block) {
    int at = reader.stage.at;
    if (block < pass.blocks) {
      int steps = block == pass.blocks - 1 ? pass.last_steps : WIDTH / kStepBytes;
      wait(shared.full(at), reader.stage.parity);
      multiply_steps<WIDTH>(steps, tokens + block * Layout<WIDTH>::kTokenBlock, shared.stage(at), block > 0,
                            product);
      if (--reader.lead == 0) arrive_named(kStartBarrier, kGroups * kGroupThreads);
      wait_products<1>(product);
    } else {
      wait_products<0>(product);
    }
    if (block > 0) release(shared.empty(last));
    if (block == pass.blocks) break;
    last = at;
    reader.stage.advance(pass.stages);
  }
  wait_products<0>(product);  // nothing is left to wait for, but ptxas does not know
}

// Best<float> of one token while the sweep runs. `place` is where in the tile the best code lies, counted
// from the lane's first code: a constant of at most 103 for each score, and exact as a float.
struct Running {
  float first, second, place;

  VQ_DEVICE void offer(float score, float at, float one) {
    bool wins = score < first;
    second = std::fmin(second, score);
    copy_if(wins, second, first);
    copy_if(wins, first, score);
    set_if(wins, place, one, at);
  }
};

// Adds one row's scores of a tile to its state; `lane_code` is the lane's first code of the tile.
template <bool SPLIT>
VQ_DEVICE void fold(const float (&product)[kProductRegisters], int row, const float (&bias)[kCodes / kLanes],
                    float scale, float one, int32_t lane_code, Best<float>& best) {
  Running running{best.first, best.second, -1.0f};
#pragma unroll
  for (int w = 0; w < kTileGranules / kLanes; ++w) {
    float granule[kGranule];
#pragma unroll
    for (int i = 0; i < kGranule; ++i) {
      float sum = product[64 * (row / 2) + 4 * (4 * w + i / 2) + 2 * (row % 2) + i % 2];
      granule[i] = SPLIT ? sum : std::fma(bias[kGranule * w + i], scale, sum);
    }
    int place = kLanes * kGranule * w;
    if constexpr (SPLIT) {
#pragma unroll
      for (int i = 1; i < kGranule; ++i) granule[0] = std::fmin(granule[0], granule[i]);
      running.offer(granule[0], place, one);
    } else {
#pragma unroll
      for (int i = 0; i < kGranule; ++i) running.offer(granule[i], place + i, one);
    }
  }
  best.first = running.first;
  best.second = running.second;
  if (running.place >= 0) best.code = lane_code + static_cast<int32_t>(running.place);
}

// The biases of this lane's codes in a tile, in the order of `fold`.
VQ_DEVICE void load_bias(const float* bias,  // [code_rows]
                         int64_t row, float (&out)[kCodes / kLanes]) {
  const float* first = bias + row + thread_index() % kLanes * 2;
#pragma unroll
  for (int pair = 0; pair < kCodes / kLanes / 2; ++pair)
    load_pair(first + 8 * pair, out[2 * pair], out[2 * pair + 1]);
}

// Where in a warpgroup's tokens the `row`-th of this thread's lies.
VQ_DEVICE int token_of(int row) {
  int lane = thread_index() % 32, warp = thread_index() % kGroupThreads / 32;
  return row / 2 * kProductRows + row % 2 * 8 + warp * 16 + lane / kLanes;
}

// A warpgroup that multiplies, number `group`: tokens kGroupTokens * group .. of each tile.
template <int WIDTH, bool SPLIT>
VQ_DEVICE void score(const Pass& pass, const Layout<WIDTH>& shared, int group) {
  int q = thread_index() % kLanes;
  float product[kProductRegisters], bias[kCodes / kLanes], scale[kRows] = {};
  Reader reader{{}, {}, group == 0 ? pass.lead : 0};
  if (group == 1) sync_named(kStartBarrier, kGroups * kGroupThreads);
  for (int64_t item = block_index(); item < pass.items(); item += grid_blocks()) {
    int64_t n0 = pass.first_token(item) + group * kGroupTokens;
    SharedAddress tokens = shared.tokens + reader.slot.at * pass.blocks * Layout<WIDTH>::kTokenBlock +
                           group * kGroupTokens * WIDTH;
    if constexpr (!SPLIT) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        int64_t n = n0 + token_of(i);
        scale[i] = n < pass.tokens ? pass.scale[n] : 0;
      }
    }
    for (int64_t split = pass.first_split(item); split < pass.end_split(item); ++split) {
      Best<float> best[kRows] = {no_best<float>(), no_best<float>(), no_best<float>(), no_best<float>()};
      for (int64_t tile = pass.first_tile(split); tile < pass.first_tile(split + 1); ++tile) {
        if constexpr (!SPLIT) load_bias(pass.bias, tile * kCodes, bias);
        multiply_tile(pass, shared, tokens, reader, product);
        int32_t lane_code = static_cast<int32_t>(tile) * kCodes + q * kGranule;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          fold<SPLIT>(product, i, bias, scale[i], pass.one, lane_code, best[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        int64_t n = n0 + token_of(i);
        if (n < pass.tokens) pass.states[pass.plan.state(n, split, q)] = best[i];
      }
    }
    release(shared.tokens_empty(reader.slot.at));
    reader.slot.advance(pass.token_slots);
  }
}

template <int WIDTH, bool SPLIT>
VQ_KERNEL(kThreads, 1)
hopper_scores_kernel(VQ_GRID_CONSTANT const TensorMap tokens,  // [N, depth]
                     VQ_GRID_CONSTANT const TensorMap codes,   // [code_rows, depth]
                     VQ_GRID_CONSTANT const Pass pass) {
#ifdef VQ_SM90A  // elsewhere the kernel is empty, and dispatch never picks it
  Layout<WIDTH> shared(pass);
  init_barriers(shared);
  int group = warp_uniform(thread_index() / kGroupThreads);
  if (group == kGroups) {
    shrink_registers<kLoaderRegisters>();
    if (thread_index() == kGroups * kGroupThreads) load(pass, shared, tokens, codes);
  } else {
    grow_registers<kMultiplierRegisters>();
    score<WIDTH, SPLIT>(pass, shared, group);
  }
#endif
}

// -------------------------------------------------------------------------------------------------- launch

struct SharedMemory {
  char bytes[kSharedLimit];  // all there is: one block on a multiprocessor
};

constexpr int width_of(int64_t depth) { return depth <= 16 ? 32 : depth <= 32 ? 64 : 128; }

// Stages that fit beside `token_slots` token tiles.
template <int WIDTH>
int stages_beside(int token_slots, int blocks) {
  int left = kSharedLimit - Layout<WIDTH>::bytes(token_slots, blocks, 0);
  return static_cast<int>(smaller(left / Layout<WIDTH>::kStage, kMaxStages));
}

// Whether a tile of tokens and two stages fit into shared memory (depth <= 384), and coordinates into the
// copy engine's 32 bits.
inline bool supports(int64_t tokens, int64_t code_rows, int64_t depth) {
  int64_t most = INT32_MAX - kCodes;
  return depth <= 384 && tokens <= most && code_rows <= most;
}

// Rounds of all multiprocessors, in 1/32 tiles of codes, where a run's tokens cost as much as one such tile.
// More runs must save a 32nd, for they also mean more states to write and to read.
inline int64_t cost_of_runs(int64_t items, int64_t tiles_per_run, int64_t processors) {
  return ceil_div(items, processors) * (tiles_per_run + 1) * 32;
}

// The codes fall into runs of equal length, as many as end soonest, and each run into as few splits as
// plan_coarse would have for any kernel.
inline CoarsePlan plan_coarse(const Tile& tile, int64_t tokens, int64_t code_rows, bool split,
                              int64_t processors) {
  CoarseTile unfilled{tile.tokens, tile.codes, tile.groups, 0};  // no blocks to fill processors with
  CoarsePlan longest = cuda::plan_coarse(unfilled, tokens, code_rows, split, processors);
  int64_t most = longest.granules_per_split / kTileGranules;
  int64_t tiles = code_rows / kCodes, token_tiles = ceil_div(tokens, kTokens), best = most, least = INT64_MAX;
  for (int64_t runs = 1; runs <= smaller(tiles, 4 * processors); ++runs) {
    int64_t run = ceil_div(tiles, runs), splits = ceil_div(run, most), length = ceil_div(run, splits);
    int64_t items = token_tiles * ceil_div(tiles, length * splits);
    int64_t cost = cost_of_runs(items, length * splits, processors);
    if (cost + cost / 32 < least) least = cost, best = length;
  }
  return {token_tiles, ceil_div(tiles, best), best * kTileGranules, code_rows / kGranule, kLanes};
}

// Runs per token tile.
inline int64_t best_runs(const CoarsePlan& plan, int64_t tiles_per_split, int64_t processors) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t runs = 1; runs <= smaller(plan.splits, 4 * processors); ++runs) {
    int64_t splits = ceil_div(plan.splits, runs), items = plan.token_tiles * ceil_div(plan.splits, splits);
    int64_t cost = cost_of_runs(items, splits * tiles_per_split, processors);
    if (cost + cost / 32 < least) least = cost, best = runs;
  }
  return best;
}

template <int WIDTH, bool SPLIT>
Pass plan_pass(const Operands& operands, const CoarsePlan& plan, int64_t processors, Best<float>* states) {
  Pass pass{};
  pass.plan = plan;
  pass.tokens = operands.token_count;
  pass.tiles_per_split = plan.granules_per_split / kTileGranules;
  pass.tiles = operands.code_rows / kCodes;
  pass.splits_per_run = ceil_div(plan.splits, best_runs(plan, pass.tiles_per_split, processors));
  pass.runs = ceil_div(plan.splits, pass.splits_per_run);
  int steps = static_cast<int>(operands.depth / kProductDepth), block_steps = WIDTH / kStepBytes;
  pass.blocks = (steps + block_steps - 1) / block_steps;
  pass.last_steps = steps - (pass.blocks - 1) * block_steps;
  // a second slot for tokens, unless it would starve the ring of codes
  pass.token_slots = stages_beside<WIDTH>(kTokenSlots, pass.blocks) >= 4 ? kTokenSlots : 1;
  pass.stages = stages_beside<WIDTH>(pass.token_slots, pass.blocks);
  pass.one = 1.0f;
  // Folding a tile takes some 300 cycles (split) or 800, and a block's products 512: that is how far apart
  // the warpgroups must be. More would only empty the ring.
  pass.lead = static_cast<int>(smaller(SPLIT ? 1 : 2, smaller(pass.blocks, pass.stages / 2)));
  pass.bias = operands.bias, pass.scale = operands.scale, pass.states = states;
  return pass;
}

template <int WIDTH, bool SPLIT, typename Launcher>
void launch_with(Launcher& launcher, const Operands& operands, const CoarsePlan& plan, Best<float>* states) {
  Pass pass = plan_pass<WIDTH, SPLIT>(operands, plan, launcher.processors(), states);
  TensorMap tokens =
      make_tensor_map(launcher, operands.tokens, operands.token_count, operands.depth, kTokens, WIDTH / 2);
  TensorMap codes =
      make_tensor_map(launcher, operands.codes, operands.code_rows, operands.depth, kCodes, WIDTH / 2);
  int64_t blocks = smaller(pass.items(), launcher.processors());
  launch_hopper(launcher, hopper_scores_kernel<WIDTH, SPLIT>, blocks, kThreads, tokens, codes, pass);
}

// The states of every token: what nearest_mma.cuh's kernels write, for a plan made with kTile.
template <typename Launcher>
void launch_scores(Launcher& launcher, const Operands& operands, const CoarsePlan& plan, bool split,
                   Best<float>* states) {  // [N, splits, kLanes]
  int width = width_of(operands.depth);
  if (!split) {
    launch_with<128, false>(launcher, operands, plan, states);
  } else if (width == 128) {
    launch_with<128, true>(launcher, operands, plan, states);
  } else if (width == 64) {
    launch_with<64, true>(launcher, operands, plan, states);
  } else {
    launch_with<32, true>(launcher, operands, plan, states);
  }
}

}  // namespace vqkernels::cuda::hopper
