// Nearest-code search. float32 and the 16-bit types:
//
//   coarse   S = h - xh.ch in float32 with x and c centred and scaled; of every granule of codes the least is
//   kept bound    E >= |S - s| for the real score s, so that {S <= min S + 2E} holds every true minimiser
//   decide   float64 values of the granules inside the bound, then error-free arithmetic where those tie
//
// A token whose bound is not finite, or with more candidates than are kept, scans the whole codebook in
// float64; so do float64 inputs. Which thread does what, and how tokens and codes are split, cannot change a
// code.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "coarse.h"
#include "decide.h"
#include "ops.h"
#include "parallel.h"
#include "tokens.h"

namespace vqkernels {
namespace cpu {
namespace {

constexpr int CAPACITY = 16;   // granules kept per token; more than that and the token is scanned
constexpr int64_t FOUND = 64;  // granules looked at per token and block
constexpr int64_t TOKEN_BYTES = 512 * 1024;      // of a block of tokens, as rows and as tiles
constexpr int64_t MOST_TOKENS = 512;             // in a block
constexpr int64_t FEWEST_TOKENS = 96;            // enough uses of a codebook block brought into the cache
constexpr double UNIT32 = 5.960464477539063e-8;  // 2^-24, float32's unit roundoff

enum class Road : int32_t { COARSE, SCAN, INVALID };

struct Candidate {
  double lower;  // no code of the granule has a lower real score
  int64_t granule;
};

struct TokenState {
  double upper;  // the least real score is not above this
  int32_t count;
  Road road;
  Candidate candidates[CAPACITY];

  void drop_beaten() {
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i) {
      if (candidates[i].lower <= upper) candidates[kept++] = candidates[i];
    }
    count = kept;
  }

  void add(double lower, int64_t granule) {
    if (count == CAPACITY) drop_beaten();
    if (count == CAPACITY) {
      road = Road::SCAN;
    } else {
      candidates[count++] = {lower, granule};
    }
  }

  void merge(const TokenState& other) {
    if (other.road != Road::COARSE) road = other.road;
    upper = std::min(upper, other.upper);
    for (int32_t i = 0; i < other.count && road == Road::COARSE; ++i) {
      if (other.candidates[i].lower <= upper) add(other.candidates[i].lower, other.candidates[i].granule);
    }
  }
};

struct Outputs {
  int64_t* codes;   // [N]
  float* distance;  // [N]
};

// What one thread needs to decide tokens.
template <class Row>
struct DecideScratch {
  Buffer<double> wide;  // [D]
  std::vector<int64_t> codes;
  std::vector<int64_t> tied;
  std::vector<double> values;

  explicit DecideScratch(int64_t dim) : wide(dim) {}
};

bool all_finite(const float* row, int64_t dim) {
  return std::all_of(row, row + dim, [](float v) { return std::isfinite(v); });
}
bool all_finite(const double* row, int64_t dim) {
  return std::all_of(row, row + dim, [](double v) { return std::isfinite(v); });
}

template <class Row>
void write(const Outputs& out, int64_t n, const Book<Row>& book, const Choice& choice) {
  out.codes[n] = choice.code;
  out.distance[n] = distance_of(choice.value, book.cosine);
}

void write_invalid(const Outputs& out, int64_t n) {
  out.codes[n] = -1;
  out.distance[n] = std::numeric_limits<float>::quiet_NaN();
}

// 1 / |row| of a row whose squares neither over- nor underflow; 0 for the zero vector.
template <class Row>
double inverse_norm_of(const KernelTable& table, const double* wide, const Row* row, int64_t dim) {
  double square = 0.0;
  dot_products(table, wide, row, 1, dim, &square);
  return square > 0.0 ? 1.0 / std::sqrt(square) : 0.0;
}

template <class Row>
Token<Row> make_token(const Book<Row>& book, const Row* row, DecideScratch<Row>& scratch) {
  for (int64_t d = 0; d < book.dim; ++d) scratch.wide[d] = row[d];
  const double* wide = scratch.wide.get();
  return {row, wide, book.cosine ? inverse_norm_of(*book.table, wide, row, book.dim) : 0.0};
}

template <class Row>
void scan(const Book<Row>& book, const Row* row, DecideScratch<Row>& scratch, const Outputs& out, int64_t n) {
  const Token<Row> token = make_token(book, row, scratch);
  if (book.cosine && token.inverse_norm == 0.0) return write(out, n, book, {0, 0.0});  // every cosine is 0
  scratch.values.resize(book.size);
  values_of(book, token, 0, book.size, scratch.values.data());
  write(out, n, book,
        decide(book, token, static_cast<const int64_t*>(nullptr), scratch.values.data(), book.size,
               scratch.tied));
}

// ------------------------------------------------------------------------------------------ codebook

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
  Buffer<double> inverse_norm;  // [K] for cosine
  const Row* rows;              // [K, D]

  DenseCodebook(const KernelTable& table, const Tensor& codebook, bool cosine)
      : copy(0), inverse_norm(cosine ? codebook.size(0) : 0) {
    const int64_t size = codebook.size(0), dim = codebook.size(1);
    const Tokens<const Element> view{static_cast<const Element*>(codebook.const_data_ptr()),
                                     1,
                                     size,
                                     dim,
                                     0,
                                     codebook.stride(0),
                                     codebook.stride(1)};
    const bool scaled = cosine && std::is_same_v<Row, double>;
    if constexpr (std::is_same_v<Row, Element>) rows = view.data;
    if (!std::is_same_v<Row, Element> || !codebook.is_contiguous() || scaled) {
      copy = Buffer<Row>(size * dim);
      rows = copy.get();
      for_each_range(size, 1024, 4.0 * size * dim,
                     [&](int64_t begin, int64_t end) { load_rows(view, begin, end, &copy[begin * dim]); });
    }
    if (cosine) normalize(table, size, dim, scaled);
  }

  void normalize(const KernelTable& table, int64_t size, int64_t dim, bool scaled) {
    for_each_item<std::vector<double>>(
        ceil_div(size, 1024), 8.0 * size * dim, [&] { return std::vector<double>(dim); },
        [&](int64_t item, std::vector<double>& wide) {
          for (int64_t k = item * 1024; k < std::min(size, (item + 1) * 1024); ++k) {
            if constexpr (std::is_same_v<Row, double>) {
              if (scaled) scale_direction(&copy[k * dim], dim);
            }
            std::copy(rows + k * dim, rows + (k + 1) * dim, wide.begin());
            inverse_norm[k] = inverse_norm_of(table, wide.data(), rows + k * dim, dim);
          }
        });
  }
};

// ------------------------------------------------------------------------------------------ float64

void search_double(const Book<double>& book, const Tokens<const double>& tokens, const Outputs& out) {
  struct Scratch {
    Buffer<double> row;
    DecideScratch<double> decide;
  };
  check_codebook_finite(all_finite(book.rows, book.size * book.dim));
  for_each_item<Scratch>(
      tokens.count(), 4.0 * tokens.count() * book.size * book.dim,
      [&] { return Scratch{Buffer<double>(book.dim), DecideScratch<double>(book.dim)}; },
      [&](int64_t n, Scratch& scratch) {
        double* row = scratch.row.get();
        load_rows(tokens, n, n + 1, row);
        if (!all_finite(row, book.dim)) return write_invalid(out, n);
        if (book.cosine) scale_direction(row, book.dim);
        scan(book, row, scratch.decide, out, n);
      });
}

// ------------------------------------------------------------------------------------------- coarse

// How tokens and codes are cut into pieces of work.
struct Split {
  int64_t tokens;  // in a block of tokens, a multiple of the tile
  int64_t token_blocks;
  int64_t chunks;  // of the codebook, more than 1 only where tokens are too few for the threads
  bool pack_late;  // each codebook block is packed where it is searched, since it is searched only once
};

double coarse_operations(const CoarseBook& coarse, int64_t count) {
  return 2.0 * static_cast<double>(count) * static_cast<double>(coarse.size) *
         static_cast<double>(coarse.dim);
}

Split choose_split(const CoarseBook& coarse, int64_t count) {
  const int64_t threads = useful_threads(coarse_operations(coarse, count));
  const int64_t rows = coarse.table->rows;
  const int64_t blocks = static_cast<int64_t>(coarse.blocks.size());
  const int64_t fitting = TOKEN_BYTES / (2 * coarse.dim * static_cast<int64_t>(sizeof(float)));
  const int64_t most = std::clamp(fitting, rows, MOST_TOKENS) / rows * rows;
  if (count <= most && blocks >= 4 * threads) return {most, 1, threads == 1 ? 1 : 4 * threads, true};
  const int64_t fair = ceil_div(ceil_div(count, 4 * threads), rows) * rows;
  const int64_t tokens = std::clamp(fair, std::min(FEWEST_TOKENS, most), most);
  const int64_t token_blocks = ceil_div(count, tokens);
  const bool enough = threads == 1 || token_blocks >= 2 * threads;
  return {tokens, token_blocks, enough ? 1 : std::min(blocks, ceil_div(2 * threads, token_blocks)), false};
}

// |S - s| <= base + slope * |x| for the codes of a block.
struct Bound {
  double base;
  double slope;
  double largest;  // |c|

  double at(double norm) const { return base + slope * norm; }
};

// Of the terms counted in units of 2^-24 (|c|^2/2 + |x||c|): D for the additions, 1 for products that are not
// fused, 2 for the rounding of x and c, 1 for that of h and 2 for what rounding c does to h; 4 to spare and
// 2% for the second order, which holds while their sum is below 2^-6. Entries or products below 2^-126 come
// on top.
Bound bound_of(const CoarseBlock& block, int64_t dim, bool cosine, bool exact) {
  const double largest = std::sqrt(block.largest_square);
  if (!exact) return {0.0, 0.0, largest};
  const double relative = 1.02 * static_cast<double>(dim + 10) * UNIT32;
  if (relative > 0x1p-6) return {std::numeric_limits<double>::infinity(), 0.0, largest};
  const double underflow = static_cast<double>(dim) * 0x1p-120;
  const double half_square = cosine ? 0.0 : 0.5 * block.largest_square;
  return {relative * half_square + underflow * (1.0 + largest), relative * largest + underflow, largest};
}

template <class Element>
class CoarseSearch {
 public:
  CoarseSearch(const Book<float>& book, const CoarseBook& coarse, const Split& split,
               const Tokens<const Element>& tokens, const Outputs& out)
      : book_(book), coarse_(coarse), split_(split), table_(*coarse.table), tokens_(tokens), out_(out) {}

  void run() {
    if (split_.chunks == 1) {
      each(split_.token_blocks, [&](int64_t item, Scratch& scratch) {
        search_block(item, 0, scratch);
        for (int64_t i = 0; i < scratch.count; ++i) finish(i, scratch);
      });
    } else {
      run_in_chunks();
    }
    check_codebook_finite(finite_);
  }

 private:
  struct Scratch {
    Buffer<float> rows;         // [tokens, D], as given
    Buffer<float> tiles;        // [tokens / tile, D, tile], centred and scaled
    Buffer<float> scores;       // [tile, panels of a block, lanes]
    Buffer<float> panels;       // of a block that is packed late
    Buffer<double> norm;        // [tokens]
    Buffer<TokenState> states;  // [tokens]
    DecideScratch<float> decide;
    int64_t first = 0;
    int64_t count = 0;
  };

  template <class Work>
  void each(int64_t items, const Work& work) {
    const int64_t most_panels = coarse_.blocks[0].count;
    for_each_item<Scratch>(
        items, coarse_operations(coarse_, tokens_.count()),
        [&] {
          return Scratch{Buffer<float>(split_.tokens * book_.dim),
                         Buffer<float>(split_.tokens * book_.dim),
                         Buffer<float>(table_.rows * most_panels * table_.lanes),
                         Buffer<float>(split_.pack_late ? most_panels * coarse_.panel_size() : 0),
                         Buffer<double>(split_.tokens),
                         Buffer<TokenState>(split_.tokens),
                         DecideScratch<float>(book_.dim)};
        },
        work);
  }

  // Few tokens: every chunk of the codebook leaves its state of every token, then they are merged.
  void run_in_chunks() {
    const Buffer<TokenState> states(split_.chunks * tokens_.count());
    each(split_.token_blocks * split_.chunks, [&](int64_t item, Scratch& scratch) {
      const int64_t chunk = item % split_.chunks;
      search_block(item / split_.chunks, chunk, scratch);
      std::copy_n(scratch.states.get(), scratch.count,
                  states.get() + chunk * tokens_.count() + scratch.first);
    });
    each(split_.token_blocks, [&](int64_t item, Scratch& scratch) {
      load(item, scratch);
      for (int64_t i = 0; i < scratch.count; ++i) {
        TokenState& state = scratch.states[i];
        state = states[scratch.first + i];
        for (int64_t chunk = 1; chunk < split_.chunks; ++chunk) {
          state.merge(states[chunk * tokens_.count() + scratch.first + i]);
        }
        finish(i, scratch);
      }
    });
  }

  void load(int64_t token_block, Scratch& scratch) {
    scratch.first = token_block * split_.tokens;
    scratch.count = std::min(split_.tokens, tokens_.count() - scratch.first);
    load_rows(tokens_, scratch.first, scratch.first + scratch.count, scratch.rows.get());
  }

  void search_block(int64_t token_block, int64_t chunk, Scratch& scratch) {
    load(token_block, scratch);
    for (int64_t base = 0; base < scratch.count; base += table_.rows) pack(base, scratch);
    const int64_t blocks = static_cast<int64_t>(coarse_.blocks.size());
    const int64_t end = blocks * (chunk + 1) / split_.chunks;
    for (int64_t b = blocks * chunk / split_.chunks; b < end; ++b) score_block(coarse_.blocks[b], scratch);
  }

  void score_block(CoarseBlock block, Scratch& scratch) {
    const float* panels = coarse_.panel(block.first_panel);
    if (split_.pack_late) {
      block.largest_square = pack_block(coarse_, block, scratch.panels.get());
      panels = scratch.panels.get();
      if (std::isnan(block.largest_square)) {  // the panels are not whole; run() reports it
        finite_ = false;
        return;
      }
    }
    const Bound bound = bound_of(block, book_.dim, book_.cosine, book_.exact);
    for (int64_t base = 0; base < scratch.count; base += table_.rows)
      score(block, panels, bound, base, scratch);
  }

  // Tokens [base, base + tile): tile, norms, and which road each takes.
  void pack(int64_t base, Scratch& scratch) {
    const int64_t dim = book_.dim;
    const int64_t count = std::min<int64_t>(table_.rows, scratch.count - base);
    const float* rows = &scratch.rows[base * dim];
    float scales[2 * MOST_ROWS];
    for (int64_t i = 0; i < count; ++i) {
      const ScalePair scale =
          scale_pair(book_.cosine ? direction_exponent(rows + i * dim) : coarse_.exponent);
      scales[2 * i] = scale.first;
      scales[2 * i + 1] = scale.second;
    }
    float* tile = &scratch.tiles[base * dim];
    double squares[MOST_ROWS];
    table_.pack_tile(rows, coarse_.centre.data(), scales, count, dim, tile, squares);
    for (int64_t i = 0; i < count; ++i) {
      TokenState& state = scratch.states[base + i];
      state.upper = std::numeric_limits<double>::infinity();
      state.count = 0;
      state.road = Road::COARSE;
      if (!std::isfinite(squares[i]) && !all_finite(rows + i * dim, dim)) state.road = Road::INVALID;
      scratch.norm[base + i] = std::sqrt(squares[i]);
    }
  }

  int direction_exponent(const float* row) const {
    float largest = 0.0f;
    for (int64_t d = 0; d < book_.dim; ++d) largest = std::max(largest, std::fabs(row[d]));
    return largest > 0.0f && std::isfinite(largest) ? -std::ilogb(largest) : 0;
  }

  void score(const CoarseBlock& block, const float* panels, const Bound& bound, int64_t base,
             Scratch& scratch) {
    float least[MOST_ROWS];
    table_.score_panels(&scratch.tiles[base * book_.dim], panels, block.count, book_.dim,
                        scratch.scores.get(), least);
    const int64_t granules = block.count * table_.lanes;
    for (int64_t i = 0; i < std::min<int64_t>(table_.rows, scratch.count - base); ++i) {
      TokenState& state = scratch.states[base + i];
      if (state.road != Road::COARSE) continue;
      const double norm = scratch.norm[base + i];
      const double error = bound.at(norm);
      if (!((norm + bound.largest) * bound.largest + error < 0x1p120)) {  // a score may overflow
        state.road = Road::SCAN;
        continue;
      }
      state.upper = std::min(state.upper, least[i] + error);
      if (!(least[i] - error <= state.upper)) continue;
      collect(block, &scratch.scores[i * granules], granules, error, state);
    }
  }

  void collect(const CoarseBlock& block, const float* scores, int64_t granules, double error,
               TokenState& state) {
    int32_t found[FOUND];
    const float limit =
        std::nextafter(static_cast<float>(state.upper + error), std::numeric_limits<float>::infinity());
    const int64_t number = table_.find_scores(scores, granules, limit, found, FOUND);
    if (number > FOUND) state.road = Road::SCAN;
    for (int64_t i = 0; i < number && state.road == Road::COARSE; ++i) {
      state.add(scores[found[i]] - error, block.first_panel * table_.lanes + found[i]);
    }
  }

  void finish(int64_t i, Scratch& scratch) {
    const TokenState& state = scratch.states[i];
    const int64_t n = scratch.first + i;
    const float* row = &scratch.rows[i * book_.dim];
    if (state.road == Road::INVALID || !finite_) return write_invalid(out_, n);
    if (state.road == Road::SCAN) return scan(book_, row, scratch.decide, out_, n);
    const Token<float> token = make_token(book_, row, scratch.decide);
    if (book_.cosine && token.inverse_norm == 0.0) return write(out_, n, book_, {0, 0.0});
    list_codes(state, scratch.decide.codes);
    std::vector<double>& values = scratch.decide.values;
    const int64_t count = static_cast<int64_t>(scratch.decide.codes.size());
    if (static_cast<int64_t>(values.size()) < count) values.resize(count);
    for (int64_t j = 0; j < count; ++j) values_of(book_, token, scratch.decide.codes[j], 1, &values[j]);
    write(out_, n, book_,
          decide(book_, token, scratch.decide.codes.data(), values.data(), count, scratch.decide.tied));
  }

  void list_codes(const TokenState& state, std::vector<int64_t>& codes) const {
    codes.clear();
    for (int32_t i = 0; i < state.count; ++i) {
      if (!(state.candidates[i].lower <= state.upper)) continue;
      const int64_t panel = state.candidates[i].granule / table_.lanes;
      const int64_t lane = state.candidates[i].granule % table_.lanes;
      for (int v = 0; v < table_.vectors; ++v) {
        const int64_t k = panel * coarse_.width + v * table_.lanes + lane;
        if (k < book_.size) codes.push_back(k);
      }
    }
  }

  static constexpr int MOST_ROWS = 16;

  const Book<float>& book_;
  const CoarseBook& coarse_;
  const Split& split_;
  const KernelTable& table_;
  const Tokens<const Element>& tokens_;
  const Outputs& out_;
  std::atomic<bool> finite_{true};
};

template <class Element>
void search(const Tensor& x, const Tensor& codebook, bool cosine, bool exact, const Outputs& out) {
  const KernelTable& table = kernels();
  const Tokens<const Element> tokens = tokens_of<Element>(x);
  const DenseCodebook<Element> dense(table, codebook, cosine);
  const double* inverse_norm = cosine ? dense.inverse_norm.get() : nullptr;
  const Book<Wide<Element>> book{&table,           dense.rows, inverse_norm, codebook.size(0),
                                 codebook.size(1), cosine,     exact};
  if constexpr (std::is_same_v<Element, double>) {
    search_double(book, tokens, out);
  } else {
    CoarseBook coarse = plan_coarse(table, book.rows, inverse_norm, book.size, book.dim);
    const Split split = choose_split(coarse, tokens.count());
    if (!split.pack_late || tokens.count() == 0) pack_coarse(coarse);
    if (tokens.count() > 0) CoarseSearch<Element>(book, coarse, split, tokens, out).run();
  }
}

}  // namespace

std::tuple<Tensor, Tensor> nearest(Tensor x, Tensor codebook, bool cosine, bool exact) {
  check_tokens(x, "x");
  check_codebook(codebook, x);
  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
  const Outputs out{static_cast<int64_t*>(codes.mutable_data_ptr()),
                    static_cast<float*>(distance.mutable_data_ptr())};
  dispatch_floating(x.scalar_type(),
                    [&](auto element) { search<decltype(element)>(x, codebook, cosine, exact, out); });
  return {codes, distance};
}

}  // namespace cpu
}  // namespace vqkernels
