// Attention, forward, for sm_80 and up: FlashAttention-2 (Dao, 2023) with mma.sync m16n8k16.
//
//   out = softmax(score) V      lse = log sum exp(score)
//
// Four warps share a block of queries, M * 16 rows per warp, and walk over blocks of N keys. Q, one block of K and one
// of V are in shared memory, their 16-byte chunks XOR-swizzled so that ldmatrix has no bank conflicts. cp.async loads V
// during Q K^T, and the next K during softmax and P V. P goes from accumulators to operands within registers.
#pragma once
#include "attention_scores.cuh"
#include "attention_tiles.cuh"

namespace tf::cuda {

// Thread blocks go through `heads_together` heads block by block, so that their keys and values stay in the L2 cache.
// Causal: from the last block, which is the longest, to the first.
struct BlockOrder {
  int32_t blocks, batch_heads, heads_together;
  bool descending;
};

template <class T_, int D_, int M_, int N_, bool RICH_, int BLOCKS_>
struct ForwardTile {
  using T = T_;  // half_t or bf16_t
  static constexpr int D = D_, M = M_, N = N_;  // D: head dims up to D, padded with zeros
  static constexpr bool RICH = RICH_;           // any feature that is_plain() excludes, rows of any alignment
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * M * kWarps;
  static constexpr int kBlocks = BLOCKS_;  // per multiprocessor: bounds the registers
  static constexpr int kTileBytes = (kRows + 2 * N) * D * int(sizeof(T));
};

// s += Q K^T for the warp's rows from first_row on and N keys.
template <class Tile>
TF_DEVICE void multiply_keys(const typename Tile::T* q, const typename Tile::T* k, uint32_t first_row,
                             float (&s)[Tile::M][Tile::N / 2]) {
  constexpr int D = Tile::D, M = Tile::M, N = Tile::N;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    const uint32_t lane = opaque(threadIdx.x) % 32;
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
      ldmatrix_x4(a[m], q + swizzled<D>(first_row + 16 * m + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t b[4];
      ldmatrix_x4(b, k + swizzled<D>(n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_m16n8k16<typename Tile::T>(accumulator(s[m], n / 8), a[m], low);
        mma_m16n8k16<typename Tile::T>(accumulator(s[m], n / 8 + 1), a[m], high);
      }
    }
  }
}

// o += P V. p: pairs of P in the order of accumulators, which is also that of operands.
template <class Tile>
TF_DEVICE void multiply_values(const uint32_t (&p)[Tile::M][Tile::N / 4], const typename Tile::T* v,
                               float (&o)[Tile::M][Tile::D / 2]) {
  constexpr int D = Tile::D, M = Tile::M, N = Tile::N;
  using T = typename Tile::T;
#pragma unroll
  for (int step = 0; step < N / 16; ++step) {
    const uint32_t lane = opaque(threadIdx.x) % 32;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v + swizzled<D>(16 * step + lane % 16, d / 8 + lane / 16));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const auto& a = *reinterpret_cast<const uint32_t(*)[4]>(&p[m][4 * step]);
        mma_m16n8k16<T>(accumulator(o[m], d / 8), a, low);
        mma_m16n8k16<T>(accumulator(o[m], d / 8 + 1), a, high);
      }
    }
  }
}

// What a block needs besides its tiles. It is kept in shared memory after them, to leave registers for accumulators.
template <class T>
struct Program {
  Head head;
  Range own[4];  // keys that the queries of each warp see
  const T *k, *v;  // row 0 of the head
  int32_t first;  // query of the block
};

// exp(score) = 2 ^ (to_log2 * accumulator)
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    attention_forward_mma_kernel(TF_GRID_CONSTANT AttentionForward a, const BlockOrder order, const float to_log2,
                                 const bool aligned) {
  using T = typename Tile::T;
  constexpr int D = Tile::D, M = Tile::M, N = Tile::N;
  TF_SHARED(memory);
  T* const q = reinterpret_cast<T*>(memory);
  T* const k = q + Tile::kRows * D;
  T* const v = k + N * D;
  auto* const program = reinterpret_cast<Program<T>*>(v + N * D);

  const uint32_t many = uint32_t(order.blocks * order.heads_together), group = blockIdx.x / many;
  const uint32_t rest = blockIdx.x % many, first_bh = group * uint32_t(order.heads_together);
  const uint32_t together = min(uint32_t(order.heads_together), uint32_t(order.batch_heads) - first_bh);
  const int32_t bh = int32_t(first_bh + rest % together), block = int32_t(rest / together);
  const int32_t first = (order.descending ? order.blocks - 1 - block : block) * Tile::kRows;
  const Head head = head_of(a, bh / a.heads, bh % a.heads);
  if (first >= head.queries) return;

  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp * 16 * M;
  const T* const q_rows = head_rows(static_cast<const T*>(a.query), a.query_strides, head.b, head.h, head.first_q);
  const T* const k_rows = head_rows(static_cast<const T*>(a.key), a.key_strides, head.b, head.key_head, head.first_k);
  if (threadIdx.x == 0) {
    store_shared(&program->head, head);
    store_shared(&program->k, k_rows);
    store_shared(&program->v,
                 head_rows(static_cast<const T*>(a.value), a.value_strides, head.b, head.key_head, head.first_k));
    store_shared(&program->first, first);
  }
  const int32_t top = first + int32_t(warp_row);
  if (lane == 0)
    store_shared(&program->own[warp], top < head.queries
                                          ? key_range<N>(a, head, top, min(top + 16 * M, head.queries) - 1)
                                          : Range{0, 0, 0, 0});
  const Range keys = key_range<N>(a, head, first, min(first + Tile::kRows, head.queries) - 1);
  Kept kept[M] = {};
  int32_t kept_group = -1;

  float o[M][D / 2] = {}, peak[M][2], total[M][2] = {};
#pragma unroll
  for (int m = 0; m < M; ++m) peak[m][0] = peak[m][1] = -kInfinity;

  load_rows<D, Tile::kRows, Tile::kThreads, Tile::RICH>(q, q_rows, a.query_strides.row, first, head.queries, a.dim,
                                                        aligned);
  if (keys.begin < keys.end)
    load_rows<D, N, Tile::kThreads, Tile::RICH>(k, k_rows, a.key_strides.row, keys.begin, head.keys, a.dim, aligned);
  cp_async_commit();

  for (int32_t start = keys.begin; start < keys.end; start += N) {
    float s[M][N / 2] = {};
    cp_async_wait<0>();
    __syncthreads();  // K has arrived, and no warp still reads V
    load_rows<D, N, Tile::kThreads, Tile::RICH>(v, load_shared(&program->v), a.value_strides.row, start,
                                                load_shared(&program->head.keys), a.dim, aligned);
    cp_async_commit();
    const bool seen = is_seen<N>(load_shared(&program->own[warp]), start);
    if (seen) multiply_keys<Tile>(q, k, warp_row, s);
    cp_async_wait<0>();
    __syncthreads();  // V has arrived, and no warp still reads K
    if (start + N < keys.end)
      load_rows<D, N, Tile::kThreads, Tile::RICH>(k, load_shared(&program->k), a.key_strides.row, start + N,
                                                  load_shared(&program->head.keys), a.dim, aligned);
    cp_async_commit();
    if (!seen) continue;

    const int32_t mine = load_shared(&program->first) + int32_t(warp_row);
    if (Tile::RICH && a.threshold && start / 128 != kept_group) {
      kept_group = start / 128;
      const Dropout dropout = dropout_of(a, load_shared(&program->head));
#pragma unroll
      for (int m = 0; m < M; ++m) kept[m] = kept_of(dropout, mine + 16 * m, start);
    }
    if constexpr (Tile::RICH) {
      const Head h = load_shared(&program->head);
#pragma unroll
      for (int m = 0; m < M; ++m) finish_scores<false>(a, h, mine + 16 * m, start, s[m]);
    }
    if (!is_inner<N>(load_shared(&program->own[warp]), start)) {
      const Head h = load_shared(&program->head);
#pragma unroll
      for (int m = 0; m < M; ++m) mask_edges<false>(a, h, mine + 16 * m, start, s[m]);
    }
    uint32_t p[M][N / 4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float highest = peak[m][r];
#pragma unroll
        for (int n = 0; n < N / 8; ++n) highest = fmaxf(highest, fmaxf(s[m][4 * n + 2 * r], s[m][4 * n + 2 * r + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        // A row that has seen no key yet: 2 ^ (-inf - 0) is 0, 2 ^ (-inf + inf) would be NaN.
        const float shift = highest == -kInfinity ? 0.f : highest * to_log2;
        const float decay = exp2_approx(peak[m][r] * to_log2 - shift);
        peak[m][r] = highest;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          o[m][4 * n + 2 * r] *= decay;
          o[m][4 * n + 2 * r + 1] *= decay;
        }
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          const int e = 4 * n + 2 * r;
          float left = exp2_approx(s[m][e] * to_log2 - shift), right = exp2_approx(s[m][e + 1] * to_log2 - shift);
          sum += left + right;
          if (Tile::RICH && a.threshold) {
            left = keeps(kept[m], start, e) ? left : 0.f;
            right = keeps(kept[m], start, e + 1) ? right : 0.f;
          }
          p[m][2 * n + r] = pair_of<T>(left, right);
        }
        total[m][r] = total[m][r] * decay + sum;
      }
    }
    multiply_values<Tile>(p, v, o);
  }
  cp_async_wait<0>();
  __syncthreads();  // Q has arrived, even without keys; from here each warp stages its output in its own rows of Q

  const Head end = load_shared(&program->head);
  const int32_t mine = load_shared(&program->first) + int32_t(warp_row);
  float* const lse = a.lse ? a.lse + (end.b * a.lse_batch + end.h * a.lse_head + end.first_q) : nullptr;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = total[m][r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const bool dead = sum == 0.f;  // a sum of NaN is not dead
      const float factor = dead ? 0.f : (Tile::RICH ? a.keep_scale : 1.f) / sum;
      const uint32_t row = 16 * m + lane / 4 + 8 * r;
      const int32_t i = mine + int32_t(row);
      if (lse && lane % 4 == 0 && i < end.queries)
        store(lse + i, dead ? -kInfinity : (peak[m][r] * to_log2 + log2f(sum)) * kLn2);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        store_shared(reinterpret_cast<uint32_t*>(q + swizzled<D>(warp_row + row, n) + lane % 4 * 2),
                     pair_of<T>(o[m][4 * n + 2 * r] * factor, o[m][4 * n + 2 * r + 1] * factor));
    }
  __syncwarp();
  T* const out = head_rows(static_cast<T*>(a.out), a.out_strides, end.b, end.h, end.first_q);
#pragma unroll 4
  for (uint32_t at = lane; at < 16 * M * (D / 8); at += 32) {
    const uint32_t row = at / (D / 8), chunk = at % (D / 8);
    if (mine + row >= uint32_t(end.queries) || chunk * 8 >= uint32_t(a.dim)) continue;
    const Vec<T, 8> values = load_shared_vec<8>(q + swizzled<D>(warp_row + row, chunk));
    T* const to = out + ((mine + row) * a.out_strides.row + chunk * 8);
    if (!Tile::RICH || aligned) {
      store_vec(to, values);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (chunk * 8 + c < uint32_t(a.dim)) store(to + c, values.v[c]);
    }
  }
}

}  // namespace tf::cuda
