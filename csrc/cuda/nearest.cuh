// Nearest codes in three launches, float32 and the half types: prepare, coarse pass, finish. float64, with a
// coarse pass of its own, prepares codes and tokens in two. No launch waits for the host.
#pragma once

#include "nearest_finish.cuh"
#include "nearest_mma.cuh"
#ifdef VQKERNELS_SM90A  // built for sm_90a alone
#include "nearest_hopper.cuh"
#endif

namespace vqkernels::cuda {

// Codes and distances from the coarse pass's states. Without `exact`, float64's word is the last one.
template <int LANES, typename T, typename Launcher>
void finish(Launcher& launcher, const Search<T>& search, const States<T>& states,
            const Certificate<T>& certificate, bool exact, int64_t* codes, float* distance) {
  launcher.launch(finish_kernel<T, LANES>, ceil_div(search.x.count(), finish_tokens(LANES)),
                  finish_threads(LANES), search, states, certificate, exact, static_cast<int64_t*>(nullptr),
                  codes, distance);
}

// A codebook as its kernels left it, for one search or for many.
struct KeptDoubles {
  double* unit;            // [K, D] for cosine, else null
  double* half_norm;       // [K]
  DoubleSummary* summary;  // zero bytes to begin with
};

// Where the codes of `search`, which needs no tokens, are prepared.
template <typename Launcher>
void prepare_codes(Launcher& launcher, const Search<double>& search, const KeptDoubles& kept) {
  PreparedDoubles prepared{nullptr, kept.half_norm, kept.summary};
  int64_t blocks = smaller(team_blocks(search.codebook_size, 32), 4 * launcher.processors());
  launcher.launch(prepare_doubles_kernel<double>, blocks, kTeamThreads, search, prepared, kept.unit);
}

template <int LANES, typename Launcher>
void nearest_of_doubles(Launcher& launcher, const Search<double>& search, const KeptDoubles* given,
                        bool exact, int64_t* codes, float* distance) {
  int64_t tokens = search.x.count(), codebook_size = search.codebook_size, dim = search.x.dim;
  KeptDoubles kept{};
  if (given != nullptr) {
    kept = *given;
  } else {
    kept = {launcher.template allocate<double>(search.cosine ? codebook_size * dim : 0),
            launcher.template allocate<double>(codebook_size), launcher.template allocate<DoubleSummary>(1)};
    launcher.zero(kept.summary, sizeof(DoubleSummary));
    prepare_codes(launcher, search, kept);
  }
  PreparedDoubles prepared{search.cosine ? kept.unit : search.codebook, kept.half_norm, kept.summary};
  double* gaps = launcher.template allocate<double>(tokens);
  launcher.launch(bound_doubles_kernel<double, LANES>, team_blocks(tokens, LANES), kTeamThreads, search,
                  prepared, gaps);
  int64_t rows = ceil_div(codebook_size, kTileSize) * kTileSize;
  CoarsePlan plan = plan_coarse(kDoubleTile, tokens, rows, true, launcher.processors());
  Best<double>* best = launcher.template allocate<Best<double>>(tokens * plan.states());
  launcher.launch(double_kernel<double>, smaller(plan.items(), kMaxBlocks), kTileThreads, search, prepared,
                  plan, best);
  finish<LANES>(launcher, search, States<double>{best, plan, 1}, Certificate<double>{gaps}, exact, codes,
                distance);
}

// What a coarse kernel has written, and how.
struct CoarsePass {
  const Best<float>* states;  // [N, plan.states()]
  CoarsePlan plan;
};

template <bool SPLIT, typename Launcher>
CoarsePass run_coarse_pass(Launcher& launcher, const Operands& operands) {
  int64_t tokens = operands.token_count, processors = launcher.processors();
  auto allocate = [&](const CoarsePlan& plan) {
    return launcher.template allocate<Best<float>>(tokens * plan.states());
  };
#ifdef VQKERNELS_SM90A
  if (hopper_wanted(launcher, hopper::supports(tokens, operands.code_rows, operands.depth))) {
    CoarsePlan plan = plan_coarse(hopper::kTile, tokens, operands.code_rows, SPLIT, processors);
    Best<float>* states = allocate(plan);
    hopper::launch_scores(launcher, operands, plan, SPLIT, states);
    return {states, plan};
  }
#endif
  CoarsePlan plan = plan_coarse(kMmaTile, tokens, operands.code_rows, SPLIT, processors);
  Best<float>* states = allocate(plan);
  launcher.launch(mma_kernel<SPLIT>, plan.items(), kMmaThreads, operands, plan, states);
  return {states, plan};
}

// A codebook as its kernel left it, for many searches.
struct KeptFloats {
  float16* codes;        // [code_rows, depth]
  float* bias;           // [code_rows]; of one term only
  CodebookBound* bound;  // zero bytes to begin with
  float* centres;        // [code_blocks, D], all the same
  int64_t code_rows;     // K, rounded up
  int64_t depth;         // of a row
  int64_t code_blocks;   // blocks that prepare it
};

// The sizes of what is kept of `codebook_size` codes.
template <bool SPLIT>
KeptFloats plan_codes(int64_t codebook_size, int64_t dim, int64_t processors) {
  int64_t code_rows = ceil_div(codebook_size, kCodeRows) * kCodeRows;
  // few, since each of them looks for the centre first
  int64_t blocks = smaller(team_blocks(code_rows, Terms<SPLIT>::kLanes), 2 * processors);
  return {nullptr, nullptr, nullptr, nullptr, code_rows, operand_depth<SPLIT>(dim), blocks};
}

// Where the codes of `search`, which needs no tokens, are prepared.
template <bool SPLIT, typename T, typename Launcher>
void prepare_codes(Launcher& launcher, const Search<T>& search, const KeptFloats& kept) {
  Prepared prepared{{nullptr, nullptr, nullptr, nullptr, 0, kept.code_rows, kept.depth},
                    nullptr,
                    kept.codes,
                    kept.bias,
                    nullptr,
                    nullptr,
                    kept.bound,
                    kept.centres,
                    kept.code_blocks};
  launcher.launch(prepare_kernel<T, SPLIT, 1>, kept.code_blocks, kTeamThreads, search, prepared);
}

// Operands of the tokens, beside codes that are kept.
template <bool SPLIT, int LANES, typename T, typename Launcher>
Prepared prepare_tokens_alone(Launcher& launcher, const Search<T>& search, const KeptFloats& kept) {
  int64_t tokens = search.x.count();
  Prepared prepared{{nullptr, kept.codes, kept.bias, nullptr, tokens, kept.code_rows, kept.depth},
                    launcher.template allocate<float16>(tokens * kept.depth),
                    kept.codes,
                    kept.bias,
                    launcher.template allocate<float>(SPLIT ? 0 : tokens),
                    launcher.template allocate<TokenBound>(tokens),
                    kept.bound,
                    kept.centres,
                    0};
  prepared.operands.tokens = prepared.tokens, prepared.operands.scale = prepared.scale;
  int64_t blocks = smaller(team_blocks(tokens, LANES), 4 * launcher.processors());
  launcher.launch(prepare_tokens_kernel<T, SPLIT, LANES>, blocks, kTeamThreads, search, prepared);
  return prepared;
}

// With `kept`, codes that were prepared before.
template <bool SPLIT, int LANES, typename T, typename Launcher>
void nearest_of_floats(Launcher& launcher, const Search<T>& search, const KeptFloats* kept, bool exact,
                       int64_t* codes, float* distance) {
  if (kept != nullptr) {
    Prepared prepared = prepare_tokens_alone<SPLIT, LANES>(launcher, search, *kept);
    CoarsePass pass = run_coarse_pass<SPLIT>(launcher, prepared.operands);
    finish<LANES>(launcher, search, States<T>{pass.states, pass.plan, SPLIT ? kGranule : 1},
                  Certificate<T>{prepared.bounds, prepared.codebook, kept->depth}, exact, codes, distance);
    return;
  }
  int64_t tokens = search.x.count(), dim = search.x.dim, depth = operand_depth<SPLIT>(dim);
  int64_t code_rows = ceil_div(search.codebook_size, kCodeRows) * kCodeRows;
  CodebookBound* bound = launcher.template allocate<CodebookBound>(1);
  launcher.zero(bound, sizeof(CodebookBound));
  int64_t most = 2 * launcher.processors();  // few, since each of them looks for the centre first
  int64_t code_blocks = smaller(team_blocks(code_rows, Terms<SPLIT>::kLanes), most);
  int64_t blocks = code_blocks + smaller(team_blocks(tokens, LANES), 2 * most);
  Prepared prepared{{nullptr, nullptr, nullptr, nullptr, tokens, code_rows, depth},
                    launcher.template allocate<float16>(tokens * depth),
                    launcher.template allocate<float16>(code_rows * depth),
                    launcher.template allocate<float>(SPLIT ? 0 : code_rows),
                    launcher.template allocate<float>(SPLIT ? 0 : tokens),
                    launcher.template allocate<TokenBound>(tokens),
                    bound,
                    launcher.template allocate<float>(blocks * dim),
                    code_blocks};
  Operands& operands = prepared.operands;
  operands.tokens = prepared.tokens, operands.codes = prepared.codes;
  operands.bias = prepared.bias, operands.scale = prepared.scale;
  launcher.launch(prepare_kernel<T, SPLIT, LANES>, blocks, kTeamThreads, search, prepared);

  CoarsePass pass = run_coarse_pass<SPLIT>(launcher, operands);
  finish<LANES>(launcher, search, States<T>{pass.states, pass.plan, SPLIT ? kGranule : 1},
                Certificate<T>{prepared.bounds, prepared.codebook, depth}, exact, codes, distance);
}

template <typename T>
using Kept = std::conditional_t<std::is_same_v<T, double>, KeptDoubles, KeptFloats>;

// codes and distance of every token; -1 and NaN where the token, or anything in the codebook, is not finite.
// `kept`: what was prepared of the same codebook before, or null.
template <typename T, typename Launcher>
void nearest(Launcher& launcher, Tokens<const T> x,  // [B, T, D]
             const T* codebook,                      // [K, D]
             int64_t codebook_size, bool cosine, bool exact,
             int64_t* codes,   // [B * T]
             float* distance,  // [B * T]
             const Kept<T>* kept = nullptr) {
  if (x.count() == 0) return;
  Search<T> search{x, codebook, codebook_size, cosine};
  bool one = x.tokens_adjacent();  // then neighbouring lanes take neighbouring tokens, each its own
  if constexpr (std::is_same<T, double>::value) {
    one ? nearest_of_doubles<1>(launcher, search, kept, exact, codes, distance)
        : nearest_of_doubles<32>(launcher, search, kept, exact, codes, distance);
  } else if (splits_terms(x.dim)) {
    one ? nearest_of_floats<true, 1>(launcher, search, kept, exact, codes, distance)
        : nearest_of_floats<true, 8>(launcher, search, kept, exact, codes, distance);
  } else {
    one ? nearest_of_floats<false, 1>(launcher, search, kept, exact, codes, distance)
        : nearest_of_floats<false, 32>(launcher, search, kept, exact, codes, distance);
  }
}

}  // namespace vqkernels::cuda
