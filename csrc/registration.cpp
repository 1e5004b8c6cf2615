// The only place where operators are declared: the raw kernels, namespace vqkernels_C, and their CPU
// implementations. The CUDA library registers its implementations of the same operators when it is loaded.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "cpu/snapshot.h"

STABLE_TORCH_LIBRARY(vqkernels_C, m) {
  m.def("nearest(Tensor x, Tensor codebook, bool cosine, bool exact) -> (Tensor, Tensor)");
  m.def("nearest_report(Tensor x, Tensor codebook, bool cosine, bool exact) -> (Tensor, Tensor, Tensor)");
  m.def(
      "nearest_both(Tensor x, Tensor codebook, Tensor? mask, bool cosine) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def("nearest_k(Tensor x, Tensor codebook, int k, bool cosine) -> (Tensor, Tensor)");
  m.def("take_snapshot(Tensor codebook, bool cosine, bool exact) -> int");
  m.def("nearest_of_snapshot(Tensor x, int snapshot) -> (Tensor, Tensor)");
  m.def("nearest_k_of_snapshot(Tensor x, int snapshot, int k) -> (Tensor, Tensor)");
  m.def("prepare_operands(Tensor codebook, bool cosine) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "nearest_of_operands(Tensor x, Tensor codebook, Tensor operand, Tensor bias, Tensor bound, Tensor "
      "centre,"
      " bool cosine, bool exact) -> (Tensor, Tensor)");
  m.def("gather(Tensor x, Tensor codebook, Tensor codes) -> (Tensor, Tensor)");
  m.def(
      "quantize(Tensor x, Tensor codebook, Tensor? mask, bool cosine, bool exact) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "quantize_backward(Tensor x, Tensor quantized, Tensor codes, Tensor? dquantized, Tensor? derror,"
      " bool rotation, Tensor? mask) -> Tensor");
  m.def(
      "codebook_gradient(Tensor x, Tensor quantized, Tensor codes, Tensor derror, int codebook_size) -> "
      "Tensor");
  m.def("codebook_stats(Tensor x, Tensor codes, int codebook_size) -> (Tensor, Tensor)");
  m.def("add_statistics_(Tensor x, Tensor codes, Tensor(a!) counts, Tensor(b!)? sums) -> ()");
  m.def(
      "ema_update_(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum, Tensor(d!) counts,"
      " Tensor(e!) sums, Tensor(f!) revive, float decay, float eps, float revived_size, bool normalize,"
      " bool plain, bool consume) -> ()");
  m.def(
      "ema_step_(Tensor x, Tensor codes, Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum,"
      " float decay, float eps, bool normalize, bool plain) -> ()");
  m.def("softmax_forward(Tensor x, Tensor codebook, Tensor? bias, float scale) -> (Tensor, Tensor)");
  m.def(
      "softmax_code_sums(Tensor x, Tensor codebook, Tensor? bias, float scale, Tensor lse, Tensor weight)"
      " -> Tensor");
  m.def(
      "softmax_backward(Tensor x, Tensor codebook, Tensor? bias, float scale, Tensor lse, Tensor dlse, Tensor"
      " dentropy, Tensor weight, Tensor? dcode_sums, Tensor? direction, bool need_codebook)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "softmax_sample(Tensor x, Tensor codebook, Tensor? bias, float scale, Tensor uniform)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_C, CPU, m) {
  m.impl("nearest", TORCH_BOX(&vqkernels::cpu::nearest));
  m.impl("nearest_report", TORCH_BOX(&vqkernels::cpu::nearest_report));
  m.impl("nearest_both", TORCH_BOX(&vqkernels::cpu::nearest_both));
  m.impl("nearest_k", TORCH_BOX(&vqkernels::cpu::nearest_k));
  m.impl("take_snapshot", TORCH_BOX(&vqkernels::cpu::take_snapshot));
  m.impl("nearest_of_snapshot", TORCH_BOX(&vqkernels::cpu::nearest_of_snapshot));
  m.impl("nearest_k_of_snapshot", TORCH_BOX(&vqkernels::cpu::nearest_k_of_snapshot));
  m.impl("gather", TORCH_BOX(&vqkernels::cpu::gather));
  m.impl("quantize", TORCH_BOX(&vqkernels::cpu::quantize));
  m.impl("quantize_backward", TORCH_BOX(&vqkernels::cpu::quantize_backward));
  m.impl("codebook_gradient", TORCH_BOX(&vqkernels::cpu::codebook_gradient));
  m.impl("codebook_stats", TORCH_BOX(&vqkernels::cpu::codebook_stats));
  m.impl("add_statistics_", TORCH_BOX(&vqkernels::cpu::add_statistics_));
  m.impl("ema_update_", TORCH_BOX(&vqkernels::cpu::ema_update_));
  m.impl("ema_step_", TORCH_BOX(&vqkernels::cpu::ema_step_));
  m.impl("softmax_forward", TORCH_BOX(&vqkernels::cpu::softmax_forward));
  m.impl("softmax_code_sums", TORCH_BOX(&vqkernels::cpu::softmax_code_sums));
  m.impl("softmax_backward", TORCH_BOX(&vqkernels::cpu::softmax_backward));
  m.impl("softmax_sample", TORCH_BOX(&vqkernels::cpu::softmax_sample));
}

#if defined(VQKERNELS_PYTHON_MODULE)
// Inside a wheel the library is the extension module vqkernels._C, which setuptools wants to be importable.
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
#endif

// For `vqkernels info`.
extern "C" __attribute__((visibility("default"))) const char* vqkernels_instruction_set() {
  return vqkernels::cpu::instruction_set();
}

// When the last Python object that knows the number is gone.
extern "C" __attribute__((visibility("default"))) void vqkernels_release_snapshot(int64_t number) {
  vqkernels::cpu::release_snapshot(number);
}

// For `explain`.
extern "C" __attribute__((visibility("default"))) const char* vqkernels_coarse_pass(int64_t size, int64_t dim,
                                                                                    int exact) {
  return vqkernels::cpu::coarse_pass(size, dim, exact != 0);
}

// For benchmarks: what the core can do at most.
extern "C" __attribute__((visibility("default"))) double vqkernels_peak_rate(const char* pass) {
  return vqkernels::cpu::peak_rate(pass);
}
