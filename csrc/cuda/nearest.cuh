// Nearest codes, launch by launch. float32 and the half types: prepare, coarse pass, finish, and the exact
// road for the tokens that are left; float64 has a coarse pass of its own. No launch waits for the host.
#pragma once

#include "nearest_decide.cuh"
#include "nearest_mma.cuh"
#ifdef VQKERNELS_SM90A  // built for sm_90a alone
#include "nearest_hopper.cuh"
#endif

namespace vqkernels::cuda {

// Codes and distances from the coarse pass's states. Without `exact`, float64's word is the last one.
template <int LANES, typename T, typename Launcher>
void settle(Launcher& launcher, const Search<T>& search, const States<T>& states,
            const Certificate<T>& certificate, int64_t* count, bool exact, int64_t* codes, float* distance) {
  int64_t tokens = search.x.count();
  Listed* listed = launcher.template allocate<Listed>(exact ? tokens : 0);
  launcher.launch(finish_kernel<T, LANES>, team_blocks(tokens, LANES), kTeamThreads, search, states,
                  certificate, exact, listed, count, codes, distance);
  if (!exact) return;
  launcher.launch(decide_kernel<T>, smaller(tokens, 8 * launcher.processors()), kDecideThreads, search,
                  states, listed, count, codes, distance);
}

template <int LANES, typename Launcher>
void nearest_of_doubles(Launcher& launcher, const Search<double>& search, bool exact, int64_t* codes,
                        float* distance) {
  int64_t tokens = search.x.count(), codebook_size = search.codebook_size, dim = search.x.dim;
  struct Zeroed {
    DoubleSummary summary;
    int64_t count;
  };
  Zeroed* zeroed = launcher.template allocate<Zeroed>(1);
  launcher.zero(zeroed, sizeof(Zeroed));
  double* unit = launcher.template allocate<double>(search.cosine ? codebook_size * dim : 0);
  PreparedDoubles prepared{search.cosine ? unit : search.codebook,
                           launcher.template allocate<double>(codebook_size), &zeroed->summary};
  int64_t blocks = smaller(team_blocks(codebook_size, 32), 4 * launcher.processors());
  launcher.launch(prepare_doubles_kernel<double>, blocks, kTeamThreads, search, prepared, unit);
  double* gaps = launcher.template allocate<double>(tokens);
  launcher.launch(bound_doubles_kernel<double, LANES>, team_blocks(tokens, LANES), kTeamThreads, search,
                  prepared, gaps);
  int64_t rows = ceil_div(codebook_size, kTileSize) * kTileSize;
  CoarsePlan plan = plan_coarse(kDoubleTile, tokens, rows, true, launcher.processors());
  Best<double>* best = launcher.template allocate<Best<double>>(tokens * plan.states());
  launcher.launch(double_kernel<double>, smaller(plan.items(), kMaxBlocks), kTileThreads, search, prepared,
                  plan, best);
  settle<LANES>(launcher, search, States<double>{best, plan, 1}, Certificate<double>{gaps}, &zeroed->count,
                exact, codes, distance);
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

template <bool SPLIT, int LANES, typename T, typename Launcher>
void nearest_of_floats(Launcher& launcher, const Search<T>& search, bool exact, int64_t* codes,
                       float* distance) {
  int64_t tokens = search.x.count(), dim = search.x.dim, depth = operand_depth<SPLIT>(dim);
  int64_t code_rows = ceil_div(search.codebook_size, kCodeRows) * kCodeRows;
  struct Zeroed {
    CodebookBound codebook;
    int64_t count;
  };
  Zeroed* zeroed = launcher.template allocate<Zeroed>(1);
  launcher.zero(zeroed, sizeof(Zeroed));
  int64_t most = 2 * launcher.processors();  // few, since each of them looks for the centre first
  int64_t code_blocks = smaller(team_blocks(code_rows, Terms<SPLIT>::kLanes), most);
  int64_t blocks = code_blocks + smaller(team_blocks(tokens, LANES), 2 * most);
  Prepared prepared{{nullptr, nullptr, nullptr, nullptr, tokens, code_rows, depth},
                    launcher.template allocate<float16>(tokens * depth),
                    launcher.template allocate<float16>(code_rows * depth),
                    launcher.template allocate<float>(SPLIT ? 0 : code_rows),
                    launcher.template allocate<float>(SPLIT ? 0 : tokens),
                    launcher.template allocate<TokenBound>(tokens),
                    &zeroed->codebook,
                    launcher.template allocate<float>(blocks * dim),
                    code_blocks};
  Operands& operands = prepared.operands;
  operands.tokens = prepared.tokens, operands.codes = prepared.codes;
  operands.bias = prepared.bias, operands.scale = prepared.scale;
  launcher.launch(prepare_kernel<T, SPLIT, LANES>, blocks, kTeamThreads, search, prepared);

  CoarsePass pass = run_coarse_pass<SPLIT>(launcher, operands);
  settle<LANES>(launcher, search, States<T>{pass.states, pass.plan, SPLIT ? kGranule : 1},
                Certificate<T>{prepared.bounds, prepared.codebook, depth}, &zeroed->count, exact, codes,
                distance);
}

// codes and distance of every token; -1 and NaN where the token, or anything in the codebook, is not finite.
template <typename T, typename Launcher>
void nearest(Launcher& launcher, Tokens<const T> x,  // [B, T, D]
             const T* codebook,                      // [K, D]
             int64_t codebook_size, bool cosine, bool exact,
             int64_t* codes,     // [B * T]
             float* distance) {  // [B * T]
  if (x.count() == 0) return;
  Search<T> search{x, codebook, codebook_size, cosine};
  bool one = x.tokens_adjacent();  // then neighbouring lanes take neighbouring tokens, each its own
  if constexpr (std::is_same<T, double>::value) {
    one ? nearest_of_doubles<1>(launcher, search, exact, codes, distance)
        : nearest_of_doubles<32>(launcher, search, exact, codes, distance);
  } else if (splits_terms(x.dim)) {
    one ? nearest_of_floats<true, 1>(launcher, search, exact, codes, distance)
        : nearest_of_floats<true, 8>(launcher, search, exact, codes, distance);
  } else {
    one ? nearest_of_floats<false, 1>(launcher, search, exact, codes, distance)
        : nearest_of_floats<false, 32>(launcher, search, exact, codes, distance);
  }
}

}  // namespace vqkernels::cuda
