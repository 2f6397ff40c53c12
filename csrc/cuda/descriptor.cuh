// Descriptors of matrices in shared memory for wgmma (PTX ISA, "matrix descriptor").
#pragma once

namespace tf::cuda {

// 16-bit elements. K-major, the default: rows of swizzle_span bytes along K, eight rows per atom. stride_bytes: between
// atoms along M or N; leading_bytes: not used (Swizzle::none: between 8-element columns along K). A step of 16 along K
// adds 32 bytes to `shared`.
// Transposed (M or N is contiguous): rows of swizzle_span bytes along M or N, eight values of K per atom.
// stride_bytes: between atoms along K; leading_bytes: between spans along M or N.
// (Swizzle::none: these two are exchanged.)
TF_DEVICE uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes,
                                    Swizzle swizzle) {
  constexpr uint64_t code[4] = {0, 3, 2, 1};
  return uint64_t((shared_address(shared) & 0x3ffffu) >> 4) | uint64_t((leading_bytes & 0x3ffffu) >> 4) << 16 |
         uint64_t((stride_bytes & 0x3ffffu) >> 4) << 32 | code[int32_t(swizzle)] << 62;
}

}  // namespace tf::cuda
