// Gradient of an attention bias that broadcasts: dS summed over the axes along which the bias has one element.
//
// The gradient of a bias that does not broadcast is written by the dQ kernel instead.
#pragma once
#include "attention_backward_mma.cuh"

namespace tf::cuda::backward_mma {

struct BiasTiles {  // sequences, heads, tiles of queries, tiles of keys
  int32_t own[4], each[4];  // tiles of dbias; tiles of scores that each tile of dbias sums
};

// One block owns a tile of dbias and walks over everything that shares it, computing dS again.
template <class T, int D>
__global__ void __launch_bounds__(kBackwardThreads)
    attention_backward_bias_kernel(TF_GRID_CONSTANT BackwardCall p, const BiasTiles tiles) {
  using Tile = BackwardTile<D, true>;
  constexpr int kColumns = Tile::kColumns, kScores = kColumns / 2, kPitch = kColumns + 1;
  TF_SHARED(memory);
  T* const q = reinterpret_cast<T*>(memory);
  T* const grad_out = q + Tile::kResident;
  T* const k = grad_out + Tile::kResident;
  T* const v = k + Tile::kStreamed;
  int rest = blockIdx.x, own[4];
#pragma unroll
  for (int axis = 3; axis >= 0; --axis) {
    own[axis] = rest % tiles.own[axis];
    rest /= tiles.own[axis];
  }
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const int count = tiles.each[0] * tiles.each[1] * tiles.each[2] * tiles.each[3];
  float sum[kScores] = {};
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    const int start = (own[3] + n % tiles.each[3]) * kColumns;
    const int first = (own[2] + n / tiles.each[3] % tiles.each[2]) * kBackwardRows;
    const int group = n / (tiles.each[3] * tiles.each[2]);
    const Head head = head_of(p, own[0] + group / tiles.each[1], own[1] + group % tiles.each[1]);
    if (first >= head.queries) continue;
    const Range range = key_range<kColumns>(p, head, first, min(first + kBackwardRows, head.queries) - 1);
    if (!is_seen<kColumns>(range, start)) continue;
    __syncthreads();  // no warp still reads the previous tiles
    const auto load_queries = [&](T* tile, const void* base, const RowStrides& rows) {
      load_rows<D, kBackwardRows, kBackwardThreads, true>(
          tile, head_rows(static_cast<const T*>(base), rows, head.b, head.h, head.first_q), rows.row, first,
          head.queries, p.dim, p.aligned);
    };
    const auto load_keys = [&](T* tile, const void* base, const RowStrides& rows) {
      load_rows<D, kColumns, kBackwardThreads, true>(
          tile, head_rows(static_cast<const T*>(base), rows, head.b, head.key_head, head.first_k), rows.row, start,
          head.keys, p.dim, p.aligned);
    };
    load_queries(q, p.query, p.query_strides);
    load_queries(grad_out, p.grad_out, p.grad_out_strides);
    load_keys(k, p.key, p.key_strides);
    load_keys(v, p.value, p.value_strides);
    cp_async_commit();
    float peak[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + warp_row + lane / 4 + 8 * half;
      const int64_t place = lse_place(p, head) + row;
      peak[half] = row < head.queries ? peak_of(load(p.lse + place)) : kInfinity;
      delta[half] = row < head.queries ? load(p.delta + place) : 0.f;
    }
    cp_async_wait<0>();
    __syncthreads();
    float s[kScores] = {}, dp[kScores] = {};
    multiply_rows<D>(grad_out, v, dp);
    multiply_rows<D>(q, k, s);
    finish_scores<false>(p, head, first + warp_row, start, s);
    if (!is_inner<kColumns>(range, start)) mask_edges<false>(p, head, first + warp_row, start, s);
    if (p.threshold) drop(kept_of(dropout_of(p, head), first + warp_row, start), start, dp);
    const float keep_scale = p.threshold ? p.keep_scale : 1.f;
#pragma unroll
    for (int e = 0; e < kScores; ++e)
      sum[e] += exp2_approx(s[e] * kLog2e - peak[e % 4 / 2]) * (dp[e] * keep_scale - delta[e % 4 / 2]);
  }

  __syncthreads();
  float* const all = reinterpret_cast<float*>(memory);
  for_each_score<false>(sum, warp_row, 0, [&](float& x, int i, int j) { store_shared(all + (i * kPitch + j), x); });
  __syncthreads();
  const int first = own[2] * kBackwardRows, start = own[3] * kColumns, thread = threadIdx.x;
  const int64_t row_stride = p.dbias_strides[2], column_stride = p.dbias_strides[3];
  float* const to = p.dbias + (own[0] * p.dbias_strides[0] + own[1] * p.dbias_strides[1]) + first * row_stride +
                    start * column_stride;
  if (row_stride && column_stride) {
    for (int e = thread; e < kBackwardRows * kColumns; e += kBackwardThreads) {
      const int i = e / kColumns, j = e % kColumns;
      if (first + i < p.max_seqlen_q && start + j < p.max_seqlen_k)
        store(to + (i * row_stride + j * column_stride), load_shared(all + (i * kPitch + j)));
    }
  } else if (column_stride) {
    float total = 0.f;
    if (thread >= kColumns || start + thread >= p.max_seqlen_k) return;
    for (int i = 0; i < kBackwardRows; ++i) total += load_shared(all + (i * kPitch + thread));
    store(to + thread * column_stride, total);
  } else {
    float total = 0.f;
    if (thread < kBackwardRows)
      for (int j = 0; j < kColumns; ++j) total += load_shared(all + (thread * kPitch + j));
    if (row_stride) {
      if (thread < kBackwardRows && first + thread < p.max_seqlen_q) store(to + thread * row_stride, total);
      return;
    }
    __syncthreads();
    if (thread < kBackwardRows) store_shared(all + thread, total);
    __syncthreads();
    if (thread > 0) return;
    for (int i = 1; i < kBackwardRows; ++i) total += load_shared(all + i);
    store(to, total);
  }
}

}  // namespace tf::cuda::backward_mma
