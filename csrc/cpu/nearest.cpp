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
#include "codebook_rows.h"
#include "ops.h"
#include "search.h"
#include "snapshot.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t LARGEST_INT16_DIM = 8192;  // its error grows like the root of D, and so do the candidates
constexpr int64_t LARGEST_INT8_DIM = 1024;   // beyond it sums of int32 may overflow
constexpr int64_t SMALLEST_INT8_DIM = 64;    // below, tiles of as many dimensions are too empty
// Of the byte pass: beyond these D it has too many candidates or too few products to save time on, and below
// this K D what it saves is no more than what the candidates cost (measured on a Zen 3). The margin of
// SCORE_ROUNDING counts on the largest, too.
constexpr int64_t SMALLEST_BYTE_DIM = 64, LARGEST_BYTE_DIM = 1024;
constexpr int64_t FEWEST_BYTE_NUMBERS = 1 << 15;

void search_double(const Book<double>& book, const Tokens<const double>& tokens, const Outputs& out,
                   SearchReport* report) {
  struct Scratch {
    Buffer<double> row;
    DecideScratch<double> decide;
    Stopwatch watch;
  };
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

// The pass that the environment asks for, or null.
const char* asked_pass() {
  const char* name = std::getenv("VQKERNELS_CPU_PASS");
  return name != nullptr && name[0] != '\0' ? name : nullptr;
}

}  // namespace

const CoarsePass& choose_pass(const KernelTable& table, int64_t dim, bool exact) {
  const char* asked = asked_pass();
  const auto is = [&](const char* pass) { return asked != nullptr && std::strcmp(asked, pass) == 0; };
  if (asked != nullptr && !is("float32") && !is("int16") && !is("int8") && !is("byte")) {
    throw std::runtime_error(std::string("VQKERNELS_CPU_PASS: expected byte, int8, int16 or float32, got ") +
                             asked);
  }
  if (!exact || is("float32")) return *table.float32;
  if (is("int8") && dim <= LARGEST_INT8_DIM) return table.int8 != nullptr ? *table.int8 : *portable_int8();
  if (asked == nullptr && table.int8 != nullptr && dim >= SMALLEST_INT8_DIM && dim <= LARGEST_INT8_DIM)
    return *table.int8;
  return table.int16 != nullptr && dim <= LARGEST_INT16_DIM ? *table.int16 : *table.float32;
}

const CoarsePass& choose_first_pass(const KernelTable& table, int64_t size, int64_t dim, bool exact) {
  const CoarsePass& pass = choose_pass(table, dim, exact);
  if (table.byte == nullptr || !exact || dim > LARGEST_BYTE_DIM) return pass;
  const char* asked = asked_pass();
  const bool pays = table.byte_is_quicker && dim >= SMALLEST_BYTE_DIM && size * dim >= FEWEST_BYTE_NUMBERS;
  return (asked != nullptr ? std::strcmp(asked, "byte") == 0 : pays) ? *table.byte : pass;
}

void prepare(const KernelTable& table, const CoarsePass& pass, const CodebookRows<float>& dense, bool cosine,
             Panels spare, PreparedCodebook& prepared) {
  if (cosine) prepared.inverse_norm = dense.inverse_norms(table);
  const CodeRows codes{dense.rows, cosine ? prepared.inverse_norm.data() : nullptr, dense.size, dense.dim};
  prepared.coarse = pack_coarse(table, pass, codes, std::move(spare));
}

std::shared_ptr<const PreparedCodebook> current(const KernelTable& table, const CoarsePass& pass,
                                                const CodebookRows<float>& dense, const Tensor& codebook,
                                                bool cosine, SearchReport* report) {
  const auto fingerprint = [&] { return fingerprint_of(table, dense.rows, dense.size * dense.dim); };
  const PreparedKey key{fingerprint(), &pass, dense.size, dense.dim, cosine};
  const std::shared_ptr<const PreparedCodebook> kept = find_prepared(key);
  if (report != nullptr) report->from_cache = kept != nullptr;
  if (kept != nullptr) return kept;
  const void* tensor = codebook.const_data_ptr();
  const auto made = std::make_shared<PreparedCodebook>();
  made->fingerprint = key.fingerprint;
  prepare(table, pass, dense, cosine, take_outdated(key, tensor), *made);
  // not where somebody has written meanwhile: these panels would not be those of the fingerprint
  if (fingerprint() == key.fingerprint) keep_prepared(key, tensor, made);
  return made;
}

namespace {

template <class Element>
void search(const Tensor& x, const Tensor& codebook, bool cosine, bool exact, const Outputs& out,
            SearchReport* report) {
  const KernelTable& table = kernels();
  const Tokens<const Element> tokens = tokens_of<Element>(x);
  const auto dense = read_codebook<Element>(codebook, cosine);
  if constexpr (std::is_same_v<Element, double>) {
    if (report != nullptr) report->pass = "float64";
    check_codebook_finite(dense.finite());
    const std::vector<double> inverse = cosine ? dense.inverse_norms(table) : std::vector<double>();
    const double* norms = cosine ? inverse.data() : nullptr;
    const Book<double> book{&table, dense.rows, norms, dense.size, dense.dim, cosine, exact};
    search_double(book, tokens, out, report);
  } else {
    if (tokens.count() == 0) return check_codebook_finite(dense.finite());
    const CoarsePass& pass = choose_first_pass(table, dense.size, dense.dim, exact);
    std::shared_ptr<const PreparedCodebook> prepared;
    Stopwatch(report).time(Stage::PREPARE,
                           [&] { prepared = current(table, pass, dense, codebook, cosine, report); });
    if (report != nullptr) report->pass = pass.name;
    const double* norms = cosine ? prepared->inverse_norm.data() : nullptr;
    const Book<float> book{&table, dense.rows, norms, dense.size, dense.dim, cosine, exact};
    CoarseSearch<Element>(book, *prepared, tokens, out, report).run();
  }
}

struct Result {
  Tensor codes;     // [B, T]
  Tensor distance;  // [B, T]
};

Result new_result(const Tensor& x) {
  return {torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long),
          torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float)};
}

Outputs outputs_of(Result& result) {
  return {static_cast<int64_t*>(result.codes.mutable_data_ptr()),
          static_cast<float*>(result.distance.mutable_data_ptr())};
}

Result run(const Tensor& x, const Tensor& codebook, bool cosine, bool exact, SearchReport* report) {
  check_tokens(x, "x");
  check_codebook(codebook, x);
  Result result = new_result(x);
  const Outputs out = outputs_of(result);
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
  constexpr int64_t PASSES = 5;
  const char* names[PASSES] = {"byte", "int8", "int16", "float32", "float64"};
  Tensor numbers = torch::stable::new_empty(x, {STAGES + 7}, ScalarType::Double);
  double* out = static_cast<double*>(numbers.mutable_data_ptr());
  for (int i = 0; i < STAGES; ++i) out[i] = report.seconds[i];
  out[STAGES] = static_cast<double>(report.counts.certified);
  out[STAGES + 1] = static_cast<double>(report.counts.candidates);
  out[STAGES + 2] = static_cast<double>(report.counts.reranked);
  out[STAGES + 3] = static_cast<double>(report.counts.scanned);
  out[STAGES + 4] = static_cast<double>(report.counts.refined);
  out[STAGES + 5] = report.from_cache ? 1.0 : 0.0;
  out[STAGES + 6] = -1.0;
  for (int64_t i = 0; i < PASSES; ++i) {
    if (std::strcmp(report.pass, names[i]) == 0) out[STAGES + 6] = static_cast<double>(i);
  }
  return {result.codes, result.distance, numbers};
}

int64_t take_snapshot(Tensor codebook, bool cosine, bool exact) {
  check_rank(codebook, "codebook", 2, "[K, D]");
  check_floating(codebook, "codebook");
  check(codebook.size(0) >= 1 && codebook.size(1) >= 1, "codebook: expected K, D >= 1, got shape ",
        shape_of(codebook));
  const KernelTable& table = kernels();
  const auto snapshot = std::make_shared<Snapshot>(codebook, table, cosine, exact);
  dispatch_floating(codebook.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    if constexpr (std::is_same_v<Element, double>) {
      const auto& dense = snapshot->doubles.emplace(read_codebook<Element>(codebook, cosine));
      check_codebook_finite(dense.finite());
      if (cosine) snapshot->prepared.inverse_norm = dense.inverse_norms(table);
    } else {
      const auto& dense = snapshot->floats.emplace(read_codebook<Element>(codebook, cosine));
      prepare(table, choose_first_pass(table, dense.size, dense.dim, exact), dense, cosine, {},
              snapshot->prepared);
    }
  });
  return keep_snapshot(snapshot);
}

std::tuple<Tensor, Tensor> nearest_of_snapshot(Tensor x, int64_t number) {
  const std::shared_ptr<const Snapshot> snapshot = find_snapshot(number);
  check_snapshot(*snapshot, x);
  Result result = new_result(x);
  const Outputs out = outputs_of(result);
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    const Tokens<const Element> tokens = tokens_of<Element>(x);
    if constexpr (std::is_same_v<Element, double>) {
      search_double(snapshot->double_book(), tokens, out, nullptr);
    } else if (tokens.count() > 0) {
      const Book<float> book = snapshot->float_book();
      CoarseSearch<Element>(book, snapshot->prepared, tokens, out, nullptr).run();
    }
  });
  return {result.codes, result.distance};
}

const char* coarse_pass(int64_t size, int64_t dim, bool exact) noexcept {
  try {
    return choose_first_pass(kernels(), size, dim, exact).name;
  } catch (const std::runtime_error&) {
    return "?";
  }
}

double peak_rate(const char* pass) noexcept {
  try {
    const KernelTable& table = kernels();
    const CoarsePass* byte = &table != portable_kernels() ? table.byte : nullptr;  // not plain loops
    const CoarsePass* which = std::strcmp(pass, "byte") == 0    ? byte
                              : std::strcmp(pass, "int8") == 0  ? table.int8
                              : std::strcmp(pass, "int16") == 0 ? table.int16
                                                                : table.float32;
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
