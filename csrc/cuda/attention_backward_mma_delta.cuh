// delta = rowsum(dO * O) - dlse, which attention_backward_mma.cuh subtracts from dP.
#pragma once
#include "attention_backward_mma_tiles.cuh"

namespace tf::cuda::backward_mma {

TF_DEVICE int64_t lse_place(const AttentionBackward& a, const Head& head) {
  return head.b * a.lse_batch + head.h * a.lse_head + head.first_q;
}

// lse in units of log 2; +inf for a row with nothing to attend to, so that its P is zero.
TF_DEVICE float peak_of(float lse) { return lse == -kInfinity ? kInfinity : lse * kLog2e; }

TF_DEVICE float load_grad_lse(const AttentionBackward& a, const Head& head, int row) {
  return load(a.grad_lse + (head.b * a.grad_lse_batch + head.h * a.grad_lse_head + head.first_q + row));
}

TF_DEVICE void store_delta(const AttentionBackward& a, const Head& head, int row, float sum) {
  if (a.grad_lse) sum -= load_grad_lse(a, head, row);
  const int64_t place = lse_place(a, head) + row;
  store(a.delta + place, load(a.lse + place) == -kInfinity ? 0.f : sum);
}

constexpr int kDeltaLanes = 8, kDeltaRows = kBackwardThreads / kDeltaLanes;  // threads per row, rows per block

template <class T>
__global__ void __launch_bounds__(kBackwardThreads)
    attention_backward_delta_kernel(TF_GRID_CONSTANT BackwardCall p) {
  const BackwardPlace at = place_of(p, blockIdx.x, p.heads, false);
  const Head head = head_of(p, at.b, at.h);
  const int row = at.block * kDeltaRows + int(threadIdx.x) / kDeltaLanes, lane = threadIdx.x % kDeltaLanes;
  float sum = 0.f;
  if (row < head.queries) {
    const T* const out =
        head_rows(static_cast<const T*>(p.out), p.out_strides, at.b, at.h, head.first_q) + row * p.out_strides.row;
    const T* const grad = head_rows(static_cast<const T*>(p.grad_out), p.grad_out_strides, at.b, at.h, head.first_q) +
                          row * p.grad_out_strides.row;
    if (p.aligned) {
      for (int d = lane * 8; d < p.dim; d += kDeltaLanes * 8) {
        const Vec<T, 8> o = load_vec<8>(out + d), g = load_vec<8>(grad + d);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum += to_float(o.v[e]) * to_float(g.v[e]);
      }
    } else {
      for (int d = lane; d < p.dim; d += kDeltaLanes) sum += to_float(load(out + d)) * to_float(load(grad + d));
    }
  }
#pragma unroll
  for (int step = 1; step < kDeltaLanes; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (row < head.queries && lane == 0) store_delta(p, head, row, sum);
}

}  // namespace tf::cuda::backward_mma
