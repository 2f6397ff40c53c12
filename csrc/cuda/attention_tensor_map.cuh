// The tensors of an attention call as TMA sees them: (batch, heads, rows, dim) in panels of 64 columns, 128 bytes.
#pragma once
#include <string>

#include "attention.hpp"
#include "ptx.cuh"

namespace tf::cuda {

struct Extents {  // unpadded: all rows as one sequence
  int64_t rows, heads, batch;
};
inline Extents query_extents(const Attention& a) {
  return a.cu_seqlens_q ? Extents{a.total_q, a.heads, 1} : Extents{a.max_seqlen_q, a.heads, a.batch};
}
inline Extents key_extents(const Attention& a) {
  return a.cu_seqlens_k ? Extents{a.total_k, a.key_heads, 1} : Extents{a.max_seqlen_k, a.key_heads, a.batch};
}

// TMA and vector accesses need alignment to 16 bytes. The stride of an axis of one element is never used.
inline bool is_aligned(const void* base, const RowStrides& strides, const Extents& extents) {
  const auto fits = [](int64_t stride, int64_t extent) {
    return extent == 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t(1) << 39));
  };
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && fits(strides.row, extents.rows) &&
         fits(strides.head, extents.heads) && fits(strides.batch, extents.batch);
}

// A tensor map with boxes of one panel by box_rows rows. Throws Refused.
inline TensorMap map_of(const Attention& a, const void* base, const RowStrides& strides, const Extents& extents,
                        int box_rows) {
  const auto bytes = [](int64_t stride, int64_t extent) { return uint64_t(extent == 1 ? 16 : 2 * stride); };
  const uint64_t sizes[4] = {uint64_t(a.dim), uint64_t(extents.rows), uint64_t(extents.heads), uint64_t(extents.batch)};
  const uint64_t steps[3] = {bytes(strides.row, extents.rows), bytes(strides.head, extents.heads),
                             bytes(strides.batch, extents.batch)};
  const uint32_t box[4] = {64, uint32_t(box_rows), 1, 1};
  TensorMap map;
  const std::string error = make_tensor_map(&map, a.dtype, base, 4, sizes, steps, box, Swizzle::b128);
  if (!error.empty()) throw Refused("wgmma: " + error);
  return map;
}

}  // namespace tf::cuda
