// The search of float32 and the 16-bit types: a coarse pass over the packed codebook, then a decision per
// token.
//
//   tokens   read, centred, scaled and packed for the pass
//   coarse   S, within E of the real score s; of every granule of codes the least is kept, so that
//            {S <= min S + 2E} holds every true minimiser; and {S <= s' + E} for any real score s', as bytes,
//            whose E is large, have it of the code that looks nearest
//   rerank   float64 values of the granules inside the bound, then error-free arithmetic where those tie
//   rest     tokens that have lost a candidate for want of room, or whose bound is not finite: after bytes
//            by this search with a finer pass, else by all codes in float64 (wide_scan.h)
//
// With `Columns` the same sweep finds the candidates of columns.h.
//
// Which thread does what, and how tokens and codes are split, cannot change a code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "candidates.h"
#include "coarse.h"
#include "coarse_tokens.h"
#include "columns.h"
#include "decide.h"
#include "float_distances.h"
#include "parallel.h"
#include "prepared.h"
#include "report.h"
#include "tokens.h"
#include "wide_scan.h"

namespace vqkernels {
namespace cpu {

constexpr int64_t FOUND = 64;                // granules looked at per token and block
constexpr int64_t TOKEN_BYTES = 320 * 1024;  // of a block of tokens, as tiles
constexpr int64_t MOST_TOKENS = 1024;        // in a block
constexpr int64_t FEWEST_TOKENS = 96;        // enough uses of a codebook block brought into the cache
constexpr double MIXED_NORMS = 4.0;  // the largest norm over the least, from which on tokens are sorted
constexpr int64_t FETCHED_DIM = 64;  // with less, the loops that know D count for more
constexpr int64_t PREFETCHED = 8;    // tokens whose candidates are asked of the memory ahead of time
constexpr int64_t PREFETCHED_BYTES = 1024;    // of each code
constexpr int64_t GATHERED_FLOATS = 1 << 20;  // of undecided tokens at a time
constexpr double PROBED = 1.25;               // times the error, above the least score
constexpr int64_t CACHED_BYTES = 512 * 1024;  // of a codebook that needs no such help

// Granules kept of a token: bytes leave more than int16, and more the more dimensions and codes there are;
// room that is not needed costs time (3 % at (1024, 256) of 64 instead of 32).
inline int64_t kept_granules(const Book<float>& book, bool bytes) {
  if (!bytes) return 16;
  return book.dim > 512 || book.size > 65536 ? 64 : 32;
}

// How tokens and codes are cut into pieces of work.
struct Split {
  int64_t tokens;  // in a block of tokens, a multiple of the tile
  int64_t token_blocks;
  int64_t chunks;  // of the codebook, more than 1 only where tokens are too few for the threads
};

inline double coarse_operations(const CoarseBook& coarse, int64_t count) {
  return 2.0 * static_cast<double>(count) * static_cast<double>(coarse.size) *
         static_cast<double>(coarse.dim);
}

inline int64_t most_tokens(const CoarseBook& coarse) {
  const int64_t rows = coarse.pass->rows;
  const int64_t fitting = TOKEN_BYTES / coarse.tile_bytes() * rows;
  return std::clamp(fitting, rows, MOST_TOKENS) / rows * rows;
}

inline Split choose_split(const CoarseBook& coarse, int64_t count) {
  const int64_t threads = useful_threads(coarse_operations(coarse, count));
  const int64_t rows = coarse.pass->rows, most = most_tokens(coarse);
  const int64_t blocks = static_cast<int64_t>(coarse.blocks.size());
  // as many blocks as threads, or whole multiples: every block reads the codebook once more
  const int64_t rounds = ceil_div(count, threads * most);
  const int64_t fair = ceil_div(ceil_div(count, threads * rounds), rows) * rows;
  const int64_t tokens = std::clamp(fair, std::min(FEWEST_TOKENS, most), most);
  const int64_t token_blocks = ceil_div(count, tokens);
  const bool enough = threads == 1 || fair == tokens;
  return {tokens, token_blocks, enough ? 1 : std::min(blocks, ceil_div(2 * threads, token_blocks))};
}

template <class Element>
class CoarseSearch {
 public:
  CoarseSearch(const Book<float>& book, const PreparedCodebook& prepared, const Tokens<const Element>& tokens,
               const Outputs& out, SearchReport* report, Columns* columns = nullptr)
      : book_(book),
        coarse_(prepared.coarse),
        prepared_(prepared),
        pass_(*coarse_.pass),
        table_(*book.table),
        split_(choose_split(coarse_, tokens.count())),
        tokens_(tokens),
        out_(out),
        report_(report),
        columns_(columns),
        finer_(finer_pass(*book.table, pass_)),
        capacity_(kept_granules(book, finer_ != nullptr)),
        wide_(book, prepared, out) {}

  void run() {
    if (!worth_while()) {
      Stopwatch watch(report_);
      watch.counts.refined = tokens_.count();
      prepared_.verdict.leave_out(tokens_.count());
      return CoarseSearch<Element>(book_, *finer_book(), tokens_, out_, report_).run();
    }
    if (split_.chunks == 1) {
      each(split_.token_blocks, [&](int64_t item, Scratch& scratch) {
        if (!worth_while()) return leave_block(item);
        load(item, scratch);
        search_block(0, scratch);
        finish_block(scratch);
      });
    } else {
      run_in_chunks();
    }
    if (undecided_.empty()) return;
    if (prepared_.spares_finer(static_cast<int64_t>(undecided_.size()))) {
      scan_few();
    } else {
      run_finer();
    }
  }

 private:
  // Granules of a token and block whose scores are not above a limit.
  struct Found {
    double limit;
    int64_t number;  // above FOUND: some are not here
    int32_t granules[FOUND];
    double scores[FOUND];
  };

  struct Scratch {
    Buffer<float> rows;            // [tokens, D], as given, where they do not lie so already
    Buffer<char> tiles;            // [tokens / tile, tile_words]
    Buffer<char> scores;           // [tile, granules of a block]
    Buffer<ScalePair> scales;      // [tokens], what they are multiplied with
    Buffer<double> norms;          // [tokens], after centring and scaling
    Buffer<float> squares;         // [tokens], the same within square_error
    Buffer<int32_t> order;         // [tokens]: which token a row of the tiles holds
    Buffer<TokenBound> bounds;     // [tokens], in that order
    Buffer<TokenState> states;     // [tokens]
    Buffer<Candidate> candidates;  // [tokens, capacity_], of the states
    Buffer<Found> found;           // [tile]
    DecideScratch<float> decide;
    FloatDistances distances;
    Stopwatch watch;
    ColumnState* columns;  // null without columns
    RowBlock<const float> given{nullptr, 0};
    int64_t first = 0;
    int64_t count = 0;
  };

  template <class Work>
  void each(int64_t items, const Work& work) {
    int64_t most_granules = 0;
    for (const CoarseBlock& block : coarse_.blocks)
      most_granules = std::max(most_granules, coarse_.granules(block));
    for_each_item<Scratch>(
        items, coarse_operations(coarse_, tokens_.count()),
        [&] {
          Scratch scratch{Buffer<float>(split_.tokens * book_.dim),
                          Buffer<char>(split_.tokens / pass_.rows * coarse_.tile_bytes()),
                          Buffer<char>(pass_.rows * most_granules * pass_.word_bytes),
                          Buffer<ScalePair>(split_.tokens),
                          Buffer<double>(split_.tokens),
                          Buffer<float>(split_.tokens),
                          Buffer<int32_t>(split_.tokens),
                          Buffer<TokenBound>(split_.tokens),
                          Buffer<TokenState>(split_.tokens),
                          Buffer<Candidate>(split_.tokens * capacity_),
                          Buffer<Found>(pass_.rows),
                          DecideScratch<float>(),
                          FloatDistances(),
                          Stopwatch(report_),
                          columns_ == nullptr ? nullptr : columns_->add_state(split_.tokens)};
          keep_candidates_in(scratch.candidates.get(), scratch.states.get(), split_.tokens);
          return scratch;
        },
        work);
  }

  void keep_candidates_in(Candidate* memory, TokenState* states, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) states[i].keep_in(memory + i * capacity_, capacity_);
  }

  // Few tokens: every chunk of the codebook leaves its state of every token, then they are merged.
  void run_in_chunks() {
    const int64_t number = split_.chunks * tokens_.count();
    const Buffer<TokenState> states(number);
    const Buffer<Candidate> candidates(number * capacity_);
    keep_candidates_in(candidates.get(), states.get(), number);
    each(split_.token_blocks * split_.chunks, [&](int64_t item, Scratch& scratch) {
      const int64_t chunk = item % split_.chunks;
      load(item / split_.chunks, scratch);
      search_block(chunk, scratch);
      TokenState* kept = states.get() + chunk * tokens_.count() + scratch.first;
      for (int64_t i = 0; i < scratch.count; ++i) kept[i].copy_from(scratch.states[i]);
    });
    each(split_.token_blocks, [&](int64_t item, Scratch& scratch) {
      load(item, scratch);
      for (int64_t i = 0; i < scratch.count; ++i) {
        TokenState& state = scratch.states[i];
        state.copy_from(states[scratch.first + i]);
        for (int64_t chunk = 1; chunk < split_.chunks; ++chunk) {
          state.merge(states[chunk * tokens_.count() + scratch.first + i]);
        }
      }
      finish_block(scratch);
    });
  }

  void load(int64_t token_block, Scratch& scratch) {
    scratch.watch.time(Stage::TOKENS, [&] {
      scratch.first = token_block * split_.tokens;
      scratch.count = std::min(split_.tokens, tokens_.count() - scratch.first);
      scratch.given = read_rows(tokens_, scratch.first, scratch.first + scratch.count, scratch.rows.get());
    });
  }

  // ------------------------------------------------------------------------------------------ coarse

  void search_block(int64_t chunk, Scratch& scratch) {
    for (int64_t i = 0; i < scratch.count; ++i) scratch.states[i].start();
    const int64_t blocks = static_cast<int64_t>(coarse_.blocks.size());
    int32_t packed_for = -1;
    for (int64_t b = blocks * chunk / split_.chunks; b < blocks * (chunk + 1) / split_.chunks; ++b) {
      const CoarseBlock& block = coarse_.blocks[b];
      if (block.scale != packed_for) pack_tokens(coarse_.scales[block.scale], scratch);
      packed_for = block.scale;
      score_block(static_cast<int32_t>(b), scratch);
    }
  }

  void pack_tokens(const CoarseScale& scale, Scratch& scratch) {
    scratch.watch.time(Stage::TOKENS, [&] {
      const Packing packing = coarse_.packing(scale, scratch.given[scratch.count - 1] + book_.dim);
      measure_tokens(packing, scratch);
      sort_tokens(0.5 * scale.reach, scratch);
      if (columns_ != nullptr)
        columns_->start_tokens(scratch.first, scratch.order.get(), scratch.count, *scratch.columns);
      for (int64_t base = 0; base < scratch.count; base += pass_.rows) {
        pack_tile(scale, packing, base, std::min<int64_t>(pass_.rows, scratch.count - base), scratch);
      }
    });
  }

  void measure_tokens(const Packing& packing, Scratch& scratch) {
    for (int64_t i = 0; i < scratch.count; ++i) {
      const float* row = scratch.given[i];
      const MeasuredToken token = measure_token(table_, packing, row);
      scratch.scales[i] = token.scale;
      scratch.norms[i] = token.norm;
      scratch.squares[i] = token.square;
      if (!token.scorable) scratch.states[i].road = all_finite(row, book_.dim) ? Road::SCAN : Road::INVALID;
    }
  }

  // A tile's tokens share a scale, set by the longest: where norms differ much, like is put to like. Those
  // below `short_norm` may have the same scale anyhow.
  void sort_tokens(double short_norm, Scratch& scratch) const {
    const double* norms = scratch.norms.get();
    int32_t* order = scratch.order.get();
    std::iota(order, order + scratch.count, 0);
    const auto [least, most] = std::minmax_element(norms, norms + scratch.count);
    if (book_.cosine || *most <= MIXED_NORMS * std::max(*least, short_norm)) return;
    std::sort(order, order + scratch.count, [&](int32_t a, int32_t b) { return norms[a] < norms[b]; });
  }

  void pack_tile(const CoarseScale& scale, const Packing& packing, int64_t base, int64_t count,
                 Scratch& scratch) {
    char* tile = scratch.tiles.get() + base / pass_.rows * coarse_.tile_bytes();
    const int64_t rows_bytes = pass_.rows * coarse_.row_bytes(), kept = count < pass_.rows ? 0 : rows_bytes;
    std::fill_n(tile + kept, coarse_.tile_bytes() - kept, char{0});
    double largest = 0.0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, scratch.norms[scratch.order[base + i]]);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t token = scratch.order[base + i];
      const float* row = scratch.given[token];
      TokenBound& bound = scratch.bounds[base + i];
      if (scratch.states[token].road == Road::COARSE) {
        pass_.pack_token(row, scaled_by(packing, scratch.scales[token]), scratch.norms[token], largest,
                         static_cast<int>(i), tile, &bound);
        if (columns_ != nullptr)
          columns_->pack_token(base + i, scratch.squares[token], bound.unit, *scratch.columns);
        if (!book_.cosine) bound.unit *= scale.square;
        scratch.states[token].use_unit(bound.unit);
      } else {
        const int64_t bytes = coarse_.row_bytes();
        std::fill_n(tile + i * bytes, bytes, char{0});
        if (columns_ != nullptr) columns_->leave_out(base + i, *scratch.columns);
      }
    }
  }

  void score_block(int32_t b, Scratch& scratch) {
    const CoarseBlock& block = coarse_.blocks[b];
    const char* panels = coarse_.panels.memory.get() + block.first_panel * coarse_.panel_bytes();
    scratch.watch.time(Stage::COARSE, [&] {
      const int64_t span = columns_ == nullptr ? scratch.count : columns_->span(block);
      for (int64_t first = 0; first < scratch.count; first += span) {
        const int64_t end = std::min(first + span, scratch.count);
        if (columns_ != nullptr) columns_->start_span(first, *scratch.columns);
        for (int64_t base = first; base < end; base += pass_.rows) score(b, block, panels, base, scratch);
        if (columns_ != nullptr) columns_->finish_span(block, end, *scratch.columns);
      }
    });
  }

  void score(int32_t b, const CoarseBlock& block, const char* panels, int64_t base, Scratch& scratch) {
    const int64_t rows = std::min<int64_t>(pass_.rows, scratch.count - base);
    const int32_t* tokens = &scratch.order[base];
    if (std::none_of(tokens, tokens + rows,
                     [&](int32_t i) { return scratch.states[i].road == Road::COARSE; }))
      return;
    double least[MOST_ROWS];
    score_tile(block, panels, base, scratch, least);
    const int64_t granules = coarse_.granules(block);
    const double reach = block.bound.largest;
    if (finer_ != nullptr) probe(block, granules, least, base, rows, scratch);
    for (int64_t i = 0; i < rows; ++i) {
      TokenState& state = scratch.states[tokens[i]];
      if (state.road != Road::COARSE) continue;
      const TokenBound& bound = scratch.bounds[base + i];
      const double error = book_.exact ? error_of(bound, block.bound) : 0.0;
      if (!((bound.norm + reach) * reach + error < pass_.largest_score)) {
        state.road = Road::SCAN;
        if (columns_ != nullptr) columns_->leave_out(base + i, *scratch.columns);
        continue;
      }
      if (columns_ != nullptr) columns_->note_error(base + i, bound, block.bound, error, *scratch.columns);
      const char* scores = scratch.scores.get() + i * granules * pass_.word_bytes;
      if (least[i] + error < state.ceiling) state.lower_to(least[i] + error);
      const double limit =
          state.ceiling + error + std::fabs(state.ceiling) * 0x1p-48;  // for the changes of unit
      if (!(least[i] <= limit)) continue;
      Found& found = scratch.found[i];
      const bool known = finer_ != nullptr && limit <= found.limit && found.number <= FOUND;
      if (!known) find(scores, granules, limit, found);
      collect(b, block, least[i], error, limit, found, state);
    }
  }

  // Lowers each token's ceiling to the real score of the code that looks nearest, where that looks nearer
  // than what was known: candidates lie within E of that, not within 2E of the score, and are half as many or
  // fewer.
  void probe(const CoarseBlock& block, int64_t granules, const double* least, int64_t base, int64_t rows,
             Scratch& scratch) const {
    const int32_t* tokens = &scratch.order[base];
    int32_t nearest[MOST_ROWS];
    for (int64_t i = 0; i < rows; ++i) {
      Found& found = scratch.found[i];
      found.limit = -std::numeric_limits<double>::infinity();
      nearest[i] = -1;
      const TokenState& state = scratch.states[tokens[i]];
      if (state.road != Road::COARSE || !(least[i] < state.ceiling)) continue;
      const char* scores = scratch.scores.get() + i * granules * pass_.word_bytes;
      // once, for what is likely to stay, too
      find(scores, granules, least[i] + PROBED * error_of(scratch.bounds[base + i], block.bound), found);
      if (found.number > FOUND) find(scores, granules, least[i], found);
      for (int64_t j = 0; j < std::min(found.number, FOUND); ++j) {
        if (found.scores[j] == least[i]) nearest[i] = found.granules[j];
      }
      if (nearest[i] >= 0) coarse_.for_codes(block, nearest[i], [&](int64_t k) { fetch_row(k); });
    }
    CodeList& codes = scratch.decide.codes;
    for (int64_t i = 0; i < rows; ++i) {
      if (nearest[i] < 0) continue;
      codes.count = 0;
      coarse_.for_codes(block, nearest[i], [&](int64_t k) { codes.add(k); });
      const double upper = least_score(block, tokens[i], scratch);
      TokenState& state = scratch.states[tokens[i]];
      if (upper < state.ceiling) state.lower_to(upper);
    }
  }

  // The least score of scratch.decide.codes is not above this.
  double least_score(const CoarseBlock& block, int32_t token, Scratch& scratch) const {
    const CodeList& codes = scratch.decide.codes;
    const float* row = scratch.given[token];
    const double value =
        book_.cosine ? least_value(book_, row, scratch.decide) : scratch.distances.least(book_, row, codes);
    const double square = scratch.squares[token];
    const double relative = square_error(book_.dim), unit = coarse_.scales[block.scale].square;
    const double score = book_.cosine ? (value + std::fabs(value) * relative) * std::sqrt(square)
                                      : 0.5 * (value * unit - square * (1.0 - relative));
    return score + std::fabs(score) * 0x1p-50 + 0x1p-100;
  }

  // What of the next block is brought into the cache while this tile is scored: the last few tiles have time
  // for all of it. Null before them, and where there is no next block or no room for it.
  const char* next_panels(const CoarseBlock& block, const char* panels, int64_t base,
                          const Scratch& scratch) const {
    const int64_t bytes = block.count * coarse_.panel_bytes(), tiles = ceil_div(scratch.count, pass_.rows);
    const bool room = 2 * bytes + tiles * coarse_.tile_bytes() <= second_cache();
    if (book_.dim < FETCHED_DIM || !room) return nullptr;
    const int64_t share = pass_.fetched_bytes(block.count, book_.dim), sharing = ceil_div(bytes, share);
    const int64_t part = base / pass_.rows - std::max<int64_t>(tiles - sharing, 0);
    const char* next = panels + bytes + part * share;
    return part >= 0 && next < coarse_.panels.memory.get() + coarse_.panels.bytes ? next : nullptr;
  }

  void score_tile(const CoarseBlock& block, const char* panels, int64_t base, Scratch& scratch,
                  double* least) {
    const char* tile = scratch.tiles.get() + base / pass_.rows * coarse_.tile_bytes();
    if (columns_ == nullptr) {
      pass_.score_panels(tile, panels, block.count, book_.dim, coarse_.group, scratch.scores.get(), least,
                         next_panels(block, panels, base, scratch));
    } else {
      ColumnState& columns = *scratch.columns;
      pass_.score_both(tile, panels, block.count, book_.dim, coarse_.group, scratch.scores.get(), least,
                       &columns.factors[base], &columns.offsets[base],
                       columns_->least_of(block, base, columns));
    }
  }

  void find(const char* scores, int64_t granules, double limit, Found& found) const {
    found.limit = limit;
    found.number = pass_.find_scores(scores, granules, limit, found.granules, found.scores, FOUND);
  }

  void collect(int32_t b, const CoarseBlock& block, double least, double error, double limit,
               const Found& found, TokenState& state) {
    const auto lower = [&](double score) {
      const double bound = score - error;
      return (bound - std::fabs(bound) * 0x1p-50) / state.unit;
    };
    if (found.number > FOUND) {  // a crowd, which a later block may beat
      state.lost = std::min(state.lost, lower(least));
      return;
    }
    for (int64_t i = 0; i < found.number; ++i) {
      if (coarse_.group == 0 && found.granules[i] >= block.codes) break;  // the same codes again
      if (found.scores[i] <= limit) state.add({lower(found.scores[i]), b, found.granules[i]});
    }
  }

  // ------------------------------------------------------------------------------------------ decisions

  void finish_block(Scratch& scratch) {
    std::vector<int64_t> undecided;
    const int64_t before = scratch.watch.counts.reranked;
    scratch.watch.time(Stage::RERANK, [&] {
      for (int64_t i = 0; i < std::min(PREFETCHED, scratch.count); ++i) keep_candidates(scratch.states[i]);
      for (int64_t i = 0; i < scratch.count; ++i) {
        const TokenState& state = scratch.states[i];
        if (i + PREFETCHED < scratch.count) keep_candidates(scratch.states[i + PREFETCHED]);
        if (state.road == Road::INVALID) {
          write_invalid(out_, scratch.first + i);
        } else if (state.road == Road::SCAN || state.lost <= state.upper) {
          undecided.push_back(i);
        } else {
          rerank(i, scratch);
        }
      }
    });
    const int64_t number = static_cast<int64_t>(undecided.size());
    if (finer_ != nullptr)
      prepared_.verdict.add(scratch.count, number, scratch.watch.counts.reranked - before, book_.size);
    if (number == 0) return;
    if (finer_ != nullptr) return leave_to_finer(undecided, scratch.first);
    scratch.watch.time(Stage::SCAN,
                       [&] { wide_.decide(undecided, scratch.given, scratch.first, scratch.decide); });
    scratch.watch.counts.scanned += number;
  }

  // Whether this pass leaves the finer one less work than it takes itself.
  bool worth_while() const { return finer_ == nullptr || prepared_.verdict.pays(book_.size); }

  std::shared_ptr<const PreparedCodebook> finer_book() const {
    return prepared_.finer(*book_.table, *finer_, book_.code_rows());
  }

  void leave_block(int64_t token_block) {
    const int64_t first = token_block * split_.tokens;
    std::vector<int64_t> all(std::min(split_.tokens, tokens_.count() - first));
    std::iota(all.begin(), all.end(), int64_t{0});
    prepared_.verdict.leave_out(static_cast<int64_t>(all.size()));
    leave_to_finer(all, first);
  }

  void leave_to_finer(const std::vector<int64_t>& undecided, int64_t first) {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (const int64_t i : undecided) undecided_.push_back(first + i);
  }

  // So few are not worth the packing of the codebook for the finer pass: at once in float64.
  void scan_few() {
    struct Few {
      Buffer<float> row;
      DecideScratch<float> decide;
      Stopwatch watch;
    };
    const int64_t count = static_cast<int64_t>(undecided_.size());
    for_each_item<Few>(
        count, 4.0 * count * book_.size * book_.dim,
        [&] { return Few{Buffer<float>(book_.dim), DecideScratch<float>(), Stopwatch(report_)}; },
        [&](int64_t i, Few& few) {
          few.watch.time(Stage::SCAN, [&] {
            const int64_t n = undecided_[i];
            load_rows(tokens_, n, n + 1, few.row.get());
            scan(book_, few.row.get(), few.decide, out_, n);
          });
          ++few.watch.counts.scanned;
        });
  }

  // Gathers them, so many at a time, for a search of their own.
  void run_finer() {
    const std::shared_ptr<const PreparedCodebook> finer = finer_book();
    const int64_t count = static_cast<int64_t>(undecided_.size()), dim = book_.dim;
    Stopwatch watch(report_);
    watch.counts.refined = count;
    const int64_t most = std::min(count, std::max(GATHERED_FLOATS / dim, int64_t{1}));
    const Buffer<float> rows(most * dim), distance(most);
    const Buffer<int64_t> codes(most);
    for (int64_t begin = 0; begin < count; begin += most) {
      const int64_t number = std::min(most, count - begin);
      const int64_t* chosen = undecided_.data() + begin;
      for_each_range(number, 256, 2.0 * number * dim, [&](int64_t i, int64_t end) {
        for (; i < end; ++i) load_rows(tokens_, chosen[i], chosen[i] + 1, rows.get() + i * dim);
      });
      const Tokens<const float> gathered{rows.get(), 1, number, dim, 0, dim, 1};
      const Outputs out{codes.get(), distance.get()};
      CoarseSearch<float>(book_, *finer, gathered, out, report_).run();
      for (int64_t i = 0; i < number; ++i) {
        out_.codes[chosen[i]] = codes[i];
        out_.distance[chosen[i]] = distance[i];
      }
    }
  }

  // Which candidates are left; they lie anywhere in the codebook: ask for them a few tokens ahead.
  void keep_candidates(TokenState& state) const {
    state.drop_beaten();
    if (state.road != Road::COARSE || book_.size * row_bytes() <= CACHED_BYTES) return;
    for (int32_t j = 0; j < state.count; ++j) {
      const Candidate& candidate = state.candidates[j];
      coarse_.for_codes(coarse_.blocks[candidate.block], candidate.granule, [&](int64_t k) { fetch_row(k); });
    }
  }

  int64_t row_bytes() const { return book_.dim * static_cast<int64_t>(sizeof(float)); }
  void fetch_row(int64_t k) const {
    const char* row = reinterpret_cast<const char*>(book_.row(k));
    const int64_t bytes = std::min(row_bytes(), PREFETCHED_BYTES);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  }

  void rerank(int64_t i, Scratch& scratch) {
    const TokenState& state = scratch.states[i];
    CodeList& codes = scratch.decide.codes;
    codes.count = 0;
    for (int32_t j = 0; j < state.count; ++j) {
      const Candidate& candidate = state.candidates[j];
      coarse_.for_codes(coarse_.blocks[candidate.block], candidate.granule, [&](int64_t k) { codes.add(k); });
    }
    scratch.watch.counts.reranked += codes.count;
    if (finer_ != nullptr && codes.count > 1 && !book_.cosine)
      scratch.distances.drop_farther(book_, scratch.given[i], codes);
    decide_token(book_, scratch.given[i], scratch.decide, out_, scratch.first + i);
    scratch.watch.counts.certified += state.count == 1;
    scratch.watch.counts.candidates += state.count;
  }

  const Book<float>& book_;
  const CoarseBook& coarse_;
  const PreparedCodebook& prepared_;
  const CoarsePass& pass_;
  const KernelTable& table_;
  const Split split_;
  const Tokens<const Element>& tokens_;
  const Outputs& out_;
  SearchReport* report_;
  Columns* columns_;
  const CoarsePass* finer_;  // null where float64 is next
  const int64_t capacity_;   // granules kept of a token
  std::mutex mutex_;
  std::vector<int64_t> undecided_;  // [.], left to the finer pass
  WideScan wide_;
};

}  // namespace cpu
}  // namespace vqkernels
