// How wgmma is told where a matrix lies in shared memory (PTX ISA, "matrix descriptor").
#pragma once

namespace tf::cuda {

// 16-bit elements. K-major, the default: rows of swizzle_span bytes along K, eight rows per atom; stride_bytes is from
// one atom to the next along M or N, leading_bytes is not used (none: from one 8-element column to the next along K).
// A step of 16 along K adds 32 bytes to `shared`.
// Transposed (M or N is contiguous): rows of swizzle_span bytes along M or N, eight values of K per atom;
// stride_bytes is from one atom to the next along K, leading_bytes from one span to the next along M or N.
// (none: the other way round.)
TF_DEVICE uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes,
                                    Swizzle swizzle) {
  constexpr uint64_t code[4] = {0, 3, 2, 1};
  return uint64_t((shared_address(shared) & 0x3ffffu) >> 4) | uint64_t((leading_bytes & 0x3ffffu) >> 4) << 16 |
         uint64_t((stride_bytes & 0x3ffffu) >> 4) << 32 | code[int32_t(swizzle)] << 62;
}

}  // namespace tf::cuda
