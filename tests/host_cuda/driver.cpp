// The launch sequences of csrc/cuda on the host, as C functions for ctypes. Types: 0 float32, 1 float16, 2
// bfloat16, 3 float64.
#include "launcher_host.h"

#include "../../csrc/cuda/codebook_stats.cuh"
#include "../../csrc/cuda/ema_update.cuh"
#include "../../csrc/cuda/gather.cuh"
#include "../../csrc/cuda/nearest.cuh"
#include "../../csrc/cuda/quantize_backward.cuh"

namespace {

using namespace vqkernels::cuda;
using vqkernels::host_cuda::Launcher;

// A [B, T, D] tensor: sizes and strides in elements.
struct View {
  void* data;
  int64_t size[3];
  int64_t stride[3];

  template <typename T>
  Tokens<T> as() const {
    return merge_batch(
        Tokens<T>{static_cast<T*>(data), size[0], size[1], size[2], stride[0], stride[1], stride[2]});
  }
};

template <typename Run>
void dispatch(int type, Run run) {
  if (type == 0) run(float{});
  if (type == 1) run(float16{});
  if (type == 2) run(bfloat16{});
  if (type == 3) run(double{});
}

// Wrong on purpose: neighbours read what a barrier should have made visible.
template <typename T>
VQ_KERNEL(64, 1)
rotate_without_barrier_kernel(T* out) {  // [64]
  struct Memory {
    T entry[64];
  };
  Memory& memory = shared_memory<Memory>();
  int i = thread_index();
  memory.entry[i] = static_cast<T>(i);
  out[i] = memory.entry[(i + 1) % 64];
}

// The same with a copy that nobody waits for.
template <typename T>
VQ_KERNEL(64, 1)
copy_without_wait_kernel(const Chunk* in,  // [64]
                         T* out) {         // [64]
  struct Memory {
    Chunk chunk[64];
  };
  Memory& memory = shared_memory<Memory>();
  int i = thread_index();
  copy_async(&memory.chunk[i], &in[i], true);
  commit_copies();
  wait_copies<1>();
  barrier();
  out[i] = static_cast<T>(memory.chunk[i].words[0]);
  wait_copies<0>();
}

struct Counted {
  int64_t launches;
  int64_t exact_road;  // tokens that took it
};

struct CountingLauncher : Launcher {
  using Launcher::Launcher;

  template <typename... Params, typename... Args>
  void launch(void (*kernel)(Params...), int64_t blocks, int threads, Args... args) {
    ++counted.launches;
    Launcher::launch(kernel, blocks, threads, args...);
  }
  template <typename T>
  void launch(void (*kernel)(Search<T>, States<T>, Certificate<T>, bool, int64_t*, int64_t*, float*),
              int64_t blocks, int threads, Search<T> search, States<T> states, Certificate<T> certificate,
              bool exact, int64_t*, int64_t* codes, float* distance) {
    ++counted.launches;
    Launcher::launch(kernel, blocks, threads, search, states, certificate, exact, &counted.exact_road, codes,
                     distance);
  }

  Counted counted{};
};

}  // namespace

extern "C" {

void host_copy_without_wait(const void* in, int64_t* out) {
  Launcher launcher(0);
  launcher.launch(copy_without_wait_kernel<int64_t>, 1, 64, static_cast<const Chunk*>(in), out);
}

// The coarse pass alone; returns the number of splits.
int64_t host_coarse(uint64_t seed, const void* tokens, const void* codes, const float* bias,
                    const float* scale, int64_t token_count, int64_t code_rows, int64_t depth, bool split,
                    void* states) {
  Launcher launcher(seed);
  const float16 *x = static_cast<const float16*>(tokens), *c = static_cast<const float16*>(codes);
  Operands operands{x, c, bias, scale, token_count, code_rows, depth};
  CoarsePass pass =
      split ? run_coarse_pass<true>(launcher, operands) : run_coarse_pass<false>(launcher, operands);
  std::memcpy(states, pass.states,
              sizeof(Best<float>) * static_cast<size_t>(token_count * pass.plan.states()));
  return pass.plan.splits;
}

void host_rotate_without_barrier(uint64_t seed, int64_t* out) {
  Launcher launcher(seed);
  launcher.launch(rotate_without_barrier_kernel<int64_t>, 1, 64, out);
}

void host_nearest(uint64_t seed, int type, const View* x, const void* codebook, int64_t codebook_size,
                  bool cosine, bool exact, int64_t* codes, float* distance, Counted* counted) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    CountingLauncher launcher(seed);
    nearest(launcher, x->as<const T>(), static_cast<const T*>(codebook), codebook_size, cosine, exact, codes,
            distance);
    *counted = launcher.counted;
  });
}

// Codes prepared first, by a launcher of its own, then two searches with them: the second one's answers.
void host_nearest_prepared(uint64_t seed, int type, const View* x, const void* codebook,
                           int64_t codebook_size, bool cosine, bool exact, int64_t* codes, float* distance) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const T* rows = static_cast<const T*>(codebook);
    Tokens<const T> tokens = x->as<const T>();
    Tokens<const T> none{nullptr, 0, 0, tokens.dim, 0, 0, 1};
    Launcher keeper(seed);
    Kept<T> kept{};
    if constexpr (std::is_same_v<T, double>) {
      kept = {keeper.allocate<double>(cosine ? codebook_size * tokens.dim : 0),
              keeper.allocate<double>(codebook_size), keeper.allocate<DoubleSummary>(1)};
      keeper.zero(kept.summary, sizeof(DoubleSummary));
      prepare_codes(keeper, Search<T>{none, rows, codebook_size, cosine}, kept);
    } else {
      bool split = splits_terms(tokens.dim);
      kept = split ? plan_codes<true>(codebook_size, tokens.dim, keeper.processors())
                   : plan_codes<false>(codebook_size, tokens.dim, keeper.processors());
      kept.codes = keeper.allocate<float16>(kept.code_rows * kept.depth);
      kept.bias = keeper.allocate<float>(split ? 0 : kept.code_rows);
      kept.bound = keeper.allocate<CodebookBound>(1);
      kept.centres = keeper.allocate<float>(kept.code_blocks * tokens.dim);
      keeper.zero(kept.bound, sizeof(CodebookBound));
      Search<T> search{none, rows, codebook_size, cosine};
      split ? prepare_codes<true>(keeper, search, kept) : prepare_codes<false>(keeper, search, kept);
    }
    for (int call = 0; call < 2; ++call) {
      Launcher launcher(seed);
      nearest(launcher, tokens, rows, codebook_size, cosine, exact, codes, distance, &kept);
    }
  });
}

void host_gather(uint64_t seed, int type, const View* x, const void* codebook, int64_t codebook_size,
                 const int64_t* codes, const View* quantized, void* error) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    Launcher launcher(seed);
    gather(launcher, x->as<const T>(), static_cast<const T*>(codebook), codebook_size, codes,
           quantized->as<T>(), static_cast<Scalar<T>*>(error));
  });
}

void host_quantize_backward(uint64_t seed, int type, const View* x, const View* quantized,
                            const int64_t* codes, const View* dquantized, const void* derror, bool rotation,
                            const View* dx, const bool* mask) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    Launcher launcher(seed);
    Tokens<const T> gradient = dquantized == nullptr ? Tokens<const T>{} : dquantized->as<const T>();
    quantize_backward(launcher, x->as<const T>(), quantized->as<const T>(), codes, gradient,
                      static_cast<const Scalar<T>*>(derror), rotation, dx->as<T>(), mask);
  });
}

void host_codebook_stats(uint64_t seed, int type, const View* x, const int64_t* codes, int64_t codebook_size,
                         void* counts, void* sums) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    Launcher launcher(seed);
    codebook_stats<T>(launcher, x->as<const T>(), codes, codebook_size, static_cast<Scalar<T>*>(counts),
                      static_cast<Scalar<T>*>(sums));
  });
}

void host_ema_update(uint64_t seed, int type, void* codebook, void* cluster_size, void* embed_sum,
                     const void* counts, const void* sums, const bool* revive, int64_t codebook_size,
                     int64_t dim, double decay, double eps, double revived_size, bool normalize, bool plain) {
  auto run = [&](auto zero) {
    using S = decltype(zero);
    Launcher launcher(seed);
    ema_update(launcher, EmaUpdate<S>{static_cast<S*>(codebook), static_cast<S*>(cluster_size),
                                      static_cast<S*>(embed_sum), static_cast<const S*>(counts),
                                      static_cast<const S*>(sums), revive, codebook_size, dim, decay, eps,
                                      revived_size, normalize, plain});
  };
  type == 3 ? run(double{}) : run(float{});
}

}  // extern "C"
