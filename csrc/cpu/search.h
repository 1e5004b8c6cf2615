// What a search has to have of its codebook, for the ops that search.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>

#include "codebook_rows.h"
#include "prepared.h"
#include "report.h"

namespace vqkernels {
namespace cpu {

using torch::stable::Tensor;

// int8 where the CPU has it and `dim` suits it, else int16, else float32; VQKERNELS_CPU_PASS asks for one.
const CoarsePass& choose_pass(const KernelTable& table, int64_t dim, bool exact);

// The pass that `nearest` begins with: bytes where they pay, else the same.
const CoarsePass& choose_first_pass(const KernelTable& table, int64_t size, int64_t dim, bool exact);

// Throws where the codebook holds NaN or Inf. `spare` is memory that may be used again.
void prepare(const KernelTable& table, const CoarsePass& pass, const CodebookRows<float>& dense, bool cosine,
             Panels spare, PreparedCodebook& prepared);

// The codebook as it is now: kept from an earlier call, or prepared and kept.
std::shared_ptr<const PreparedCodebook> current(const KernelTable& table, const CoarsePass& pass,
                                                const CodebookRows<float>& dense, const Tensor& codebook,
                                                bool cosine, SearchReport* report);

}  // namespace cpu
}  // namespace vqkernels
