// Nearest codes: scores in float32 (float64 for float64 inputs), a certificate for every token, and the exact
// road for the tokens that it does not cover. No launch waits for the host.
#pragma once

#include "nearest_decide.cuh"

namespace vqkernels::cuda {

// Takes the lowest score where the certificate holds (or none is wanted) and lists the token otherwise.
template <typename T, int LANES>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
certify_kernel(Search<T> search,
               const Best<Scalar<T>>* partial,  // [splits, B * T]
               int64_t splits,
               const double* gaps,  // [B * T]
               bool exact,
               int64_t* listed,  // [B * T]
               int64_t* count,
               int64_t* codes,     // [B * T]
               float* distance) {  // [B * T]
  int64_t tokens = search.x.count();
  bool leads = team_lane<LANES>() == 0;
  for (int64_t n = team_first<LANES>(); n < tokens; n += team_step<LANES>()) {
    double gap = gaps[n];
    Best<Scalar<T>> best = partial[n];
    for (int64_t split = 1; split < splits; ++split) best.merge(partial[split * tokens + n]);
    bool answerable = gap == gap;
    bool certain = !exact || static_cast<double>(best.second) - static_cast<double>(best.first) > gap;
    if (!answerable) {
      if (leads) codes[n] = -1, distance[n] = NAN;
    } else if (!certain) {
      if (leads) listed[atomic_increment(count)] = n;
    } else {
      int64_t code =
          best.code < search.codebook_size ? best.code : 0;  // without a certificate all scores may overflow
      double score = rough_score(search, search.x.row(n), search.codebook + code * search.x.dim,
                                 team_lane<LANES>(), LANES);
      if (!leads) continue;
      codes[n] = code;
      distance[n] = static_cast<float>(search.cosine ? std::fmax(1.0 + score, 0.0) : score);
    }
  }
}

template <typename T, typename Launcher>
PreparedCodebook<Scalar<T>> prepare_codebook(Launcher& launcher, const Search<T>& search) {
  using S = Scalar<T>;
  int64_t dim = search.x.dim, codebook_size = search.codebook_size;
  PreparedCodebook<S> prepared{
      launcher.template allocate<S>(dim), launcher.template allocate<S>(codebook_size * dim),
      launcher.template allocate<S>(codebook_size), launcher.template allocate<CodebookSummary>(1)};
  launcher.zero(prepared.summary, sizeof(CodebookSummary));
  if (search.cosine || std::is_same<T, double>::value) {  // float64 scores have nothing to gain from centring
    launcher.zero(prepared.mean, sizeof(S) * dim);
  } else {
    int64_t rows = codebook_size < kMeanBlocks * kMeanRows ? codebook_size : kMeanBlocks * kMeanRows;
    int64_t blocks = ceil_div(rows, kMeanRows);
    double* partial = launcher.template allocate<double>(blocks * dim);
    launcher.launch(sum_codes_kernel<T>, blocks, kTeamThreads, search, rows, partial);
    launcher.launch(finish_mean_kernel<S>, team_blocks(dim, 1), kTeamThreads, partial, blocks, rows, dim,
                    prepared.mean);
  }
  int64_t blocks = team_blocks(codebook_size, 32), most = 4 * launcher.processors();
  blocks = blocks < most ? blocks : most;
  if (search.cosine) {
    launcher.launch(prepare_codebook_kernel<T, true>, blocks, kTeamThreads, search, prepared);
  } else {
    launcher.launch(prepare_codebook_kernel<T, false>, blocks, kTeamThreads, search, prepared);
  }
  return prepared;
}

template <int LANES, typename T, typename Launcher>
void nearest_with_lanes(Launcher& launcher, const Search<T>& search, bool exact, int64_t* codes,
                        float* distance) {
  using S = Scalar<T>;
  int64_t tokens = search.x.count();
  PreparedCodebook<S> prepared = prepare_codebook(launcher, search);
  double* gaps = launcher.template allocate<double>(tokens);
  launcher.launch(bound_tokens_kernel<T, LANES>, team_blocks(tokens, LANES), kTeamThreads, search, prepared,
                  gaps);

  ScorePlan plan = plan_scores<S>(tokens, search.codebook_size, launcher.processors());
  Best<S>* partial = launcher.template allocate<Best<S>>(plan.splits * tokens);
  int64_t items = plan.token_tiles * plan.splits;
  launcher.launch(score_kernel<T>, items < kMaxBlocks ? items : kMaxBlocks, kTileThreads, search, prepared,
                  plan, partial);

  int64_t* listed = launcher.template allocate<int64_t>(tokens);
  int64_t* count = launcher.template allocate<int64_t>(1);
  launcher.zero(count, sizeof(int64_t));
  launcher.launch(certify_kernel<T, LANES>, team_blocks(tokens, LANES), kTeamThreads, search, partial,
                  plan.splits, gaps, exact, listed, count, codes, distance);
  if (!exact) return;
  int64_t most = 8 * launcher.processors();
  launcher.launch(decide_kernel<T>, tokens < most ? tokens : most, kDecideThreads, search, listed, count,
                  codes, distance);
}

// codes and distance of every token; -1 and NaN where the token, or anything in the codebook, is not finite.
template <typename T, typename Launcher>
void nearest(Launcher& launcher, Tokens<const T> x, const T* codebook, int64_t codebook_size, bool cosine,
             bool exact, int64_t* codes, float* distance) {
  if (x.count() == 0) return;
  Search<T> search{x, codebook, codebook_size, cosine};
  if (x.tokens_adjacent()) {
    nearest_with_lanes<1>(launcher, search, exact, codes, distance);
  } else {
    nearest_with_lanes<32>(launcher, search, exact, codes, distance);
  }
}

}  // namespace vqkernels::cuda
