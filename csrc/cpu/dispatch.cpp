// Which instruction set this process uses.
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernel_table.h"
#include "ops.h"
#include "training_table.h"

namespace vqkernels {
namespace cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_vnni() { return false; }
#endif

// Tiles are memory of every thread that the system reserves for a process that asks.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned TILES = 1u << 24, INT8 = 1u << 25;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & TILES) != 0 && (d & INT8) != 0 &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
  return false;
#endif
}

const KernelTable& avx512_table() {
  static const KernelTable table = [] {
    KernelTable best = *avx512_kernels();
    if (has_avx512_vnni()) {
      best.int16 = avx512_vnni_int16();
      best.byte = avx512_vnni_byte();
    }
    if (has_amx()) best.int8 = avx512_amx_int8();
    return best;
  }();
  return table;
}

const KernelTable& by_name(const char* name) {
  if (std::strcmp(name, "portable") == 0) return *portable_kernels();
  if (std::strcmp(name, "avx2") == 0 && has_avx2()) return *avx2_kernels();
  if (std::strcmp(name, "avx512") == 0 && has_avx512()) return avx512_table();
  throw std::runtime_error(
      std::string("VQKERNELS_CPU_ISA: expected avx512, avx2 or portable, whichever this CPU has; got ") +
      name);
}

}  // namespace

const KernelTable& kernels() {
  const char* name = std::getenv("VQKERNELS_CPU_ISA");
  if (name != nullptr && name[0] != '\0') return by_name(name);
  static const KernelTable& best = has_avx512() ? avx512_table()
                                   : has_avx2() ? *avx2_kernels()
                                                : *portable_kernels();
  return best;
}

const TrainingTable& training_kernels() {
  const char* name = kernels().name;
  if (std::strcmp(name, "avx512") == 0) return *avx512_training();
  return std::strcmp(name, "avx2") == 0 ? *avx2_training() : *portable_training();
}

const char* instruction_set() noexcept {
  try {
    return kernels().name;
  } catch (const std::runtime_error&) {
    return "?";
  }
}

}  // namespace cpu
}  // namespace vqkernels
