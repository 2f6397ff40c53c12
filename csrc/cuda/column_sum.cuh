// Sums over the rows of a matrix of partial results, in a fixed order: bitwise reproducible.
#pragma once
#include "simt.cuh"

namespace tf::cuda {

constexpr int kSumColumns = 32, kSumRows = 16;  // block shape
constexpr int kSumBytes = kSumColumns * kSumRows * int(sizeof(float));

inline dim3 column_sum_grid(int width, int matrices) {
  return dim3(unsigned((width + kSumColumns - 1) / kSumColumns), matrices);
}
inline dim3 column_sum_block() { return dim3(kSumColumns, kSumRows); }

// to[column] = the sum of partial (rows, width) along its rows, for the columns of block blockIdx.x. shared: kSumBytes.
TF_DEVICE void column_sum(const float* partial, int rows, int width, float* to, unsigned char* shared) {
  float* sums = reinterpret_cast<float*>(shared);
  const int column = blockIdx.x * kSumColumns + threadIdx.x;
  float total = 0.f;
  if (column < width) {
#pragma unroll 8
    for (int r = threadIdx.y; r < rows; r += kSumRows) total += load(partial + int64_t(r) * width + column);
  }
  store_shared(sums + threadIdx.y * kSumColumns + threadIdx.x, total);
  __syncthreads();
  if (threadIdx.y || column >= width) return;
#pragma unroll
  for (int y = 1; y < kSumRows; ++y) total += load_shared(sums + y * kSumColumns + threadIdx.x);
  store(to + column, total);
}

}  // namespace tf::cuda
