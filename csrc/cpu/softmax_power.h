// 2^r for |r| <= 1/2 as 1 + r (C[0] + r (C[1] + ...)).
#pragma once

namespace vqkernels {
namespace cpu {
namespace {

template <class Word>
struct PowerSeries;

// The least largest relative error under the constraint of 1 at 0: 2e-9, 0.94 ulp with float's rounding.
template <>
struct PowerSeries<float> {
  static constexpr int TERMS = 6;
  static constexpr float C[TERMS] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6aee8p-5f,
                                     0x1.3b2d4cp-7f, 0x1.5f3e54p-10f, 0x1.41fbbcp-13f};
};

// Taylor's, log(2)^i / i!: what follows is below 2^-57.
template <>
struct PowerSeries<double> {
  static constexpr int TERMS = 13;
  static constexpr double C[TERMS] = {0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,  0x1.c6b08d704a0c0p-5,
                                      0x1.3b2ab6fba4e77p-7,  0x1.5d87fe78a6731p-10, 0x1.430912f86c787p-13,
                                      0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20, 0x1.b5253d395e7c4p-24,
                                      0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32, 0x1.c3bd650fc2986p-36,
                                      0x1.816193166d0f9p-40};
};

}  // namespace
}  // namespace cpu
}  // namespace vqkernels
