// Shared by the norm kernels: how threads of a block map to rows, 16-byte vectors of elements, sums over a row.
//
// A block is (threads per row, rows). There are 1, 2, 4 .. 32 threads per row, or a multiple of 32.
#pragma once
#include "norm.hpp"
#include "vector.cuh"
#include "philox.cuh"
#include "ptx.cuh"
#include "simt.cuh"

#include <algorithm>

namespace tf::cuda {

constexpr int kNormThreads = 512;

template <class T, int kWidth>
TF_DEVICE Vector<T, kWidth> read_vector(const T* row, int column, bool inside) {
  Vector<T, kWidth> vector;
  vector.clear();
  if (inside) vector.read(row + column);
  return vector;
}

// kWidth values of weight or bias; neither is null.
template <class T, int kWidth>
TF_DEVICE void read_parameter(Parameter p, int column, float (&f)[kWidth]) {
  if (p.wide) {
    const float* from = static_cast<const float*>(p.data) + column;
    if constexpr (kWidth == 1) {
      f[0] = load(from);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; i += 4) {
        const Vec<float, 4> four = load_vec<4>(from + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) f[i + j] = four.v[j];
      }
    }
  } else {
    Vector<T, kWidth> vector;
    vector.read(static_cast<const T*>(p.data) + column);
    vector.get(f);
  }
}

// Multiplies f by the dropout factors of columns column .. column + kWidth of a row. With kWidth > 1 all lanes of the
// warp must take part, with the same row.
template <int kWidth>
TF_DEVICE void drop_row(const RowDropout& d, PhiloxKey key, int64_t row, int column, float (&f)[kWidth]) {
  if constexpr (kWidth == 1) {
    f[0] *= keeps(key, 0, uint32_t(row), uint32_t(column), d.threshold) ? d.keep_scale : 0.f;
  } else {
    const uint32_t kept = warp_keep_bits<kWidth>(key, uint32_t(row), uint32_t(column), d.threshold);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) f[i] *= kept >> i & 1 ? d.keep_scale : 0.f;
  }
}

// Bytes of shared memory that row_sum takes.
constexpr int row_sum_bytes(int values) { return 2 * (kNormThreads / 32) * values * int(sizeof(float)); }

// Sums v over the threads of a row; every thread gets the sums, added in one order. Calls alternate turn 0 and 1.
// kNamed: the warps of each row have a named barrier of their own (at most 15 rows of several warps). Otherwise a row
// of several warps has the block to itself.
template <bool kNamed, int kValues>
TF_DEVICE void row_sum(float (&v)[kValues], float* scratch, int turn) {
  const int threads = blockDim.x;
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    if (offset < threads) {
#pragma unroll
      for (float& value : v) value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
  }
  if (threads <= 32) return;
  const int warps = threads / 32, warp = threadIdx.x / 32;
  float* row = scratch + (turn * int(blockDim.y) + int(threadIdx.y)) * warps * kValues;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) store_shared(row + warp * kValues + i, v[i]);
  }
  if constexpr (kNamed) {
    named_barrier_sync(1 + threadIdx.y, threads);
  } else {
    __syncthreads();
  }
#pragma unroll
  for (float& value : v) value = 0.f;
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] += load_shared(row + w * kValues + i);
  }
}

// Threads for a row of `vectors` vectors, at most `most` per thread.
inline int row_threads(int vectors, int most, bool whole_warps) {
  const int threads = (vectors + most - 1) / most;
  if (threads > 32 || whole_warps) return (threads + 31) / 32 * 32;
  int power = 4;
  while (power < threads) power *= 2;
  return power;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace tf::cuda
