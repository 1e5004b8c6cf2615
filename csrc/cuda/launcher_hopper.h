// Tensor maps and launches of the Hopper kernels.
#pragma once

#include <cuda.h>

#include <cstdlib>
#include <string>

#include "launcher.h"
#include "nearest_hopper.cuh"

namespace vqkernels::cuda {

// Whether $VQKERNELS_CUDA_COARSE asks for the Hopper kernel. Not the default before it has been measured.
inline bool hopper_wanted(Launcher&, bool supported) {
  const char* choice = std::getenv("VQKERNELS_CUDA_COARSE");
  std::string name = choice == nullptr ? "" : choice;
  check(name.empty() || name == "mma" || name == "hopper",
        "VQKERNELS_CUDA_COARSE: expected mma or hopper, got ", name);
  if (name != "hopper") return false;
  int device = 0, major = 0, minor = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  check(major == 9 && minor == 0, "VQKERNELS_CUDA_COARSE=hopper: expected compute capability 9.0, got ",
        major, ".", minor);
  check(supported, "VQKERNELS_CUDA_COARSE=hopper: expected D up to 384, got more; mma takes it");
  return true;
}

// Of the driver, found at run time: the library is not linked with it.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    constexpr int kVersion = 12000;  // the driver API that brought tensor maps
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kVersion,
                                                    cudaEnableDefault, &result));
#else
    STD_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
    check(result == cudaDriverEntryPointSuccess && found != nullptr,
          "cuTensorMapEncodeTiled: expected a driver for CUDA 12.0 or later, got one without it");
    return reinterpret_cast<Encode>(found);
  }();
  return encode;
}

// Boxes of `box_rows` rows and `box_columns` columns (32, 64 or 128 bytes) of a matrix, swizzled by their
// width; what lies outside reads as zero.
inline CUtensorMap make_tensor_map(Launcher&,
                                   const float16* data,  // [rows, columns], 16-byte aligned rows
                                   int64_t rows, int64_t columns, int box_rows, int box_columns) {
  CUtensorMap map;
  cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(columns) * sizeof(float16)};
  cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)},
             steps[2] = {1, 1};
  CUtensorMapSwizzle swizzle = box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                               : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                   : CU_TENSOR_MAP_SWIZZLE_32B;
  CUresult result =
      tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<float16*>(data), size,
                           row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(result), " for ", rows,
        " x ", columns);
  return map;
}

template <typename... Params, typename... Args>
void launch_hopper(Launcher& launcher, void (*kernel)(Params...), int64_t blocks, int threads,
                   const Args&... args) {
  launcher.launch_large<hopper::SharedMemory>(kernel, blocks, threads, args...);
}

}  // namespace vqkernels::cuda
