// Tensor descriptors for TMA, made on the host.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

#include "types.hpp"
#include "swizzle.hpp"

namespace tf::cuda {

// sizes and box: in elements, innermost first; strides_bytes: of dimensions 1 .. rank - 1. With a swizzle, box[0] is
// its span. Returns "" when *map is made, else why not. Reads out of bounds give zeros.
inline std::string make_tensor_map(CUtensorMap* map, DType dtype, const void* base, int rank, const uint64_t* sizes,
                                   const uint64_t* strides_bytes, const uint32_t* box, Swizzle swizzle) {
  // The driver's function is looked up at run time: the library must load without a driver.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (!encode) return "the NVIDIA driver has no cuTensorMapEncodeTiled (too old for TMA)";
  constexpr CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                           CU_TENSOR_MAP_DATA_TYPE_FLOAT16};
  constexpr CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(map, types[int32_t(dtype)], cuuint32_t(rank), const_cast<void*>(base), sizes, strides_bytes, box,
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[int32_t(swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return "";
  return "cuTensorMapEncodeTiled refused the tensor (error " + std::to_string(int(result)) +
         "): base and strides must be multiples of 16 bytes, boxes at most 256 elements wide";
}

}  // namespace tf::cuda
