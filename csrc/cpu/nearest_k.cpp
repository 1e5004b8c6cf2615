// The k nearest codes of every token: the coarse pass of `nearest` (coarse_search.h), of which every granule
// is kept that may hold one of the k, then float64 values of their codes, then error-free arithmetic where
// those tie.
//
// A granule's least score, plus the pass's error, bounds the score of one code from above. The k-th least of
// these bounds, over granules that share no code, is above the k-th least score; so what has its lower bound
// above that is none of the k.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../exact.h"
#include "coarse.h"
#include "coarse_tokens.h"
#include "codebook_rows.h"
#include "decide.h"
#include "kernel_table.h"
#include "ops.h"
#include "parallel.h"
#include "search.h"
#include "snapshot.h"
#include "tokens.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int64_t TOKENS = 96;       // that share a block of panels in the cache
constexpr int64_t FIRST_PIECE = 64;  // granules, a multiple of every pass's lanes
constexpr int64_t ROOM = 4;          // times k candidates, before those that are beaten are dropped

// ---------------------------------------------------------------------------------------- order

struct Valued {
  double value;
  int64_t code;
  bool operator<(const Valued& other) const {
    return value < other.value || (value == other.value && code < other.code);
  }
};

template <class Row>
struct RankScratch {
  std::vector<int64_t> codes;
  std::vector<double> values;
  std::vector<Valued> order;
};

// Sorts values that float64 cannot tell apart by the real numbers; only the first `wanted` need be right.
template <class Row>
void rank_tied_distances(const Book<Row>& book, const Token<Row>& token, Valued* tied, int64_t count,
                         int64_t wanted) {
  std::partial_sort(
      tied, tied + std::min(wanted, count), tied + count, [&](const Valued& a, const Valued& b) {
        int sign = 0;
        if (!same_row(book, a.code, b.code)) {
          sign = exact::compare_euclidean(token.row, 1, book.row(a.code), 1, book.row(b.code), 1, book.dim);
        }
        return sign < 0 || (sign == 0 && a.code < b.code);
      });
}

// Again and again the lowest index among those within 2^-90 of the largest cosine that is left.
template <class Row>
void rank_tied_cosines(const Book<Row>& book, const Token<Row>& token, Valued* tied, int64_t count,
                       int64_t wanted) {
  const exact::ScaledVector x_scale = exact::scale_vector(token.row, 1, book.dim);
  std::vector<exact::DoubleDouble> cosines(count);
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0 && same_row(book, tied[i - 1].code, tied[i].code)) {
      cosines[i] = cosines[i - 1];
      continue;
    }
    const Row* row = book.row(tied[i].code);
    cosines[i] =
        exact::cosine(token.row, 1, x_scale, row, 1, exact::scale_vector(row, 1, book.dim), book.dim);
  }
  for (int64_t place = 0; place < std::min(wanted, count); ++place) {
    exact::DoubleDouble largest = cosines[place];
    for (int64_t i = place + 1; i < count; ++i) {
      if (exact::less(largest, cosines[i])) largest = cosines[i];
    }
    const exact::DoubleDouble limit = exact::add(largest, {-exact::cosine_tie(), 0.0});
    int64_t best = -1;
    for (int64_t i = place; i < count; ++i) {
      if (!exact::less(cosines[i], limit) && (best < 0 || tied[i].code < tied[best].code)) best = i;
    }
    std::swap(tied[place], tied[best]);
    std::swap(cosines[place], cosines[best]);
  }
}

struct KOutputs {
  int64_t* codes;   // [N, k]
  float* distance;  // [N, k]
  int64_t k;

  void write_invalid(int64_t n) const {
    std::fill_n(codes + n * k, k, int64_t{-1});
    std::fill_n(distance + n * k, k, std::numeric_limits<float>::quiet_NaN());
  }
};

// The k nearest of scratch.order, whose values are set; at least k of them, no code twice.
template <class Row>
void rank_token(const Book<Row>& book, const Token<Row>& token, RankScratch<Row>& scratch,
                const KOutputs& out, int64_t n) {
  std::vector<Valued>& order = scratch.order;
  const int64_t count = static_cast<int64_t>(order.size());
  std::nth_element(order.begin(), order.begin() + (out.k - 1), order.end());
  const double reach = tie_limit(order[out.k - 1].value, book.dim, book.cosine);
  const auto beyond =
      std::partition(order.begin() + out.k, order.end(), [&](const Valued& v) { return !(v.value > reach); });
  // what ties with one beyond the k-th ties with the k-th too, or comes after it
  const int64_t near = beyond - order.begin();
  std::sort(order.begin(), order.begin() + near);
  for (int64_t first = 0; first < out.k && first < count;) {
    int64_t end = first + 1;
    while (end < near && !(order[end].value > tie_limit(order[end - 1].value, book.dim, book.cosine))) ++end;
    if (end - first > 1) {
      const auto rank = book.cosine ? rank_tied_cosines<Row> : rank_tied_distances<Row>;
      rank(book, token, &order[first], end - first, out.k - first);
    }
    first = end;
  }
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < out.k; ++j) {
    largest = std::max(largest, order[j].value);  // values of ties may be rounded out of order
    out.codes[n * out.k + j] = order[j].code;
    out.distance[n * out.k + j] = distance_of(largest, book.cosine);
  }
}

// Values of scratch.codes, or of all codes, and then their order.
template <class Row>
void value_and_rank(const Book<Row>& book, const Row* row, bool all, RankScratch<Row>& scratch,
                    const KOutputs& out, int64_t n) {
  const Token<Row> token = make_token(book, row);
  if (all) {
    scratch.codes.resize(book.size);
    std::iota(scratch.codes.begin(), scratch.codes.end(), int64_t{0});
  }
  const int64_t count = static_cast<int64_t>(scratch.codes.size());
  scratch.values.resize(count);
  values_of(book, token, scratch.codes.data(), count, scratch.values.data());
  if (book.cosine && token.inverse_norm == 0.0) std::fill_n(scratch.values.data(), count, 0.0);
  scratch.order.resize(count);
  for (int64_t i = 0; i < count; ++i) scratch.order[i] = {scratch.values[i], scratch.codes[i]};
  rank_token(book, token, scratch, out, n);
}

// ---------------------------------------------------------------------------------------- the coarse pass

struct Kept {
  double lower;  // no code of the granule has a lower real score
  int32_t block;
  int32_t granule;
};

enum class Way : int32_t { COARSE, ALL, INVALID };

struct KState {
  Way way = Way::COARSE;
  double limit = std::numeric_limits<double>::infinity();  // the k-th least score is not above it
  std::vector<double> uppers;                              // bounds below the limit, the k least among them
  std::vector<Kept> kept;

  void start() {
    way = Way::COARSE;
    limit = std::numeric_limits<double>::infinity();
    uppers.clear();
    kept.clear();
  }

  void bound_by(double upper, int64_t k) {
    if (!(upper < limit)) return;
    uppers.push_back(upper);
    if (static_cast<int64_t>(uppers.size()) >= 2 * k + 32) settle(k);
  }

  // Leaves the k least bounds; the largest of them is the limit.
  void settle(int64_t k) {
    if (static_cast<int64_t>(uppers.size()) < k) return;
    std::nth_element(uppers.begin(), uppers.begin() + (k - 1), uppers.end());
    uppers.resize(k);
    limit = uppers[k - 1];
  }

  void drop_beaten() {
    std::erase_if(kept, [&](const Kept& each) { return !(each.lower <= limit); });
  }
};

template <class Element>
class KSearch {
 public:
  KSearch(const Book<float>& book, const CoarseBook& coarse, const Tokens<const Element>& tokens,
          const KOutputs& out)
      : book_(book),
        coarse_(coarse),
        pass_(*coarse.pass),
        tokens_(tokens),
        out_(out),
        rows_(ceil_div(TOKENS, pass_.rows) * pass_.rows) {
    for (const CoarseBlock& block : coarse_.blocks) most_ = std::max(most_, coarse_.granules(block));
  }

  void run() {
    const double operations = 2.0 * tokens_.count() * coarse_.size * coarse_.dim;
    for_each_item<Scratch>(
        ceil_div(tokens_.count(), rows_), operations,
        [&] {
          return Scratch{Buffer<float>(rows_ * book_.dim),
                         Buffer<char>(rows_ / pass_.rows * coarse_.tile_bytes()),
                         Buffer<char>(pass_.rows * most_ * pass_.word_bytes),
                         std::vector<int32_t>(most_),
                         std::vector<double>(most_),
                         std::vector<ScalePair>(rows_),
                         std::vector<double>(rows_),
                         std::vector<TokenBound>(rows_),
                         std::vector<KState>(rows_),
                         RankScratch<float>()};
        },
        [&](int64_t item, Scratch& scratch) { search(item * rows_, scratch); });
  }

 private:
  struct Scratch {
    Buffer<float> rows;   // [tokens, D], where they do not lie so already
    Buffer<char> tiles;   // [tokens / tile, tile_words]
    Buffer<char> scores;  // [tile, granules of a block]
    std::vector<int32_t> found;
    std::vector<double> values;
    std::vector<ScalePair> scales;   // [tokens]
    std::vector<double> norms;       // [tokens], after centring and scaling
    std::vector<TokenBound> bounds;  // [tokens]
    std::vector<KState> states;      // [tokens]
    RankScratch<float> rank;
    RowBlock<const float> given{nullptr, 0};
    int64_t count = 0;
  };

  void search(int64_t first, Scratch& scratch) {
    scratch.count = std::min(rows_, tokens_.count() - first);
    scratch.given = read_rows(tokens_, first, first + scratch.count, scratch.rows.get());
    for (int64_t i = 0; i < scratch.count; ++i) scratch.states[i].start();
    int32_t packed_for = -1;
    for (size_t b = 0; b < coarse_.blocks.size(); ++b) {
      const CoarseBlock& block = coarse_.blocks[b];
      if (block.scale != packed_for) pack_tokens(coarse_.scales[block.scale], scratch);
      packed_for = block.scale;
      for (int64_t base = 0; base < scratch.count; base += pass_.rows) {
        score(static_cast<int32_t>(b), block, base, scratch);
      }
    }
    for (int64_t i = 0; i < scratch.count; ++i) finish(first + i, i, scratch);
  }

  void pack_tokens(const CoarseScale& scale, Scratch& scratch) {
    const Packing packing = coarse_.packing(scale, scratch.given[scratch.count - 1] + book_.dim);
    for (int64_t i = 0; i < scratch.count; ++i) measure(packing, i, scratch);
    for (int64_t base = 0; base < scratch.count; base += pass_.rows) {
      const int64_t count = std::min<int64_t>(pass_.rows, scratch.count - base);
      char* tile = scratch.tiles.get() + base / pass_.rows * coarse_.tile_bytes();
      std::fill_n(tile, coarse_.tile_bytes(), char{0});
      const double largest =
          *std::max_element(scratch.norms.begin() + base, scratch.norms.begin() + base + count);
      for (int64_t i = base; i < base + count; ++i) {
        if (scratch.states[i].way != Way::COARSE) continue;
        pass_.pack_token(scratch.given[i], scaled_by(packing, scratch.scales[i]), scratch.norms[i], largest,
                         static_cast<int>(i - base), tile, &scratch.bounds[i]);
        if (!book_.cosine) scratch.bounds[i].unit *= scale.square;
      }
    }
  }

  void measure(const Packing& packing, int64_t i, Scratch& scratch) const {
    const float* row = scratch.given[i];
    const MeasuredToken token = measure_token(*book_.table, packing, row);
    scratch.scales[i] = token.scale;
    scratch.norms[i] = token.norm;
    if (!token.scorable) scratch.states[i].way = all_finite(row, book_.dim) ? Way::ALL : Way::INVALID;
  }

  void score(int32_t b, const CoarseBlock& block, int64_t base, Scratch& scratch) const {
    const int64_t rows = std::min<int64_t>(pass_.rows, scratch.count - base);
    const int64_t granules = coarse_.granules(block);
    double least[64];
    pass_.score_panels(scratch.tiles.get() + base / pass_.rows * coarse_.tile_bytes(),
                       coarse_.panels.memory.get() + block.first_panel * coarse_.panel_bytes(), block.count,
                       book_.dim, coarse_.group, scratch.scores.get(), least, nullptr);
    for (int64_t i = 0; i < rows; ++i) {
      KState& state = scratch.states[base + i];
      const TokenBound& bound = scratch.bounds[base + i];
      if (state.way != Way::COARSE) continue;
      const double error = error_of(bound, block.bound);
      const double reach = block.bound.largest;
      if (!((bound.norm + reach) * reach + error < pass_.largest_score)) {
        state.way = Way::ALL;
        continue;
      }
      collect(b, block, scratch.scores.get() + i * granules * pass_.word_bytes, error, bound.unit, state,
              scratch);
    }
  }

  // Scores carry a few roundings of float64 from one unit to another: 2^-48 of their size covers them.
  static double above(double value) { return value + std::fabs(value) * 0x1p-48; }
  static double below(double value) { return value - std::fabs(value) * 0x1p-48; }

  // In pieces that grow: the first one sets a limit, which leaves little of the others.
  void collect(int32_t b, const CoarseBlock& block, const char* scores, double error, double unit,
               KState& state, Scratch& scratch) const {
    const int64_t granules = coarse_.granules(block);
    int64_t piece = ceil_div(std::max(FIRST_PIECE, 2 * out_.k), FIRST_PIECE) * FIRST_PIECE;
    if (std::isfinite(state.limit)) piece = granules;
    for (int64_t first = 0; first < granules; first += piece, piece *= 4) {
      piece = std::min(piece, granules - first);
      const double limit = above(above(state.limit * unit) + error);
      const int64_t number = pass_.find_scores(scores + first * pass_.word_bytes, piece, limit,
                                               scratch.found.data(), scratch.values.data(), most_);
      keep(b, block, static_cast<int32_t>(first), number, error, unit, state, scratch);
    }
  }

  void keep(int32_t b, const CoarseBlock& block, int32_t first, int64_t number, double error, double unit,
            KState& state, Scratch& scratch) const {
    const double real = 1.0 / unit;
    for (int64_t i = 0; i < number; ++i) {
      if (is_whole(block, first + scratch.found[i]))
        state.bound_by(above(above(scratch.values[i] + error) * real), out_.k);
    }
    state.settle(out_.k);
    for (int64_t i = 0; i < number; ++i) {
      const int32_t granule = first + scratch.found[i];
      if (coarse_.group == 0 && granule >= block.codes) break;  // the same codes again
      const double lower = below(below(scratch.values[i] - error) * real);
      if (lower <= state.limit) state.kept.push_back({lower, b, granule});
    }
    if (static_cast<int64_t>(state.kept.size()) > ROOM * out_.k + 256) state.drop_beaten();
  }

  // Whether none of a granule's slots holds a code that another granule has, too.
  bool is_whole(const CoarseBlock& block, int64_t granule) const {
    if (coarse_.group == 0) return granule < block.codes;
    const int64_t first = granule / pass_.lanes * coarse_.group, lane = granule % pass_.lanes;
    const int64_t last = std::min(block.count, first + coarse_.group) - 1;
    return last * coarse_.width + lane + (pass_.vectors - 1) * pass_.lanes < block.codes;
  }

  void finish(int64_t n, int64_t i, Scratch& scratch) const {
    KState& state = scratch.states[i];
    if (state.way == Way::INVALID) return out_.write_invalid(n);
    std::vector<int64_t>& codes = scratch.rank.codes;
    codes.clear();
    if (state.way == Way::COARSE) {
      state.drop_beaten();
      for (const Kept& each : state.kept) {
        coarse_.for_codes(coarse_.blocks[each.block], each.granule, [&](int64_t k) { codes.push_back(k); });
      }
      std::sort(codes.begin(), codes.end());
      codes.erase(std::unique(codes.begin(), codes.end()), codes.end());
    }
    value_and_rank(book_, scratch.given[i], state.way == Way::ALL, scratch.rank, out_, n);
  }

  const Book<float>& book_;
  const CoarseBook& coarse_;
  const CoarsePass& pass_;
  const Tokens<const Element>& tokens_;
  const KOutputs& out_;
  const int64_t rows_;  // tokens of a piece of work
  int64_t most_ = 0;    // granules of a block
};

// ---------------------------------------------------------------------------------------- by type

void search_double(const Book<double>& book, const Tokens<const double>& tokens, const KOutputs& out) {
  struct Scratch {
    Buffer<double> row;
    RankScratch<double> rank;
  };
  for_each_item<Scratch>(
      tokens.count(), 4.0 * tokens.count() * book.size * book.dim,
      [&] { return Scratch{Buffer<double>(book.dim), RankScratch<double>()}; },
      [&](int64_t n, Scratch& scratch) {
        double* row = scratch.row.get();
        load_rows(tokens, n, n + 1, row);
        if (!all_finite(row, book.dim)) return out.write_invalid(n);
        if (book.cosine) scale_direction(row, book.dim);
        value_and_rank(book, static_cast<const double*>(row), true, scratch.rank, out, n);
      });
}

template <class Element>
void search(const Tensor& x, const Tensor& codebook, bool cosine, const KOutputs& out) {
  using Row = Wide<Element>;
  const KernelTable& table = kernels();
  const Tokens<const Element> tokens = tokens_of<Element>(x);
  const CodebookRows<Row> dense = read_codebook<Element>(codebook, cosine);
  check_codebook_finite(dense.finite());
  const std::vector<double> inverse = cosine ? dense.inverse_norms(table) : std::vector<double>();
  const double* norms = cosine ? inverse.data() : nullptr;
  const Book<Row> book{&table, dense.rows, norms, dense.size, dense.dim, cosine, true};
  if constexpr (std::is_same_v<Element, double>) {
    search_double(book, tokens, out);
  } else if (tokens.count() > 0) {
    const CoarseBook coarse = pack_coarse(table, choose_pass(table, dense.dim, true), book.code_rows(), {});
    KSearch<Element>(book, coarse, tokens, out).run();
  }
}

struct Result {
  Tensor codes;     // [B, T, k]
  Tensor distance;  // [B, T, k]
};

Result new_result(const Tensor& x, const Tensor& codebook, int64_t k) {
  check(k >= 1 && k <= codebook.size(0), "k: expected 1 to ", codebook.size(0), " (K of codebook), got ", k);
  return {torch::stable::new_empty(x, {x.size(0), x.size(1), k}, ScalarType::Long),
          torch::stable::new_empty(x, {x.size(0), x.size(1), k}, ScalarType::Float)};
}

KOutputs outputs_of(Result& result, int64_t k) {
  return {static_cast<int64_t*>(result.codes.mutable_data_ptr()),
          static_cast<float*>(result.distance.mutable_data_ptr()), k};
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_k(Tensor x, Tensor codebook, int64_t k, bool cosine) {
  check_tokens(x, "x");
  check_codebook(codebook, x);
  Result result = new_result(x, codebook, k);
  const KOutputs out = outputs_of(result, k);
  dispatch_floating(x.scalar_type(),
                    [&](auto element) { search<decltype(element)>(x, codebook, cosine, out); });
  return {result.codes, result.distance};
}

std::tuple<Tensor, Tensor> nearest_k_of_snapshot(Tensor x, int64_t number, int64_t k) {
  const std::shared_ptr<const Snapshot> snapshot = find_snapshot(number);
  check_snapshot(*snapshot, x);
  Result result = new_result(x, snapshot->codebook, k);
  const KOutputs out = outputs_of(result, k);
  dispatch_floating(x.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    const Tokens<const Element> tokens = tokens_of<Element>(x);
    if constexpr (std::is_same_v<Element, double>) {
      search_double(snapshot->double_book(), tokens, out);
    } else {
      const Book<float> book = snapshot->float_book();
      const PreparedCodebook& prepared = snapshot->prepared;
      const CoarsePass* finer = finer_pass(*book.table, *prepared.coarse.pass);
      if (finer == nullptr) return KSearch<Element>(book, prepared.coarse, tokens, out).run();
      const auto kept = prepared.finer(*book.table, *finer, book.code_rows());
      KSearch<Element>(book, kept->coarse, tokens, out).run();
    }
  });
  return {result.codes, result.distance};
}

}  // namespace cpu
}  // namespace vqkernels
