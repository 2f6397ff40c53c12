// The gradient of a relative bias: dS summed per distance, for attention_backward_mma.cuh.
#pragma once
#include "attention_backward_mma_tiles.cuh"

namespace tf::cuda::backward_mma {

// Sums of dS per distance for one block of queries, in its (2 * reach + 1,) slice of the scratch (heads, batch, blocks,
// 2 * reach + 1), which starts as zeros. One thread adds to each element, in one order. Sums for distances at the ends
// and beyond stay in registers until finish().
struct DistanceSums {
  float low, high;

  static TF_DEVICE float* place(const BackwardCall& p, const Head& head, int block) {
    return p.scratch + (int64_t(head.h * p.batch + head.b) * p.blocks + block) * (2 * p.reach + 1);
  }

  template <int COLUMNS, int E>
  TF_DEVICE void add(const BackwardCall& p, const Head& head, int first, int mine, int start, float (&ds)[E],
                     float* scores) {
    constexpr int kPitch = COLUMNS + 1;
    const int nearest = start - (first + kBackwardRows - 1 + head.offset);
    const int farthest = start + COLUMNS - 1 - (first + head.offset);
    const int reach = p.reach;
    for_each_score<false>(ds, mine, start, [&](float& x, int i, int j) {
      const int distance = j - i - head.offset;
      if (distance <= -reach) {
        low += x;
      } else if (distance >= reach) {
        high += x;
      }
    });
    if (farthest <= -reach || nearest >= reach) return;
    for_each_score<false>(ds, mine, start, [&](float& x, int i, int j) {
      store_shared(scores + ((i - first) * kPitch + j - start), x);
    });
    __syncthreads();
    const int diagonal = int(threadIdx.x) - (kBackwardRows - 1);  // column - row
    const int distance = nearest + int(threadIdx.x);
    if (diagonal < COLUMNS && distance > -reach && distance < reach) {
      float sum = 0.f;
      for (int row = max(0, -diagonal); row < min(kBackwardRows, COLUMNS - diagonal); ++row)
        sum += load_shared(scores + (row * kPitch + row + diagonal));
      float* const to = place(p, head, first / kBackwardRows) + (distance + reach);
      store(to, load(to) + sum);
    }
  }

  TF_DEVICE void finish(const BackwardCall& p, const Head& head, int first, float* shared) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      low += __shfl_xor_sync(0xffffffffu, low, step);
      high += __shfl_xor_sync(0xffffffffu, high, step);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
      store_shared(shared + threadIdx.x / 32, low);
      store_shared(shared + 4 + threadIdx.x / 32, high);
    }
    __syncthreads();
    if (threadIdx.x < 2) {
      float sum = 0.f;
      for (int w = 0; w < 4; ++w) sum += load_shared(shared + (4 * threadIdx.x + w));
      store(place(p, head, first / kBackwardRows) + 2 * p.reach * int(threadIdx.x), sum);
    }
  }
};

// Size of the scratch.
inline int64_t distance_floats(const AttentionBackward& a) {
  const int64_t blocks = (int64_t(a.max_seqlen_q) + kBackwardRows - 1) / kBackwardRows;
  return a.drelative_bias ? a.batch * a.heads * blocks * (2 * int64_t(a.reach) + 1) : 0;
}

// Sums the results of DistanceSums over sequences and blocks of queries.
static __global__ void __launch_bounds__(kBackwardThreads)
    attention_backward_distance_kernel(TF_GRID_CONSTANT BackwardCall p) {
  const int distances = 2 * p.reach + 1, place = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (place >= p.heads * distances) return;
  const float* from = p.scratch + (int64_t(place / distances) * p.batch * p.blocks * distances + place % distances);
  float sum = 0.f, lost = 0.f;  // Kahan summation: the ends collect most distances, long sums of small terms
  for (int n = p.batch * p.blocks; n > 0; --n, from += distances) {
    const float term = load(from) - lost, next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  }
  store(p.drelative_bias + place, sum);
}

}  // namespace tf::cuda::backward_mma
