// Codebook rows of the chosen codes, and their squared error.
#pragma once

#include "tokens.cuh"

namespace vqkernels::cuda {

template <typename T, int LANES>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
gather_kernel(Tokens<const T> x,      // [B, T, D]
              const T* codebook,      // [K, D]
              int64_t codebook_size,  // K
              const int64_t* codes,   // [B * T]
              Tokens<T> quantized,    // [B, T, D]
              Scalar<T>* error) {     // [B * T]
  using S = Scalar<T>;
  T not_a_number;
  narrow(not_a_number, static_cast<S>(NAN));
  for (int64_t n = team_first<LANES>(); n < x.count(); n += team_step<LANES>()) {
    int64_t code = codes[n];
    bool valid = code >= 0 && code < codebook_size;
    const T* token = x.row(n);
    const T* chosen = codebook + (valid ? code : 0) * x.dim;
    T* out = quantized.row(n);
    S sum = 0;
    for (int64_t d = team_lane<LANES>(); d < x.dim; d += LANES) {
      T value = valid ? chosen[d] : not_a_number;
      S difference = widen(x.at(token, d)) - widen(value);
      sum = std::fma(difference, difference, sum);
      quantized.at(out, d) = value;
    }
    sum = team_sum<LANES>(sum);
    if (team_lane<LANES>() == 0) error[n] = sum;
  }
}

template <typename T, typename Launcher>
void gather(Launcher& launcher, Tokens<const T> x, const T* codebook, int64_t codebook_size,
            const int64_t* codes, Tokens<T> quantized, Scalar<T>* error) {
  int64_t n = x.count();
  if (n == 0) return;
  if (x.tokens_adjacent()) {
    launcher.launch(gather_kernel<T, 1>, team_blocks(n, 1), kTeamThreads, x, codebook, codebook_size, codes,
                    quantized, error);
  } else {
    launcher.launch(gather_kernel<T, 32>, team_blocks(n, 32), kTeamThreads, x, codebook, codebook_size, codes,
                    quantized, error);
  }
}

}  // namespace vqkernels::cuda
