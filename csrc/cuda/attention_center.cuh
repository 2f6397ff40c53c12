// The mean of the keys of a head (center), which the backward subtracts from the keys in dQ.
//
// Rows of dS sum to zero, or to dlse, so that dQ = scale * sum_j dS_ij (k_j - center) for any center. The output's
// rounding makes an error e in delta, which adds -e sum_j P_ij k_j to dQ: large where keys have an offset, such as the
// bias of a projection. With the mean as center, keys have no offset.
#pragma once
#include "attention_scores.cuh"

namespace tf::cuda {

constexpr int kCenterThreads = 512, kCenterKeys = 1024;  // the center is the mean of at most kCenterKeys keys

inline int64_t center_floats(const Attention& a) { return int64_t(a.batch) * a.key_heads * a.dim; }

// One block per key head; center: (batch, key heads, dim). A thread loads WIDTH columns of a key at once, and kAhead keys
// before it adds the first: there are few blocks, so that latency is what counts. Values that are not finite count as
// zeros: a mask may hide them.
template <class T, int D, int WIDTH>
__global__ void __launch_bounds__(kCenterThreads)
    attention_center_kernel(TF_GRID_CONSTANT Attention a, float* center) {
  constexpr int kLanes = (D + WIDTH - 1) / WIDTH, kRows = kCenterThreads / kLanes, kAhead = WIDTH == 1 ? 16 : 8;
  TF_SHARED(memory);
  float* const sums = reinterpret_cast<float*>(memory);  // (kRows, kLanes * WIDTH)
  const int column = threadIdx.x % kLanes * WIDTH, row = threadIdx.x / kLanes;
  const Head head = head_of(a, blockIdx.x / a.key_heads, blockIdx.x % a.key_heads * (a.heads / a.key_heads));
  const int step = max((head.keys + kCenterKeys - 1) / kCenterKeys, 1), count = (head.keys + step - 1) / step;
  const T* const keys = head_rows(static_cast<const T*>(a.key), a.key_strides, head.b, head.key_head, head.first_k);
  float sum[WIDTH] = {};
  for (int first = row; row < kRows && column < a.dim && first < count; first += kAhead * kRows) {
    Vec<T, WIDTH> x[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      x[i] = Vec<T, WIDTH>{};
      const int key = first + i * kRows;
      if (key < count) x[i] = load_vec<WIDTH>(keys + int64_t(key) * step * a.key_strides.row + column);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) {
        const float value = to_float(x[i].v[c]);
        sum[c] += fabsf(value) < kInfinity ? value : 0.f;
      }
  }
  if (row < kRows)
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) store_shared(sums + row * (kLanes * WIDTH) + column + c, sum[c]);
  __syncthreads();
  for (int d = threadIdx.x; d < a.dim; d += kCenterThreads) {
    float total = 0.f;
    for (int r = 0; r < kRows; ++r) total += load_shared(sums + r * (kLanes * WIDTH) + d);
    store(center + int64_t(blockIdx.x) * a.dim + d, total / float(max(count, 1)));
  }
}

template <class T, int D>
void launch_center(const Attention& a, float* center, Stream stream) {
  constexpr int kWide = 16 / sizeof(T), kBytes = kCenterThreads * kWide * sizeof(float);  // at least kRows * D floats
  const auto whole = [](int64_t stride) { return stride % kWide == 0; };
  const bool wide = a.dim % kWide == 0 && reinterpret_cast<uintptr_t>(a.key) % 16 == 0 && whole(a.key_strides.row) &&
                    whole(a.key_strides.head) && whole(a.key_strides.batch);
  const dim3 grid(unsigned(a.batch) * a.key_heads);
  if (wide) {
    TF_LAUNCH((attention_center_kernel<T, D, kWide>), grid, dim3(kCenterThreads), kBytes, stream, a, center);
  } else {
    TF_LAUNCH((attention_center_kernel<T, D, 1>), grid, dim3(kCenterThreads), kBytes, stream, a, center);
  }
}

TF_DEVICE const float* center_of(const Attention& a, const float* center, const Head& head) {
  return center + (int64_t(head.b) * a.key_heads + head.key_head) * a.dim;
}

}  // namespace tf::cuda
