// What a search says of itself when asked: where its time went, and how much the coarse pass proved.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <mutex>

namespace vqkernels {
namespace cpu {

enum class Stage : int { PREPARE, TOKENS, COARSE, RERANK, SCAN };
constexpr int STAGES = 5;

struct Counts {
  int64_t certified = 0;   // tokens with one granule left
  int64_t candidates = 0;  // granules left, over all tokens of the coarse road
  int64_t reranked = 0;    // codes whose value was computed anew
  int64_t scanned = 0;     // tokens that took the float64 pass
  int64_t refined = 0;     // tokens that the byte pass left to a finer one
};

// One for a call; threads add theirs at their end.
struct SearchReport {
  std::mutex mutex;
  std::array<double, STAGES> seconds{};  // of all threads together
  Counts counts;
  const char* pass = "";
  bool from_cache = false;
};

// One for a thread. Without a report nothing is measured.
class Stopwatch {
 public:
  explicit Stopwatch(SearchReport* report) : report_(report) {}
  Stopwatch(Stopwatch&& other) noexcept
      : counts(other.counts), report_(other.report_), seconds_(other.seconds_) {
    other.report_ = nullptr;
  }
  Stopwatch& operator=(Stopwatch&&) = delete;
  ~Stopwatch() {
    if (report_ == nullptr) return;
    const std::lock_guard<std::mutex> guard(report_->mutex);
    for (int i = 0; i < STAGES; ++i) report_->seconds[i] += seconds_[i];
    report_->counts.certified += counts.certified;
    report_->counts.candidates += counts.candidates;
    report_->counts.reranked += counts.reranked;
    report_->counts.scanned += counts.scanned;
    report_->counts.refined += counts.refined;
  }

  template <class Work>
  void time(Stage stage, const Work& work) {
    if (report_ == nullptr) return work();
    const auto begin = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    seconds_[static_cast<int>(stage)] += spent.count();
  }

  Counts counts;

 private:
  SearchReport* report_;
  std::array<double, STAGES> seconds_{};
};

}  // namespace cpu
}  // namespace vqkernels
