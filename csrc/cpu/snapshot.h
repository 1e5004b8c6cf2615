// Codebooks that were prepared on request and do not change: kept until they are released, and known by a
// number. Searching one takes no fingerprint and packs nothing, but for a second form of the codes where the
// first needs one (`finer` in prepared.h): once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "codebook_rows.h"
#include "kernel_table.h"
#include "prepared.h"

namespace vqkernels {
namespace cpu {

using torch::stable::Tensor;

struct Snapshot {
  Tensor codebook;           // [K, D], its memory; the caller has given his word that nobody writes to it
  const KernelTable* table;  // of its preparation, and so the pass: the environment may say otherwise later
  bool cosine;
  bool exact;
  std::optional<CodebookRows<float>> floats;    // of float32 and the 16-bit types
  std::optional<CodebookRows<double>> doubles;  // of float64
  PreparedCodebook prepared;                    // of `doubles` only the norms

  Snapshot(const Tensor& codebook, const KernelTable& table, bool cosine, bool exact)
      : codebook(codebook), table(&table), cosine(cosine), exact(exact) {}
  Book<float> float_book() const { return book_of(*floats); }
  Book<double> double_book() const { return book_of(*doubles); }

 private:
  template <class Row>
  Book<Row> book_of(const CodebookRows<Row>& dense) const {
    const double* inverse = cosine ? prepared.inverse_norm.data() : nullptr;
    return {table, dense.rows, inverse, dense.size, dense.dim, cosine, exact};
  }
};

// A number that no other snapshot of this process has had.
int64_t keep_snapshot(std::shared_ptr<const Snapshot> snapshot);

// Throws where there is none of that number.
std::shared_ptr<const Snapshot> find_snapshot(int64_t number);

// A search that is still running keeps its own hold.
void release_snapshot(int64_t number) noexcept;

// Throws unless x [B, T, D] has the snapshot's element type and D.
void check_snapshot(const Snapshot& snapshot, const Tensor& x);

}  // namespace cpu
}  // namespace vqkernels
