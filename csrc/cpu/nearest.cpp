// Nearest-code search: float64 inputs token by token, all others by way of a coarse pass (coarse_search.h).
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "coarse_search.h"
#include "ops.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t LARGEST_INT16_DIM = 8192;  // its error grows like the root of D, and so do the candidates

// Power of two that brings the largest entry of a float64 row to [1, 2): directions survive any scale.
void scale_direction(double* row, int64_t dim) {
  const exact::ScaledVector scale = exact::scale_vector(row, 1, dim);
  for (int64_t d = 0; d < dim; ++d) row[d] = row[d] * scale.factor * scale.factor2;
}

// The codebook as dense rows of float or double.
template <class Element>
struct DenseCodebook {
  using Row = Wide<Element>;
  Buffer<Row> copy;
  const Row* rows;  // [K, D]
  int64_t size;
  int64_t dim;

  DenseCodebook(const Tensor& codebook, bool cosine)
      : copy(0), size(codebook.size(0)), dim(codebook.size(1)) {
    const Tokens<const Element> view{static_cast<const Element*>(codebook.const_data_ptr()),
                                     1,
                                     size,
                                     dim,
                                     0,
                                     codebook.stride(0),
                                     codebook.stride(1)};
    const bool scaled = cosine && std::is_same_v<Row, double>;
    if constexpr (std::is_same_v<Row, Element>) rows = view.data;
    if (std::is_same_v<Row, Element> && codebook.is_contiguous() && !scaled) return;
    copy = Buffer<Row>(size * dim);
    rows = copy.get();
    for_each_range(size, 1024, 4.0 * size * dim, [&](int64_t begin, int64_t end) {
      load_rows(view, begin, end, &copy[begin * dim]);
      if constexpr (std::is_same_v<Row, double>) {
        for (int64_t k = begin; k < end && scaled; ++k) scale_direction(&copy[k * dim], dim);
      }
    });
  }

  std::vector<double> inverse_norms(const KernelTable& table) const {
    std::vector<double> inverse(size);
    for_each_range(size, 256, 8.0 * size * dim, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) inverse[k] = inverse_norm_of(table, rows + k * dim, dim);
    });
    return inverse;
  }
};

void search_double(const KernelTable& table, const DenseCodebook<double>& dense, bool cosine, bool exact,
                   const Tokens<const double>& tokens, const Outputs& out, SearchReport* report) {
  struct Scratch {
    Buffer<double> row;
    DecideScratch<double> decide;
    Stopwatch watch;
  };
  check_codebook_finite(all_finite(dense.rows, dense.size * dense.dim));
  const std::vector<double> inverse = cosine ? dense.inverse_norms(table) : std::vector<double>();
  const Book<double> book{&table, dense.rows, cosine ? inverse.data() : nullptr, dense.size, dense.dim,
                          cosine, exact};
  for_each_item<Scratch>(
      tokens.count(), 4.0 * tokens.count() * book.size * book.dim,
      [&] { return Scratch{Buffer<double>(book.dim), DecideScratch<double>(), Stopwatch(report)}; },
      [&](int64_t n, Scratch& scratch) {
        scratch.watch.time(Stage::SCAN, [&] {
          double* row = scratch.row.get();
          load_rows(tokens, n, n + 1, row);
          if (!all_finite(row, book.dim)) return write_invalid(out, n);
          if (book.cosine) scale_direction(row, book.dim);
          scan(book, row, scratch.decide, out, n);
          ++scratch.watch.counts.scanned;
        });
      });
}

// int16 where the CPU has it; VQKERNELS_CPU_PASS asks for one of them.
const CoarsePass& choose_pass(const KernelTable& table, int64_t dim, bool exact) {
  const char* name = std::getenv("VQKERNELS_CPU_PASS");
  const bool asked = name != nullptr && name[0] != '\0';
  if (asked && std::strcmp(name, "float32") != 0 && std::strcmp(name, "int16") != 0) {
    throw std::runtime_error(std::string("VQKERNELS_CPU_PASS: expected int16 or float32, got ") + name);
  }
  const bool wanted = !asked || std::strcmp(name, "int16") == 0;
  return exact && wanted && table.int16 != nullptr && dim <= LARGEST_INT16_DIM ? *table.int16
                                                                               : *table.float32;
}

template <class Element>
std::shared_ptr<PreparedCodebook> prepare(const KernelTable& table, const CoarsePass& pass,
                                          const DenseCodebook<Element>& dense, bool cosine, Panels spare) {
  std::vector<double> inverse = cosine ? dense.inverse_norms(table) : std::vector<double>();
  const CodeRows codes{dense.rows, cosine ? inverse.data() : nullptr, dense.size, dense.dim};
  auto prepared = std::make_shared<PreparedCodebook>();
  prepared->coarse = pack_coarse(table, pass, codes, std::move(spare));
  prepared->inverse_norm = std::move(inverse);
  return prepared;
}

template <class Element>
void search(const Tensor& x, const Tensor& codebook, bool cosine, bool exact, const Outputs& out,
            SearchReport* report) {
  const KernelTable& table = kernels();
  const Tokens<const Element> tokens = tokens_of<Element>(x);
  const DenseCodebook<Element> dense(codebook, cosine);
  if constexpr (std::is_same_v<Element, double>) {
    if (report != nullptr) report->pass = "float64";
    search_double(table, dense, cosine, exact, tokens, out, report);
  } else {
    if (tokens.count() == 0) return check_codebook_finite(all_finite(dense.rows, dense.size * dense.dim));
    const CoarsePass& pass = choose_pass(table, dense.dim, exact);
    std::shared_ptr<const PreparedCodebook> prepared;
    Stopwatch(report).time(Stage::PREPARE, [&] {
      const auto fingerprint = [&] { return fingerprint_of(table, dense.rows, dense.size * dense.dim); };
      const PreparedKey key{fingerprint(), &pass, dense.size, dense.dim, cosine};
      prepared = find_prepared(key);
      if (report != nullptr) report->from_cache = prepared != nullptr;
      if (prepared != nullptr) return;
      const void* tensor = codebook.const_data_ptr();
      const auto made = prepare(table, pass, dense, cosine, take_outdated(key, tensor));
      prepared = made;
      // not where somebody has written meanwhile: these panels would not be those of the fingerprint
      if (fingerprint() == key.fingerprint) keep_prepared(key, tensor, made);
    });
    if (report != nullptr) report->pass = pass.name;
    const double* inverse = cosine ? prepared->inverse_norm.data() : nullptr;
    const Book<float> book{&table, dense.rows, inverse, dense.size, dense.dim, cosine, exact};
    CoarseSearch<Element>(book, *prepared, tokens, out, report).run();
  }
}

struct Result {
  Tensor codes;     // [B, T]
  Tensor distance;  // [B, T]
};

Result run(const Tensor& x, const Tensor& codebook, bool cosine, bool exact, SearchReport* report) {
  check_tokens(x, "x");
  check_codebook(codebook, x);
  Result result{torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long),
                torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float)};
  const Outputs out{static_cast<int64_t*>(result.codes.mutable_data_ptr()),
                    static_cast<float*>(result.distance.mutable_data_ptr())};
  dispatch_floating(x.scalar_type(), [&](auto element) {
    search<decltype(element)>(x, codebook, cosine, exact, out, report);
  });
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor> nearest(Tensor x, Tensor codebook, bool cosine, bool exact) {
  Result result = run(x, codebook, cosine, exact, nullptr);
  return {result.codes, result.distance};
}

std::tuple<Tensor, Tensor, Tensor> nearest_report(Tensor x, Tensor codebook, bool cosine, bool exact) {
  SearchReport report;
  Result result = run(x, codebook, cosine, exact, &report);
  constexpr int64_t PASSES = 3;
  const char* names[PASSES] = {"int16", "float32", "float64"};
  Tensor numbers = torch::stable::new_empty(x, {STAGES + 6}, ScalarType::Double);
  double* out = static_cast<double*>(numbers.mutable_data_ptr());
  for (int i = 0; i < STAGES; ++i) out[i] = report.seconds[i];
  out[STAGES] = static_cast<double>(report.counts.certified);
  out[STAGES + 1] = static_cast<double>(report.counts.candidates);
  out[STAGES + 2] = static_cast<double>(report.counts.reranked);
  out[STAGES + 3] = static_cast<double>(report.counts.scanned);
  out[STAGES + 4] = report.from_cache ? 1.0 : 0.0;
  out[STAGES + 5] = -1.0;
  for (int64_t i = 0; i < PASSES; ++i) {
    if (std::strcmp(report.pass, names[i]) == 0) out[STAGES + 5] = static_cast<double>(i);
  }
  return {result.codes, result.distance, numbers};
}

const char* coarse_pass(int64_t dim, bool exact) noexcept {
  try {
    return choose_pass(kernels(), dim, exact).name;
  } catch (const std::runtime_error&) {
    return "?";
  }
}

double peak_rate(const char* pass) noexcept {
  try {
    const KernelTable& table = kernels();
    const CoarsePass* which = std::strcmp(pass, "int16") == 0 ? table.int16 : table.float32;
    if (which == nullptr) return 0.0;
    which->run_peak(1 << 16);  // wakes the vector units
    const auto begin = std::chrono::steady_clock::now();
    const double operations =
        which->run_peak(3 << 20);  // about 10 ms: as a sample of a search, not a luckier one
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    return operations / spent.count();
  } catch (const std::runtime_error&) {
    return 0.0;
  }
}

}  // namespace cpu
}  // namespace vqkernels
