// Tiles of 16-bit values in shared memory, in the layout of the attention kernels for mma.sync.
#pragma once
#include "attention.hpp"
#include "ptx.cuh"
#include "simt.cuh"

namespace tf::cuda {

// Element offset of 16-byte chunk `chunk` of row `row` of a tile of D columns.
template <int D>
TF_DEVICE uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * D + ((chunk ^ (D % 64 ? row / 2 % 4 : row % 8)) * 8);
}

// Hides a value from the compiler: what depends on it is computed again where it is needed, not kept in registers.
TF_DEVICE uint32_t opaque(uint32_t x) {
#ifndef TF_EMULATE
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Loads rows first .. first + ROWS to shared memory; zeros past `limit` rows and `dim` columns, where nothing is read.
// ANY: rows need not be aligned to 16 bytes.
template <int D, int ROWS, int THREADS, bool ANY, class T>
TF_DEVICE void load_rows(T* tile, const T* rows, int64_t stride, uint32_t first, uint32_t limit, uint32_t dim,
                         bool aligned) {
  constexpr uint32_t kChunks = D / 8, kStep = THREADS / kChunks;
  static_assert(THREADS % kChunks == 0 && ROWS % kStep == 0);
  const uint32_t thread = opaque(threadIdx.x), chunk = thread % kChunks, row0 = thread / kChunks;
  const T* from = rows + ((first + row0) * stride + chunk * 8);
  if (!ANY || aligned) {
    const bool wide = chunk * 8 < dim;
#pragma unroll
    for (uint32_t row = row0; row < ROWS; row += kStep) {
      const bool inside = wide && first + row < limit;
      cp_async_16(tile + swizzled<D>(row, chunk), inside ? from : rows, inside);
      from += kStep * stride;
    }
  } else {
#pragma unroll 1
    for (uint32_t row = row0; row < ROWS; row += kStep) {
      Vec<T, 8> values;
#pragma unroll
      for (int c = 0; c < 8; ++c)
        values.v[c] = first + row < limit && chunk * 8 + c < dim ? load(from + c) : from_float<T>(0.f);
      store_shared_vec(tile + swizzled<D>(row, chunk), values);
      from += kStep * stride;
    }
  }
}

// Whether rows of 16-bit values can be moved 16 bytes at a time.
inline bool moves_by_16_bytes(const void* base, const RowStrides& strides) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && strides.batch % 8 == 0 && strides.head % 8 == 0 &&
         strides.row % 8 == 0;
}

}  // namespace tf::cuda
