// Every kernel at ragged sizes, for a build with -fsanitize=address,undefined: what counts is that no
// sanitizer speaks. Exits 1 where an answer is impossible (a code out of range, an output never written).
#include "driver.cpp"

namespace {

std::mt19937_64 generator(1);

float normal() { return std::normal_distribution<float>()(generator); }

template <typename T>
std::vector<T> random_values(int64_t count, float scale) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) narrow(value, static_cast<Scalar<T>>(scale * normal()));
  return values;
}

struct Shape {
  int64_t batch, length, dim, codebook_size;
  bool channels_first;
  float scale;
};

View view_of(void* data, const Shape& shape) {
  int64_t b = shape.batch, t = shape.length, d = shape.dim;
  if (shape.channels_first) return {data, {b, t, d}, {t * d, 1, t}};
  return {data, {b, t, d}, {t * d, d, 1}};
}

void expect(bool condition, const char* message) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", message);
  std::exit(1);
}

template <typename T>
void search(const Shape& shape, int type, uint64_t seed, bool cosine, bool exact,
            std::vector<int64_t>& codes) {
  int64_t n = shape.batch * shape.length;
  std::vector<T> x = random_values<T>(n * shape.dim, shape.scale);
  std::vector<T> codebook = random_values<T>(shape.codebook_size * shape.dim, shape.scale);
  for (int64_t d = 0; d < shape.dim; ++d)
    codebook[(shape.codebook_size - 1) * shape.dim + d] = codebook[d];  // a tie
  std::vector<float> distance(static_cast<size_t>(n), -1.0f);
  codes.assign(static_cast<size_t>(n), -2);
  View view = view_of(x.data(), shape);
  std::vector<int64_t> again(codes.size(), -2);
  host_nearest_prepared(seed, type, &view, codebook.data(), shape.codebook_size, cosine, exact, again.data(),
                        distance.data());
  Counted counted;
  host_nearest(seed, type, &view, codebook.data(), shape.codebook_size, cosine, exact, codes.data(),
               distance.data(), &counted);
  expect(codes == again, "a prepared codebook with other codes");
  for (int64_t i = 0; i < n; ++i) {
    expect(codes[i] >= 0 && codes[i] < shape.codebook_size, "a code out of range");
    expect(distance[i] >= 0, "a distance not written");
  }
  std::vector<T> quantized(x.size()), gradient = random_values<T>(n * shape.dim, 1.0f), dx(x.size());
  std::vector<Scalar<T>> error(codes.size());
  View quantized_view = view_of(quantized.data(), shape), dx_view = view_of(dx.data(), shape);
  View gradient_view = view_of(gradient.data(), shape);
  host_gather(seed, type, &view, codebook.data(), shape.codebook_size, codes.data(), &quantized_view,
              error.data());
  for (bool rotation : {false, true}) {
    host_quantize_backward(seed, type, &view, &quantized_view, codes.data(), &gradient_view, error.data(),
                           rotation, &dx_view, nullptr);
  }
}

template <typename T>
void train(const Shape& shape, int type, uint64_t seed, std::vector<int64_t> codes) {
  using S = Scalar<T>;
  int64_t n = shape.batch * shape.length, k = shape.codebook_size, rows = k * shape.dim;
  if (n > 2) codes[0] = -1, codes[1] = codes[2];
  std::vector<T> x = random_values<T>(n * shape.dim, shape.scale);
  std::vector<S> counts(static_cast<size_t>(k), S(-1)), sums(static_cast<size_t>(rows), S(-1));
  View view = view_of(x.data(), shape);
  host_codebook_stats(seed, type, &view, codes.data(), k, counts.data(), sums.data());
  std::vector<S> codebook = random_values<S>(rows, 1.0f), embed_sum = random_values<S>(rows, 1.0f),
                 size(counts.size(), S(1));
  std::unique_ptr<bool[]> revive(new bool[static_cast<size_t>(k)]());
  revive[0] = true;
  for (bool normalize : {false, true}) {
    host_ema_update(seed, type, codebook.data(), size.data(), embed_sum.data(), counts.data(), sums.data(),
                    revive.get(), k, shape.dim, 0.9, 1e-5, 2.0, normalize, false);
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 1, 1, false, 1.0f},     {1, 5, 3, 2, false, 1.0f},
                          {2, 3, 5, 40, true, 1.0f},     {1, 17, 33, 70, false, 1.0f},
                          {3, 45, 18, 130, true, 1e-3f}, {1, 9, 70, 260, false, 1.0f},
                          {0, 4, 4, 5, false, 1.0f}};
  int run = 0;
  for (const Shape& shape : shapes) {
    for (int type = run % 2; type < 4; type += 2) {  // two of the four types a shape
      uint64_t seed = static_cast<uint64_t>(run % 3);
      bool cosine = run % 2 == 1, exact = run % 5 != 4;
      ++run;
      dispatch(type, [&](auto zero) {
        using T = decltype(zero);
        std::vector<int64_t> codes;
        search<T>(shape, type, seed, cosine, exact, codes);
        train<T>(shape, type, seed, codes);
      });
    }
  }
  std::puts("ok");
}
