// The gradient of the quantized tokens with respect to the tokens: straight-through, or the rotation trick
// (Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick", section 4.2).
#pragma once

#include "tokens.cuh"

namespace vqkernels::cuda {

constexpr double kOppositeSquare = 1e-12;  // |u + v|^2 under it: u = -v, no direction lies between them

// One token's gradient is  dx = scale g + along_e e + along_q q + error (e - q).
// In double, where no square of a float over- or underflows.
struct RotationTerms {
  double scale;
  double along_e;
  double along_q;
};

// The sums over one token that the rotation needs; every lane of the team gets them.
//   lam (g - 2 (g.w) w + 2 (g.v) u)   with u = e/|e|, v = q/|q|, w = (u + v)/|u + v|, lam = |q|/|e|
template <typename T, int LANES>
VQ_DEVICE RotationTerms rotation_terms(Tokens<const T> x, Tokens<const T> quantized,
                                       Tokens<const T> dquantized, const T* e_row, const T* q_row,
                                       const T* g_row) {
  double ee = 0, qq = 0, gq = 0;
  for (int64_t d = team_lane<LANES>(); d < x.dim; d += LANES) {
    double e = widen(x.at(e_row, d)), q = widen(quantized.at(q_row, d)), g = widen(dquantized.at(g_row, d));
    ee = std::fma(e, e, ee);
    qq = std::fma(q, q, qq);
    gq = std::fma(g, q, gq);
  }
  double norm_e = std::sqrt(team_sum<LANES>(ee)), norm_q = std::sqrt(team_sum<LANES>(qq));
  gq = team_sum<LANES>(gq);
  bool rotates = norm_e != 0 && norm_q != 0;
  double inverse_e = rotates ? 1 / norm_e : 0, inverse_q = rotates ? 1 / norm_q : 0;
  double square = 0, g_middle = 0;  // |u + v|^2 term by term: 2 + 2 cos would cancel where u is near -v
  for (int64_t d = team_lane<LANES>(); d < x.dim; d += LANES) {
    double middle = widen(x.at(e_row, d)) * inverse_e + widen(quantized.at(q_row, d)) * inverse_q;
    square = std::fma(middle, middle, square);
    g_middle = std::fma(static_cast<double>(widen(dquantized.at(g_row, d))), middle, g_middle);
  }
  square = team_sum<LANES>(square);
  g_middle = team_sum<LANES>(g_middle);
  if (!rotates) return {1, 0, 0};
  double lam = norm_q * inverse_e;
  double reflect = square < kOppositeSquare ? 0 : -2 * g_middle / square;
  return {lam, lam * inverse_e * (reflect + 2 * gq * inverse_q), lam * inverse_q * reflect};
}

template <typename T, int LANES>
VQ_KERNEL(kTeamThreads, kTeamBlocks)
quantize_backward_kernel(Tokens<const T> x,           // [B, T, D]
                         Tokens<const T> quantized,   // [B, T, D]
                         const int64_t* codes,        // [B * T]
                         Tokens<const T> dquantized,  // [B, T, D], data null: zero
                         const Scalar<T>* derror,     // [B * T] or null: zero
                         bool rotation,
                         Tokens<T> dx,        // [B, T, D]
                         const bool* mask) {  // [B * T] or null: all tokens are real
  using S = Scalar<T>;
  for (int64_t n = team_first<LANES>(); n < x.count(); n += team_step<LANES>()) {
    const bool given = dquantized.data != nullptr, real = mask == nullptr || mask[n];
    const T *e_row = x.row(n), *q_row = quantized.row(n), *g_row = given ? dquantized.row(n) : nullptr;
    T* out = dx.row(n);
    bool valid = real && codes[n] >= 0;
    RotationTerms terms{1, 0, 0};
    if (rotation && given) terms = rotation_terms<T, LANES>(x, quantized, dquantized, e_row, q_row, g_row);
    S pull = derror == nullptr ? S(0) : 2 * derror[n];
    for (int64_t d = team_lane<LANES>(); d < x.dim; d += LANES) {
      T gradient = given && real ? dquantized.at(g_row, d) : T{};
      if (valid) {
        S e = widen(x.at(e_row, d)), q = widen(quantized.at(q_row, d));
        S turned = widen(gradient);
        if (rotation && given) {
          turned = static_cast<S>(terms.scale * turned + terms.along_e * e + terms.along_q * q);
        }
        narrow(gradient, turned + pull * (e - q));
      }
      dx.at(out, d) = gradient;
    }
  }
}

template <typename T, typename Launcher>
void quantize_backward(Launcher& launcher, Tokens<const T> x, Tokens<const T> quantized, const int64_t* codes,
                       Tokens<const T> dquantized, const Scalar<T>* derror, bool rotation, Tokens<T> dx,
                       const bool* mask = nullptr) {
  int64_t n = x.count();
  if (n == 0) return;
  if (x.tokens_adjacent()) {
    launcher.launch(quantize_backward_kernel<T, 1>, team_blocks(n, 1), kTeamThreads, x, quantized, codes,
                    dquantized, derror, rotation, dx, mask);
  } else {
    launcher.launch(quantize_backward_kernel<T, 32>, team_blocks(n, 32), kTeamThreads, x, quantized, codes,
                    dquantized, derror, rotation, dx, mask);
  }
}

}  // namespace vqkernels::cuda
