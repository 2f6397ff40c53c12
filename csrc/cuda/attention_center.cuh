// The mean of the keys of a head (center), which the backward subtracts from the keys in dQ.
//
// Rows of dS sum to zero, or to dlse, so that dQ = scale * sum_j dS_ij (k_j - center) for any center. The output's
// rounding makes an error e in delta, which adds -e sum_j P_ij k_j to dQ: large where keys have an offset, such as the
// bias of a projection. With the mean as center, keys have no offset.
#pragma once
#include "attention_scores.cuh"

namespace tf::cuda {

constexpr int kCenterWarps = 16, kCenterKeys = 1024;  // the center is the mean of at most kCenterKeys keys

inline int64_t center_floats(const Attention& a) { return int64_t(a.batch) * a.key_heads * a.dim; }

// One block per key head; center: (batch, key heads, dim). Values that are not finite count as zeros: a mask may hide
// them.
template <class T, int D>
__global__ void __launch_bounds__(32 * kCenterWarps)
    attention_center_kernel(TF_GRID_CONSTANT Attention a, float* center) {
  constexpr int kColumns = D / 32, kAhead = 512 / D;  // kAhead: loads in flight, as many as the registers hold
  TF_SHARED(memory);
  float* const sums = reinterpret_cast<float*>(memory);  // (warps, D)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Head head = head_of(a, blockIdx.x / a.key_heads, blockIdx.x % a.key_heads * (a.heads / a.key_heads));
  const int step = max((head.keys + kCenterKeys - 1) / kCenterKeys, 1), count = (head.keys + step - 1) / step;
  const T* const keys = head_rows(static_cast<const T*>(a.key), a.key_strides, head.b, head.key_head, head.first_k);
  float sum[kColumns] = {};
#pragma unroll(kAhead)
  for (int i = warp; i < count; i += kCenterWarps) {
    const T* const key = keys + int64_t(i) * step * a.key_strides.row;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (c * 32 + lane >= a.dim) continue;
      const float x = to_float(load(key + c * 32 + lane));
      sum[c] += fabsf(x) < kInfinity ? x : 0.f;
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) store_shared(sums + warp * D + c * 32 + lane, sum[c]);
  __syncthreads();
  for (int d = threadIdx.x; d < a.dim; d += 32 * kCenterWarps) {
    float total = 0.f;
    for (int w = 0; w < kCenterWarps; ++w) total += load_shared(sums + w * D + d);
    store(center + int64_t(blockIdx.x) * a.dim + d, total / float(max(count, 1)));
  }
}

template <class T, int D>
void launch_center(const Attention& a, float* center, Stream stream) {
  const dim3 grid(unsigned(a.batch) * a.key_heads);
  TF_LAUNCH((attention_center_kernel<T, D>), grid, dim3(32 * kCenterWarps), kCenterWarps * D * sizeof(float), stream, a,
            center);
}

TF_DEVICE const float* center_of(const Attention& a, const float* center, const Head& head) {
  return center + (int64_t(head.b) * a.key_heads + head.key_head) * a.dim;
}

}  // namespace tf::cuda
