// Attention, backward, for sm_90a: TMA and wgmma (Shah et al., 2024, FlashAttention-3, section 3 and appendix B).
//
//     P = exp(scale q k - lse)    dP = dO V^T    delta = rowsum(dO * O) - dlse    dS = P * (dP - delta)
//     dV = P^T dO                 dK = scale * dS^T Q                             dQ = scale * dS K
//
// A block keeps one tile of 128 keys and values and walks over the queries that see it, of every head that shares the
// key head. dK and dV stay in registers and have one order of summation. Scores are computed transposed, (keys,
// queries), so that P^T and dS^T in registers are the left operands of dV and dK. Only dS passes through shared memory:
// for dQ a warpgroup needs the keys of both warpgroups.
//
// dQ is summed over the key blocks in float32 in global memory, by bulk reductions from shared memory. Its tiles there
// keep the layout of the accumulators; the last kernel reorders them. Deterministic: for each part of dQ the key blocks
// take turns, in ascending order.
#pragma once
#include "attention_backward_wgmma_tiles.cuh"

namespace tf::cuda {

// ---- the work of a block --------------------------------------------------------------------------------------------
struct BackwardWork {
  Head head;  // the first query head of the group
  int32_t first_key, stored, group;
  Range queries;
  int32_t tiles;       // summed over the heads of the group
  int32_t first_tile;  // in scratch memory: of query 0 of the first head
};

template <int M, int N>
TF_DEVICE BackwardWork backward_work(const BackwardWgmma& a, int32_t index) {
  // The key blocks of a few heads run one after the other, so that L2 holds their queries. The first keys come first:
  // in causal attention most queries see them.
  const int32_t key_heads = a.batch * a.key_heads;
  const int32_t span = a.heads_together * a.key_blocks, first_head = index / span * a.heads_together;
  const int32_t heads = min(a.heads_together, key_heads - first_head);
  const int32_t bh = first_head + index % span % heads;
  BackwardWork w;
  w.group = a.heads / a.key_heads;
  w.head = head_of(a, bh / a.key_heads, bh % a.key_heads * w.group);
  w.stored = a.cu_seqlens_k ? w.head.keys : a.max_seqlen_k;
  w.first_key = index % span / heads * N;
  w.queries = query_range<M>(a, w.head, w.first_key, w.first_key + N - 1);
  const bool none = w.first_key >= w.head.keys || w.queries.end <= w.queries.begin;
  w.first_tile = int32_t(w.head.h * a.head_tiles + first_tile<M>(a, w.head));
  w.tiles = none ? 0 : (w.queries.end - w.queries.begin + M - 1) / M * w.group;
  return w;
}

// Walks over the tiles of every head of the group. stage, parity: of the ring of buffers.
template <int M, int STAGES>
struct Walk {
  int32_t head = 0, row, stage = 0, parity = 0;
  TF_DEVICE explicit Walk(const BackwardWork& w) : row(w.queries.begin) {}
  TF_DEVICE void next(const BackwardWork& w) {
    row += M;
    if (row >= w.queries.end) {
      row = w.queries.begin;
      head++;
    }
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int M, int STAGES>
TF_DEVICE int32_t tile_at(const BackwardWgmma& a, const BackwardWork& w, const Walk<M, STAGES>& at) {
  return w.first_tile + at.head * int32_t(a.head_tiles) + at.row / M;
}

template <class Tile>
struct BackwardShared {
  unsigned char* base;
  TF_DEVICE uint64_t* barrier(int i) const { return reinterpret_cast<uint64_t*>(base + Tile::kBarriers) + i; }
  TF_DEVICE int32_t* index() const { return reinterpret_cast<int32_t*>(base + Tile::kIndex); }
  TF_DEVICE uint64_t* keys_full() const { return barrier(0); }
  TF_DEVICE uint64_t* query_full(int stage) const { return barrier(1 + stage); }
  TF_DEVICE uint64_t* query_empty(int stage) const { return barrier(1 + Tile::kStages + stage); }
  TF_DEVICE uint64_t* grad_full(int stage) const { return barrier(1 + 2 * Tile::kStages + stage); }
  TF_DEVICE uint64_t* grad_empty(int stage) const { return barrier(1 + 3 * Tile::kStages + stage); }
};

// ---- producer: one thread -------------------------------------------------------------------------------------------
template <int D>
TF_DEVICE void load_tile(unsigned char* shared, const TensorMap* map, uint64_t* full, int rows, int32_t row,
                         int32_t head, int32_t batch) {
#pragma unroll
  for (int panel = 0; panel < D / 64; panel++) {
    tma_load(shared + panel * rows * 128, map, full, panel * 64, row, head, batch);
  }
}

template <int D, int M, class Tile>
TF_DEVICE void produce(const BackwardWgmma& a, const BackwardWork& w, const BackwardShared<Tile>& shared,
                       const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map,
                       const TensorMap* grad_map) {
  constexpr int N = Tile::kKeys;
  const int32_t batch = a.cu_seqlens_q ? 0 : w.head.b, key = w.head.first_k + w.first_key;
  mbarrier_expect_tx(shared.keys_full(), 2 * Tile::kKeyBytes);
  load_tile<D>(shared.base + Tile::kK, k_map, shared.keys_full(), N, key, w.head.key_head, batch);
  load_tile<D>(shared.base + Tile::kV, v_map, shared.keys_full(), N, key, w.head.key_head, batch);
  Walk<M, Tile::kStages> at(w);
  for (int32_t i = 0; i < w.tiles; i++, at.next(w)) {
    const int32_t h = w.head.h + at.head, row = w.head.first_q + at.row;
    const float* statistics = a.statistics + int64_t(tile_at<M>(a, w, at)) * (2 * M);
    if (i >= Tile::kStages) mbarrier_wait(shared.query_empty(at.stage), at.parity ^ 1);
    mbarrier_expect_tx(shared.query_full(at.stage), Tile::kQueryBytes + M * 4);
    load_tile<D>(shared.base + Tile::kQ + at.stage * Tile::kQueryBytes, q_map, shared.query_full(at.stage), M, row, h,
                 batch);
    bulk_load(shared.base + Tile::kPeak + at.stage * M * 4, statistics, M * 4, shared.query_full(at.stage));
    if (i >= Tile::kStages) mbarrier_wait(shared.grad_empty(at.stage), at.parity ^ 1);
    mbarrier_expect_tx(shared.grad_full(at.stage), Tile::kQueryBytes + M * 4);
    load_tile<D>(shared.base + Tile::kGrad + at.stage * Tile::kQueryBytes, grad_map, shared.grad_full(at.stage), M, row,
                 h, batch);
    bulk_load(shared.base + Tile::kDelta + at.stage * M * 4, statistics + M, M * 4, shared.grad_full(at.stage));
  }
}

// ---- consumers: two warpgroups of 64 keys each ----------------------------------------------------------------------
constexpr int kConsumers = 256, kConsumerBarrier = 1;
constexpr uint32_t kNoTurn = ~0u;

// Descriptors of tiles of panels. rows_: rows are the M or N axis of the product, columns its K axis. columns_ is the
// transpose: a panel spans 64 of the M or N axis, and panels are `leading` bytes apart. Eight rows are 1024 bytes.
TF_DEVICE uint64_t rows_descriptor(const unsigned char* tile) {
  return wgmma_descriptor(tile, 16, 1024, Swizzle::b128);
}
TF_DEVICE uint64_t columns_descriptor(const unsigned char* tile, int leading) {
  return wgmma_descriptor(tile, leading, 1024, Swizzle::b128);
}
// Offset of step k (16 values of the K axis) from step 0, in a descriptor's units of 16 bytes.
TF_DEVICE constexpr uint64_t row_step(int k, int rows) { return (k / 4 * rows * 128 + k % 4 * 32) / 16; }
TF_DEVICE constexpr uint64_t column_step(int k) { return k * 16 * 128 / 16; }

// All consumers set a tile's rows from `first` on to zero: past the end of a sequence there may be inf or NaN, and zero
// times those is NaN.
template <int D, int RowStrides>
TF_DEVICE void clear_rows(unsigned char* tile, int first, int thread) {
  const int count = (RowStrides - first) * (D / 8);
  for (int i = thread; i < count; i += kConsumers) {  // whole rows of panels: the swizzle does not matter
    const int row = first + i / (D / 8), chunk = i % (D / 8);
    store_shared_vec(reinterpret_cast<uint32_t*>(tile + chunk / 8 * (RowStrides * 128) + row * 128 + chunk % 8 * 16),
                     Vec<uint32_t, 4>{});
  }
}

// All consumers write keys - center, rounded. Chunk c of row r is at c ^ (r % 8): the 128-byte swizzle.
template <class T, int D, int N>
TF_DEVICE void center_keys(const unsigned char* keys, unsigned char* to, const float* center, int thread) {
#pragma unroll
  for (int i = thread; i < N * (D / 8); i += kConsumers) {
    const int row = i / 8 % N, chunk = (i % 8) ^ (row % 8), at = i * 16;
    Vec<T, 8> x = load_shared_vec<8>(reinterpret_cast<const T*>(keys + at));
    const Vec<float, 8> c = load_center(center + i / 8 / N * 64 + chunk * 8);
#pragma unroll
    for (int e = 0; e < 8; e++) x.v[e] = from_float<T>(to_float(x.v[e]) - c.v[e]);
    store_shared_vec(reinterpret_cast<T*>(to + at), x);
  }
}

// Stores a warp's 16 rows of dK or dV as whole rows, through its own shared memory; zeros from row `keys` on.
template <class T, int D>
TF_DEVICE void store_rows(const float (&sum)[D / 2], float scale, unsigned char* shared, T* rows, int64_t stride,
                          int32_t first, int32_t keys, int32_t stored) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned char* row = shared + (lane / 4 + 8 * half) * (D * 2);
      store_shared(reinterpret_cast<uint32_t*>(row + (j ^ (lane / 4)) * 16 + lane % 4 * 4),
                   pair_of<T>(sum[j * 4 + half * 2] * scale, sum[j * 4 + half * 2 + 1] * scale));
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    const int row = (i * 32 + lane) / (D / 8), chunk = (i * 32 + lane) % (D / 8);
    const unsigned char* from = shared + row * (D * 2) + (chunk ^ (row % 8)) * 16;
    Vec<T, 8> x = load_shared_vec<8>(reinterpret_cast<const T*>(from));
    if (first + row >= keys) x = Vec<T, 8>{};
    if (first + row < stored) store_vec(rows + (first + row) * stride + chunk * 8, x);
  }
  __syncwarp();
}

// Deterministic: lets the next key block add to part `owed` of dQ, once this thread's last sums have arrived there.
TF_DEVICE void pass_turn(const BackwardWgmma& a, uint32_t& owed, int32_t place) {
  if (owed == kNoTurn) return;
  bulk_wait<0>();
  store_release(a.turns + owed, place + 1);
  owed = kNoTurn;
}

template <class T, int D, int M, class Tile>
TF_DEVICE void consume(const BackwardWgmma& a, const BackwardWork& w, const BackwardShared<Tile>& shared) {
  constexpr int N = Tile::kKeys;
  const int thread = threadIdx.x - 128, lane = thread % 32, warp = thread / 32 % 4;
  // Shuffled from lane 0, so that the compiler knows it to be uniform in the warp.
  const int group = __shfl_sync(0xffffffffu, thread / 128, 0);
  const int part = group * 4 + warp;
  unsigned char* base = shared.base;
  float* sum = reinterpret_cast<float*>(base + Tile::kSum) + part * Tile::kPart;

  float dk[D / 2], dv[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0.f;

  const bool ragged_keys = w.first_key + N > w.head.keys;
  if (w.tiles > 0) {
    mbarrier_wait(shared.keys_full(), 0);
    if (ragged_keys) {
      clear_rows<D, N>(base + Tile::kK, w.head.keys - w.first_key, thread);
      clear_rows<D, N>(base + Tile::kV, w.head.keys - w.first_key, thread);
      named_barrier_sync(kConsumerBarrier, kConsumers);
    }
    center_keys<T, D, N>(base + Tile::kK, base + Tile::kCentered, center_of(a, a.center, w.head), thread);
    fence_async_shared();
    named_barrier_sync(kConsumerBarrier, kConsumers);
  }

  // Values as left operands: those that fit the registers are read once, not once per tile of queries.
  uint32_t v[Tile::kValueSteps ? Tile::kValueSteps : 1][4];
  {
    const int row = group * 64 + warp * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < Tile::kValueSteps; k++) {
      const int chunk = (k % 4 * 2 + lane / 16) ^ (row % 8);
      ldmatrix_x4(v[k], base + Tile::kV + k / 4 * N * 128 + row * 128 + chunk * 16);
    }
  }

  // This thread has keys key and key + 8. Query i sees those with low <= i <= high.
  const int32_t key = w.first_key + group * 64 + warp * 16 + lane / 4;
  const uint64_t k_rows = rows_descriptor(base + Tile::kK + group * 64 * 128);
  const uint64_t v_rows = rows_descriptor(base + Tile::kV + group * 64 * 128);
  // dQ^T = K^T dS^T: with D 64 a warpgroup takes half of the queries, with D 128 half of the head dim.
  const uint64_t k_columns = columns_descriptor(base + Tile::kCentered + (D == 64 ? 0 : group * N * 128), 16);

  uint32_t owed = kNoTurn;          // the part of dQ whose turn passes on once the last sums have arrived
  int32_t place = w.first_key / N;  // this block's rank among those that add to dQ

  Walk<M, Tile::kStages> at(w);
  for (int32_t i = 0; i < w.tiles; i++, at.next(w)) {
    unsigned char* q_tile = base + Tile::kQ + at.stage * Tile::kQueryBytes;
    unsigned char* grad_tile = base + Tile::kGrad + at.stage * Tile::kQueryBytes;
    const uint64_t q_rows = rows_descriptor(q_tile), grad_rows = rows_descriptor(grad_tile);

    // S^T = K Q^T, dP^T = V dO^T.
    float s[M / 2], dp[M / 2];
    mbarrier_wait(shared.query_full(at.stage), at.parity);
    if (a.cu_seqlens_q && at.row + M > w.head.queries) {  // the tile ends in rows of the next sequence
      mbarrier_wait(shared.grad_full(at.stage), at.parity);
      clear_rows<D, M>(q_tile, w.head.queries - at.row, thread);
      clear_rows<D, M>(grad_tile, w.head.queries - at.row, thread);
      fence_async_shared();
      named_barrier_sync(kConsumerBarrier, kConsumers);
    }
    register_fence(s);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      wgmma_ss<T, M, false, false>(s, k_rows + row_step(k, N), q_rows + row_step(k, M), k > 0);
    }
    warpgroup_commit();
    mbarrier_wait(shared.grad_full(at.stage), at.parity);
    register_fence(dp);
    if (Tile::kValueSteps) register_fence(v);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      if (k < Tile::kValueSteps) {
        wgmma_rs<T, M, false>(dp, v[k], grad_rows + row_step(k, M), k > 0);
      } else {
        wgmma_ss<T, M, false, false>(dp, v_rows + row_step(k, N), grad_rows + row_step(k, M), k > 0);
      }
    }
    warpgroup_commit();
    pass_turn(a, owed, place);

    warpgroup_wait<1>();
    register_fence(s);
    if (ragged_keys || (Tile::kWindows && (at.row < w.queries.inner_begin || at.row + M > w.queries.inner_end))) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int32_t mine = key + 8 * half, position = mine - w.head.offset - at.row - lane % 4 * 2;
        const bool any_before = !Tile::kWindows || a.window_right < 0, any_after = !Tile::kWindows || a.window_left < 0;
        const int32_t low = mine >= w.head.keys ? M : any_before ? 0 : position - a.window_right;
        const int32_t high = any_after ? M : position + a.window_left;
#pragma unroll
        for (int j = 0; j < M / 8; j++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            if (j * 8 + e < low || j * 8 + e > high) s[j * 4 + half * 2 + e] = -kInfinity;
          }
        }
      }
    }
    const float* peak = reinterpret_cast<const float*>(base + Tile::kPeak) + at.stage * M + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < M / 8; j++) {
      if (D == 128 && j % 4 == 0) __syncwarp();  // keeps ptxas from loading all first: no registers are left
      const Vec<float, 2> x = load_shared_vec<2>(peak + j * 8);
#pragma unroll
      for (int e = 0; e < 4; e++) s[j * 4 + e] = exp2_approx(s[j * 4 + e] * a.exponent_scale - x.v[e % 2]);
    }

    // P^T and dS^T as left operands: [k] holds queries 16 k .. 16 k + 15. dV, which needs the exponentials, is issued
    // before the wait for dP: otherwise ptxas, which takes that wait to be free, would move it before the exponentials,
    // and they would not overlap with dP.
    uint32_t p[M / 16][4], ds[M / 16][4];
#pragma unroll
    for (int j = 0; j < M / 8; j++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int e = j * 4 + half * 2;
        p[j / 2][j % 2 * 2 + half] = pair_of<T>(s[e], s[e + 1]);
      }
    }
    register_fence(p);
    register_fence(dv);
    warpgroup_fence();
    const uint64_t grad_columns = columns_descriptor(grad_tile, M * 128);
#pragma unroll
    for (int k = 0; k < M / 16; k++) wgmma_rs<T, D, true>(dv, p[k], grad_columns + column_step(k), true);
    warpgroup_commit();

    warpgroup_wait<1>();
    register_fence(dp);
    const float* delta = reinterpret_cast<const float*>(base + Tile::kDelta) + at.stage * M + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < M / 8; j++) {
      const Vec<float, 2> x = load_shared_vec<2>(delta + j * 8);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int e = j * 4 + half * 2;
        const float2 rounded = floats_of_pair<T>(p[j / 2][j % 2 * 2 + half]);
        ds[j / 2][j % 2 * 2 + half] =
            pair_of<T>(rounded.x * (dp[e] - x.v[0]), rounded.y * (dp[e + 1] - x.v[1]));
      }
    }
    // dS is stored transposed, (queries, keys); the keys of a warpgroup are one panel. Of the two buffers, both
    // warpgroups have finished with the older one after the barrier below.
    unsigned char* score = base + Tile::kScore + (i & 1) * Tile::kScoreBytes;
    unsigned char* score_row = score + group * (M * 128) + (lane / 16 * 8 + lane % 8) * 128 +
                               ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int k = 0; k < M / 16; k++) stmatrix_x4_trans(score_row + k * (16 * 128), ds[k]);

    register_fence(ds);
    fence_async_shared();
    named_barrier_sync(kConsumerBarrier, kConsumers);
    float dq[Tile::kSumQueries / 2];
    register_fence(dq);
    warpgroup_fence();
    const uint64_t score_rows = rows_descriptor(score + (D == 64 ? group * Tile::kSumQueries * 128 : 0));
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
      wgmma_ss<T, Tile::kSumQueries, true, false>(dq, k_columns + column_step(k), score_rows + row_step(k, M), k > 0);
    }
    warpgroup_commit();
    register_fence(dk);
    warpgroup_fence();
    const uint64_t q_columns = columns_descriptor(q_tile, M * 128);
#pragma unroll
    for (int k = 0; k < M / 16; k++) wgmma_rs<T, D, true>(dk, ds[k], q_columns + column_step(k), true);
    warpgroup_commit();

    warpgroup_wait<2>();
    register_fence(dv);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.grad_empty(at.stage));

    warpgroup_wait<1>();
    register_fence(dq);
    if (lane == 0) bulk_wait_read<0>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Tile::kSumQueries / 8; j++) {
      const Vec<float, 4> x{dq[j * 4], dq[j * 4 + 1], dq[j * 4 + 2], dq[j * 4 + 3]};
      store_shared_vec(sum + (j * 32 + lane) * 4, x);
    }
    fence_async_shared();
    __syncwarp();
    if (lane == 0) {
      const uint32_t to = uint32_t(tile_at<M>(a, w, at)) * Tile::kParts + part;
      if (a.deterministic) {
        owed = to;
        if (Tile::kWindows) place = (w.first_key - key_range<N>(a, w.head, at.row, at.row + M - 1).begin) / N;
        while (load_acquire(a.turns + to) != place) {
        }
      }
      bulk_reduce_add(a.sums + int64_t(to) * Tile::kPart, sum, Tile::kPart * 4);
      bulk_commit();
    }

    warpgroup_wait<0>();
    register_fence(dk);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.query_empty(at.stage));
  }

  pass_turn(a, owed, place);
  if (lane == 0) bulk_wait_read<0>();
  __syncwarp();
  // Computed again: kept through the loop, it would cost registers.
  const BackwardWork done = backward_work<M, N>(a, load_shared(shared.index()));
  const Head& head = done.head;
  const int32_t first = done.first_key + group * 64 + warp * 16;
  unsigned char* own = reinterpret_cast<unsigned char*>(sum);
  T* dk_rows = head_rows(static_cast<T*>(a.dk), a.dk_strides, head.b, head.key_head, head.first_k);
  T* dv_rows = head_rows(static_cast<T*>(a.dv), a.dv_strides, head.b, head.key_head, head.first_k);
  store_rows<T, D>(dv, 1.f, own, dv_rows, a.dv_strides.row, first, head.keys, done.stored);
  store_rows<T, D>(dk, a.scale, own, dk_rows, a.dk_strides.row, first, head.keys, done.stored);
}

template <class T, int D, int M>
__global__ void __launch_bounds__(BackwardWgmmaTile<D, M>::kThreads, 1)
    attention_backward_wgmma_kernel(const BackwardWgmma a, TF_GRID_CONSTANT TensorMap q_map,
                                    TF_GRID_CONSTANT TensorMap k_map, TF_GRID_CONSTANT TensorMap v_map,
                                    TF_GRID_CONSTANT TensorMap grad_map) {
#if TF_SM90A
  using Tile = BackwardWgmmaTile<D, M>;
  TF_SHARED(base);
  const BackwardShared<Tile> shared{base};
  if (threadIdx.x == 0) {
    mbarrier_init(shared.keys_full(), 1);
    for (int stage = 0; stage < Tile::kStages; stage++) {
      mbarrier_init(shared.query_full(stage), 1);
      mbarrier_init(shared.grad_full(stage), 1);
      mbarrier_init(shared.query_empty(stage), kConsumers / 32);
      mbarrier_init(shared.grad_empty(stage), kConsumers / 32);
    }
    mbarrier_fence_init();
    store_shared(shared.index(), a.deterministic ? atomicAdd(a.ticket, 1) : int32_t(blockIdx.x));
  }
  __syncthreads();
  const BackwardWork w = backward_work<M, Tile::kKeys>(a, load_shared(shared.index()));
  if (w.first_key >= w.stored) return;
  if (threadIdx.x < 128) {
    registers_decrease<24>();
    if (threadIdx.x == 0 && w.tiles > 0) produce<D, M>(a, w, shared, &q_map, &k_map, &v_map, &grad_map);
  } else {
    registers_increase<240>();
    consume<T, D, M>(a, w, shared);
  }
#endif
}

}  // namespace tf::cuda
