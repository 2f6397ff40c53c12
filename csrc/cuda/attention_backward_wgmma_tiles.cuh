// The tiles and scratch memory of attention_backward_wgmma.cuh, and the kernels before and after it: the first writes
// delta and clears the sums, the last reorders dQ.
#pragma once
#include "attention_center.cuh"

namespace tf::cuda {

// M queries by 128 keys. Tiles are stored in panels of 64 columns, 128 bytes: the widest swizzle.
template <int D, int M>
struct BackwardWgmmaTile {
  static_assert(D == 64 ? M == 128 : D == 128 && (M == 64 || M == 80));
  static constexpr int kKeys = 128, kStages = 2;
  static constexpr int kValueSteps = M == 80 ? 0 : 4;  // steps of 16 columns of V that are kept in registers
  static constexpr bool kWindows = D == 64 || M == 64;  // 80 queries: every query sees every key
  static constexpr int kThreads = 384;  // one producer warpgroup and two consumer warpgroups
  // A warpgroup computes 64 columns of the head by kSumQueries queries of dQ^T; a warp's part is 16 columns of that.
  static constexpr int kSumQueries = D == 64 ? M / 2 : M, kPart = 16 * kSumQueries, kParts = 8;
  static constexpr int kQueryBytes = M * D * 2, kKeyBytes = kKeys * D * 2, kScoreBytes = kKeys * M * 2;
  // Offsets in shared memory.
  static constexpr int kK = 0, kV = kK + kKeyBytes, kQ = kV + kKeyBytes, kGrad = kQ + kStages * kQueryBytes;
  static constexpr int kScore = kGrad + kStages * kQueryBytes, kSum = kScore + 2 * kScoreBytes;
  // keys - center, for dQ. Where there is no room for both (D 128, 80 queries), they replace the keys. The scores of a
  // row are then lower by q center, which `prepare` subtracts from the row's lse.
  static constexpr bool kInPlace = D == 128 && M == 80;
  static constexpr int kCentered = kInPlace ? kK : kSum + kParts * kPart * 4;
  static constexpr int kPeak = kSum + kParts * kPart * 4 + (kInPlace ? 0 : kKeyBytes), kDelta = kPeak + kStages * M * 4;
  static constexpr int kBarriers = kDelta + kStages * M * 4, kIndex = kBarriers + 8 * (1 + 4 * kStages);
  static constexpr int kBytes = kIndex + 8;
  static_assert(kParts * kPart == M * D && kPart * 4 >= 16 * D * 2);  // a part also holds 16 rows of dK
};

struct BackwardWgmma : AttentionBackward {
  // Scratch memory is laid out in tiles of queries. Every sequence starts a tile.
  int64_t head_tiles;  // of one head
  float* sums;         // dQ, unscaled: (heads, head_tiles, parts, part)
  float* statistics;   // (heads, head_tiles, 2, queries of a tile): lse * log2(e), +inf without keys; delta
  int32_t* turns;      // deterministic: (heads, head_tiles, parts), how many key blocks have added theirs
  float* center;       // see attention_center.cuh
  int32_t* ticket;     // deterministic: how many blocks have taken work; they take it in the order they start
  int32_t key_blocks, query_blocks, heads_together;
  float exponent_scale;
};

// The tile of scratch memory, within one head, that starts a sequence. Unpadded: (first_q + M b) / M, which leaves room
// for the last tile of every sequence and needs no sum over the sequences before.
template <int M>
TF_DEVICE int64_t first_tile(const BackwardWgmma& a, const Head& head) {
  return a.cu_seqlens_q ? head.first_q / M + head.b : int64_t(head.b) * a.query_blocks;
}

TF_DEVICE Vec<float, 8> load_center(const float* center) {
  const Vec<float, 4> low = load_vec<4>(center), high = load_vec<4>(center + 4);
  return {{low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]}};
}

// ---- before: delta, lse in the units of scores, zeros where sums go -------------------------------------------------
template <class T, int D, int M>
__global__ void __launch_bounds__(256) attention_backward_prepare_kernel(const BackwardWgmma a) {
  using Tile = BackwardWgmmaTile<D, M>;
  constexpr int kLanes = D / 8;
  const int32_t block = blockIdx.x % a.query_blocks, bh = blockIdx.x / a.query_blocks;
  const Head head = head_of(a, bh / a.heads, bh % a.heads);
  if (blockIdx.x == 0 && threadIdx.x == 0) store(a.ticket, int32_t(0));
  if (block * M >= head.queries) return;
  const int64_t tile = head.h * a.head_tiles + first_tile<M>(a, head) + block;
  const T* out = head_rows(static_cast<const T*>(a.out), a.out_strides, head.b, head.h, head.first_q);
  const T* grad = head_rows(static_cast<const T*>(a.grad_out), a.grad_out_strides, head.b, head.h, head.first_q);
  float* statistics = a.statistics + tile * 2 * M;
  const int lane = threadIdx.x % kLanes;
  for (int r = threadIdx.x / kLanes; r < M; r += 256 / kLanes) {
    const int32_t row = block * M + r;
    float delta = 0.f, moved = 0.f;  // moved: q center, by which the scores are lower
    if (row < head.queries) {
      if constexpr (Tile::kInPlace) {
        const T* queries = head_rows(static_cast<const T*>(a.query), a.query_strides, head.b, head.h, head.first_q);
        const Vec<T, 8> q = load_vec<8>(queries + row * a.query_strides.row + lane * 8);
        const Vec<float, 8> c = load_center(center_of(a, a.center, head) + lane * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) moved += to_float(q.v[i]) * c.v[i];
      }
      const Vec<T, 8> x = load_vec<8>(out + row * a.out_strides.row + lane * 8);
      const Vec<T, 8> y = load_vec<8>(grad + row * a.grad_out_strides.row + lane * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) delta += to_float(x.v[i]) * to_float(y.v[i]);
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      delta += __shfl_xor_sync(0xffffffffu, delta, step);
      if (Tile::kInPlace) moved += __shfl_xor_sync(0xffffffffu, moved, step);
    }
    if (lane == 0) {
      float peak = -kInfinity;
      if (row < head.queries) {
        const int64_t place = head.first_q + row;
        peak = load(a.lse + head.b * a.lse_batch + head.h * a.lse_head + place);
        if (a.grad_lse) delta -= load(a.grad_lse + head.b * a.grad_lse_batch + head.h * a.grad_lse_head + place);
      }
      const bool dead = peak == -kInfinity;
      store(statistics + r, dead ? kInfinity : peak * kLog2e - moved * a.exponent_scale);
      store(statistics + M + r, dead ? 0.f : delta);
    }
  }
  for (int i = threadIdx.x * 4; i < M * D; i += 256 * 4) store_vec(a.sums + tile * (M * D) + i, Vec<float, 4>{});
  if (a.deterministic && threadIdx.x < Tile::kParts) store(a.turns + tile * Tile::kParts + threadIdx.x, int32_t(0));
}

// ---- after: dQ in order, scaled, rounded ----------------------------------------------------------------------------
template <class T, int D, int M>
__global__ void __launch_bounds__(256) attention_backward_finish_kernel(const BackwardWgmma a) {
  using Tile = BackwardWgmmaTile<D, M>;
  const int32_t block = blockIdx.x % a.query_blocks, bh = blockIdx.x / a.query_blocks;
  const Head head = head_of(a, bh / a.heads, bh % a.heads);
  if (block * M >= head.queries) return;
  const float* sums = a.sums + (head.h * a.head_tiles + first_tile<M>(a, head) + block) * (M * D);
  T* dq = head_rows(static_cast<T*>(a.dq), a.dq_strides, head.b, head.h, head.first_q);
  for (int item = threadIdx.x; item < M * D / 16; item += 256) {
    // Two queries by eight columns. A part is [query / 8][column % 8][query % 8 / 2][column / 8 % 2][query % 2].
    const int half = item % 2, pair = item / 2 % 4, warp = item / 8 % 4, rest = item / 32;
    const int j = rest % (Tile::kSumQueries / 8), group = rest / (Tile::kSumQueries / 8);
    const int32_t row = block * M + (D == 64 ? group * Tile::kSumQueries : 0) + j * 8 + pair * 2;
    const int column = (D == 64 ? 0 : group * 64) + warp * 16 + half * 8;
    // A row of dS sums to the gradient of its lse; that sum times the center is missing from dQ.
    float excess[2] = {};
    Vec<float, 8> center{};
    if (a.grad_lse) {
      center = load_center(center_of(a, a.center, head) + column);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int64_t place = head.first_q + row + e;
        if (row + e < head.queries && load(a.lse + head.b * a.lse_batch + head.h * a.lse_head + place) != -kInfinity)
          excess[e] = load(a.grad_lse + head.b * a.grad_lse_batch + head.h * a.grad_lse_head + place);
      }
    }
    Vec<T, 8> rows[2];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int place = ((j * 8 + i) * 4 + pair) * 4 + half * 2;
      const Vec<float, 2> x = load_vec<2>(sums + (group * 4 + warp) * Tile::kPart + place);
#pragma unroll
      for (int e = 0; e < 2; e++) rows[e].v[i] = from_float<T>((x.v[e] + excess[e] * center.v[i]) * a.scale);
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if (row + e < head.queries) store_vec(dq + (row + e) * a.dq_strides.row + column, rows[e]);
    }
  }
}

}  // namespace tf::cuda
