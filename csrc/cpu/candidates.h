// What a coarse pass leaves of a token.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace vqkernels {
namespace cpu {

// Where a token's code comes from: its candidates, a float64 pass over all codes, or nowhere (NaN or Inf).
enum class Road : int32_t { COARSE, SCAN, INVALID };

struct Candidate {
  double lower;  // no code of the granule has a lower real score
  int32_t block;
  int32_t granule;  // within the block
};

struct TokenState {
  double upper;    // the least real score is not above this
  double unit;     // of `ceiling`
  double ceiling;  // upper * unit, in the score units of the scale at hand
  double lost;  // the least `lower` of granules there was no room for: a scan is due where upper reaches it
  int32_t count;
  int32_t capacity;  // granules kept
  Road road;
  Candidate* candidates;  // [capacity], somebody else's

  void keep_in(Candidate* memory, int64_t room) {
    candidates = memory;
    capacity = static_cast<int32_t>(room);
  }

  void start() {
    upper = std::numeric_limits<double>::infinity();
    lost = std::numeric_limits<double>::infinity();
    count = 0;
    road = Road::COARSE;
    use_unit(1.0);
  }

  // Score units change with the scale of the codes.
  void use_unit(double next) {
    unit = next;
    ceiling = upper * unit;
  }

  void lower_to(double score) {
    ceiling = score;
    upper = score / unit;
  }

  void drop_beaten() {
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i) {  // which ones stay cannot be predicted: no branch
      candidates[kept] = candidates[i];
      kept += candidates[i].lower <= upper;
    }
    count = kept;
  }

  void add(const Candidate& candidate) {
    if (count == capacity) drop_beaten();
    if (count == capacity) {
      lost = std::min(lost, candidate.lower);
    } else {
      candidates[count++] = candidate;
    }
  }

  // All but the memory of the candidates, which are copied.
  void copy_from(const TokenState& other) {
    Candidate* memory = candidates;
    *this = other;
    candidates = std::copy_n(other.candidates, other.count, memory) - other.count;
  }

  void merge(const TokenState& other) {
    if (other.road != Road::COARSE) road = other.road;
    upper = std::min(upper, other.upper);
    lost = std::min(lost, other.lost);
    for (int32_t i = 0; i < other.count && road == Road::COARSE; ++i) {
      if (other.candidates[i].lower <= upper) add(other.candidates[i]);
    }
  }
};

}  // namespace cpu
}  // namespace vqkernels
