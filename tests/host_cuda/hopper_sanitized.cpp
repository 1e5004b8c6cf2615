// The Hopper kernel at ragged sizes against plain loops, for a build with -fsanitize=address,undefined.
// Prints "ok", or "wrong" and how often. An argument names a primitive to break (primitives_hopper_host.h).
#include "hopper_driver.cpp"

namespace {

struct Shape {
  int64_t tokens, code_rows, depth;
  bool split;
};

struct Problem {
  Shape shape;
  std::vector<float16> tokens, codes;
  std::vector<float> bias, scale;

  explicit Problem(const Shape& shape) : shape(shape) {
    std::mt19937_64 random(7);
    std::normal_distribution<float> normal;
    tokens.resize(static_cast<size_t>(shape.tokens * shape.depth));
    codes.resize(static_cast<size_t>(shape.code_rows * shape.depth));
    for (float16& value : tokens) value = static_cast<float16>(normal(random));
    for (float16& value : codes) value = static_cast<float16>(normal(random));
    if (shape.split) return;
    for (int64_t i = 0; i < shape.code_rows; ++i) bias.push_back(i % 50 == 3 ? INFINITY : normal(random));
    for (int64_t i = 0; i < shape.tokens; ++i) scale.push_back(i % 2 == 0 ? 0.5f : 2.0f);
  }

  double score(int64_t n, int64_t row) const {
    double sum = shape.split ? 0.0 : double{bias[row]} * scale[n];
    for (int64_t d = 0; d < shape.depth; ++d) {
      sum += static_cast<double>(tokens[n * shape.depth + d]) *
             static_cast<double>(codes[row * shape.depth + d]);
    }
    return sum;
  }
};

bool close(double a, double b) { return a == b || std::fabs(a - b) < 1e-3; }

// The state of those granules of a split that one lane meets, by plain loops.
Best<double> true_state(const Problem& problem, const CoarsePlan& plan, int64_t n, int64_t split,
                        int64_t group) {
  std::vector<double> granules(static_cast<size_t>(plan.granules), INFINITY);
  Best<double> best = no_best<double>();
  int64_t first = split * plan.granules_per_split,
          end = smaller(first + plan.granules_per_split, plan.granules);
  for (int64_t row = first * kGranule; row < end * kGranule; ++row) {
    int64_t code = code_of_row(row), granule = code / kGranule;
    if (granule % plan.groups != group) continue;
    double score = problem.score(n, row);
    granules[granule] = std::fmin(granules[granule], score);
    if (!problem.shape.split) best.offer(score, static_cast<int32_t>(code));
  }
  if (!problem.shape.split) return best;
  for (int64_t g = first; g < end; ++g) {
    if (g % plan.groups == group) best.offer(granules[g], static_cast<int32_t>(g * kGranule));
  }
  return best;
}

int64_t count_wrong(const Shape& shape, uint64_t seed) {
  Problem problem(shape);
  CoarsePlan plan =
      plan_coarse(hopper::kTile, shape.tokens, shape.code_rows, shape.split, host::Launcher(0).processors());
  std::vector<Best<float>> states(static_cast<size_t>(shape.tokens * plan.states()),
                                  Best<float>{NAN, NAN, -7});
  hopper_scores(seed, problem.tokens.data(), problem.codes.data(), problem.bias.data(), problem.scale.data(),
                shape.tokens, shape.code_rows, shape.depth, shape.split, states.data());
  int64_t wrong = 0;
  for (int64_t n = 0; n < shape.tokens; n += 3) {
    for (int64_t i = 0; i < plan.states(); ++i) {
      const Best<float>& state = states[static_cast<size_t>(n * plan.states() + i)];
      Best<double> truth = true_state(problem, plan, n, i / plan.groups, i % plan.groups);
      bool tie = close(truth.first, truth.second);
      bool right = close(state.first, truth.first) && close(state.second, truth.second);
      wrong += !right || (state.code != truth.code && !tie);
    }
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const Shape shapes[] = {{1, 256, 16, true},    {130, 512, 32, true},  {70, 512, 112, true},
                          {140, 256, 64, false}, {9, 1280, 272, false}, {900, 256, 16, true}};
  if (argc > 1) host::hopper_fault() = argv[1];
  int64_t wrong = 0;
  for (const Shape& shape : shapes) {
    for (uint64_t seed : {0, 9}) {
      if (wrong == 0) wrong = count_wrong(shape, seed);
    }
  }
  if (wrong == 0) {
    std::puts("ok");
  } else {
    std::printf("wrong %lld\n", static_cast<long long>(wrong));
  }
}
