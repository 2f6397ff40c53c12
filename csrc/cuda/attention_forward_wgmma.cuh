// Attention, forward, for Hopper (sm_90a): FlashAttention-3's schedule (Shah et al., 2024), with wgmma and TMA.
//
//   out = softmax(scale * Q K^T) V      lse = log sum exp(scale * Q K^T)
//
// Blocks are persistent: each goes through tiles of queries. One warpgroup loads: it keeps a ring of key and value
// tiles filled. The others compute 64 rows each. A group issues Q K^T of the next keys before P V of the last ones. It
// computes the softmax while the tensor cores work on P V and on the other group's products. P never leaves the
// registers.
#pragma once
#include "attention_forward_wgmma_tiles.cuh"

namespace tf::cuda {

// Sizes of a kernel. WINDOWED: causal or a sliding window; else every query sees every key. LAZY: O is rescaled only
// when a row's peak has risen much. TURNS: named barriers pass the tensor cores from group to group; else the groups'
// order is the hardware's.
template <class T_, int D_, int BM_, int BN_, bool WINDOWED_, bool LAZY_, bool TURNS_>
struct ForwardWgmmaShape {
  using T = T_;
  static constexpr int D = D_, BM = BM_, BN = BN_;
  static constexpr bool WINDOWED = WINDOWED_, LAZY = LAZY_, TURNS = TURNS_;
  static constexpr int CONSUMERS = BM / 64, WARPS = 4 * CONSUMERS, THREADS = 128 * (1 + CONSUMERS);
  static constexpr int STAGES = 2;
  // Registers per thread, once the loader has given up most of its own: at most 64 Ki per block, in steps of 8.
  static constexpr int LOADER_REGISTERS = CONSUMERS == 2 ? 40 : 32, REGISTERS = CONSUMERS == 2 ? 232 : 160;
  static_assert(128 * (LOADER_REGISTERS + CONSUMERS * REGISTERS) <= 65536);
  // A tile is D / 64 panels of rows of 128 bytes (64 columns), the span of a 128-byte swizzle. The swizzle repeats
  // every 8 rows, 1024 bytes, and depends on address bits: tiles must begin at multiples of 1024.
  static constexpr int ROW_BYTES = 128, PANELS = D / 64;
  static constexpr int Q_PANEL = BM * ROW_BYTES, KV_PANEL = BN * ROW_BYTES;
  static constexpr int Q_BYTES = PANELS * Q_PANEL, KV_BYTES = PANELS * KV_PANEL;
  static_assert(Q_PANEL % 1024 == 0 && KV_PANEL % 1024 == 0);
  static constexpr int K_AT = Q_BYTES, V_AT = K_AT + STAGES * KV_BYTES, BARRIERS_AT = V_AT + STAGES * KV_BYTES;
};

// The full barriers count bytes that have arrived (tile_full counts the thread that writes the tile), the empty ones
// warps that have read.
template <class S>
struct ForwardWgmmaBarriers {
  uint64_t q_full, q_empty, v_loaded;
  uint64_t k_full[S::STAGES], k_empty[S::STAGES], v_full[S::STAGES], v_empty[S::STAGES];
  uint64_t tile_full[S::STAGES], tile_empty[S::STAGES];
  ForwardWgmmaTile tile[S::STAGES];
};

template <class S>
constexpr int forward_wgmma_shared_bytes() {
  constexpr int bytes = S::BARRIERS_AT + sizeof(ForwardWgmmaBarriers<S>);
  static_assert(bytes <= 227 * 1024);
  return bytes;
}

// The slot of a ring, and the parity of its barriers' phase, at step `step`.
template <int STAGES>
struct ForwardWgmmaSlot {
  uint32_t stage, parity;
  TF_DEVICE explicit ForwardWgmmaSlot(uint32_t step) : stage(step % STAGES), parity(step / STAGES & 1) {}
};

template <class S>
TF_DEVICE void forward_wgmma_load_tile(unsigned char* shared, const TensorMap* map, uint64_t* full, int panel_bytes,
                                       int32_t row, int32_t head, int32_t batch) {
  mbarrier_expect_tx(full, S::PANELS * panel_bytes);  // before the loads, so that the phase ends after all of them
#pragma unroll
  for (int panel = 0; panel < S::PANELS; ++panel)
    tma_load(shared + panel * panel_bytes, map, full, panel * 64, row, head, batch);
}

// Sets the rows of V past the keys, which may hold the next sequence, to zero: P is 0 there, but 0 * NaN is NaN.
template <class S>
TF_DEVICE void forward_wgmma_clear_tail(unsigned char* v, int32_t rows) {
  const int chunks = (S::BN - rows) * (S::ROW_BYTES / 16);
  for (int panel = 0; panel < S::PANELS; ++panel) {
    uint32_t* tail = reinterpret_cast<uint32_t*>(v + panel * S::KV_PANEL + rows * S::ROW_BYTES);
    for (int i = threadIdx.x % 32; i < chunks; i += 32) store_shared_vec(tail + 4 * i, Vec<uint32_t, 4>{});
  }
  fence_async_shared();  // wgmma reads these stores and TMA overwrites them, both through the async proxy
  __syncwarp();
}

// Run by one warp. Lane 0 posts the tiles, loads Q for each, and fills the rings of K and V from the last block of keys
// to the first; all lanes clear tails.
template <class S>
TF_DEVICE void forward_wgmma_produce(const ForwardWgmma& a, const TensorMap* q_map, const TensorMap* k_map,
                                     const TensorMap* v_map, unsigned char* shared,
                                     ForwardWgmmaBarriers<S>* barriers) {
  using Slot = ForwardWgmmaSlot<S::STAGES>;
  uint32_t step = 0, turn = 0, tiles = 0, tails = 0;
  const bool leader = threadIdx.x == 0;
  ForwardWgmmaSearch search{0, 0};
  int32_t index = blockIdx.x;
  for (;; index = forward_wgmma_next(a, index)) {
    ForwardWgmmaTile t{};
    t.last = !forward_wgmma_tile<S>(a, index, search, t);
    if (leader) {
      const Slot slot(tiles);
      mbarrier_wait(&barriers->tile_empty[slot.stage], slot.parity ^ 1);  // passes at once in a ring's first round
      post_tile(&barriers->tile[slot.stage], t);
      mbarrier_arrive(&barriers->tile_full[slot.stage]);
    }
    ++tiles;
    if (t.last) {
      if (leader) forward_wgmma_done(a);
      return;
    }
    if (t.begin >= t.end) continue;
    const int32_t batch = a.cu_seqlens_q != nullptr ? 0 : t.b, key_head = t.h / a.groups;
    auto load_keys = [&](int32_t row, uint32_t at) {
      const Slot slot(at);
      mbarrier_wait(&barriers->k_empty[slot.stage], slot.parity ^ 1);
      forward_wgmma_load_tile<S>(shared + S::K_AT + slot.stage * S::KV_BYTES, k_map, &barriers->k_full[slot.stage],
                                 S::KV_PANEL, row, key_head, batch);
    };
    int32_t row = t.first_k + (t.end - 1) * S::BN;
    if (leader) {
      load_keys(row, step);
      mbarrier_wait(&barriers->q_empty, (turn & 1) ^ 1);
      forward_wgmma_load_tile<S>(shared, q_map, &barriers->q_full, S::Q_PANEL, t.first_q + t.first_row, t.h, batch);
    }
    ++turn;
    // TMA fills in zeros past the end of the tensor, but not past the end of a sequence within it.
    int32_t tail = t.keys - (t.end - 1) * S::BN;  // rows of the last block that belong to the sequence
    if (a.cu_seqlens_k == nullptr && a.key_lengths == nullptr) tail = S::BN;
#pragma unroll 1
    for (int32_t left = t.end - t.begin; left > 0; --left, ++step, row -= S::BN) {
      const Slot slot(step);
      unsigned char* values = shared + S::V_AT + slot.stage * S::KV_BYTES;
      if (leader) {
        if (left > 1) load_keys(row - S::BN, step + 1);
        mbarrier_wait(&barriers->v_empty[slot.stage], slot.parity ^ 1);
        forward_wgmma_load_tile<S>(values, v_map, tail < S::BN ? &barriers->v_loaded : &barriers->v_full[slot.stage],
                                   S::KV_PANEL, row, key_head, batch);
      }
      if (tail < S::BN) {
        __syncwarp();
        mbarrier_wait(&barriers->v_loaded, tails++ & 1);
        forward_wgmma_clear_tail<S>(values, tail);
        if (leader) mbarrier_arrive(&barriers->v_full[slot.stage]);
        tail = S::BN;
      }
    }
  }
}

// Issues S = Q K^T. Both operands are K-major: a step of 16 columns is 32 bytes within the swizzled row.
template <class S>
TF_DEVICE void forward_wgmma_scores(float (&s)[S::BN / 2], uint64_t q, uint64_t k) {
  warpgroup_fence();
#pragma unroll
  for (int d = 0; d < S::D / 16; ++d) {
    const int inside = d % 4 * 32;
    wgmma_ss<typename S::T, S::BN>(s, q + ((d / 4 * S::Q_PANEL + inside) >> 4),
                                   k + ((d / 4 * S::KV_PANEL + inside) >> 4), d > 0);
  }
  warpgroup_commit();
}

// Issues O += P V. V is read transposed (its columns are contiguous), 16 rows per step.
template <class S>
TF_DEVICE void forward_wgmma_output(float (&o)[S::D / 2], const uint32_t (&p)[S::BN / 16][4], uint64_t v) {
  warpgroup_fence();  // also orders the writes of P and O in registers before the reads of wgmma
#pragma unroll
  for (int n = 0; n < S::BN / 16; ++n)
    wgmma_rs<typename S::T, S::D, true>(o, p[n], v + (n * 16 * S::ROW_BYTES >> 4), true);
  warpgroup_commit();
}

// State of a thread's two rows, lane / 4 and lane / 4 + 8. Accumulator element 4 j + i is in the first (i < 2) or the
// second row, at column 8 j + lane % 4 * 2 + i % 2.
struct ForwardWgmmaRows {
  float peak[2], total[2];  // what scores are lowered by, before the scale; this thread's part of sum exp(score - peak)
};

template <class S>
TF_DEVICE void forward_wgmma_mask(float (&s)[S::BN / 2], const ForwardWgmma& a, const ForwardWgmmaTile& t,
                                  int32_t row, int32_t column) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int32_t first = 0, last = t.keys - 1;
    if (S::WINDOWED) {
      const int32_t position = row + 8 * r + t.offset;
      first = position - a.left;
      last = min(last, position + a.right);
    }
    first -= column;
    last -= column;
#pragma unroll
    for (int j = 0; j < S::BN / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 8 * j + i;
        // A select, not an addition: past the keys there may be NaN.
        if (at > last || (S::WINDOWED && at < first)) s[4 * j + 2 * r + i] = -INFINITY;
      }
  }
}

// A row's peak is kept while the largest score exceeds it by at most this, in powers of two: P is then at most 2^8, and
// O need not be rescaled.
constexpr float kKeptPeak = 8.f;

// Scores to exp(score - peak), in place; decay: the factor for the sums so far, 1 where the peak was kept.
template <bool LAZY, int N>
TF_DEVICE void forward_wgmma_softmax(float (&s)[N], ForwardWgmmaRows& state, float (&decay)[2], float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float peak = state.peak[r];
#pragma unroll
    for (int j = 0; j < N / 4; ++j) peak = fmaxf(peak, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, 2));
    const bool kept = LAZY && (peak - state.peak[r]) * scale_log2 <= kKeptPeak;  // false without any key so far
    if (kept) peak = state.peak[r];
    // A row that sees no key: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
    const float shift = peak == -INFINITY ? 0.f : peak * scale_log2;
    decay[r] = kept ? 1.f : exp2_approx(fmaf(state.peak[r], scale_log2, -shift));
    state.peak[r] = peak;
    float total = 0.f;
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[4 * j + 2 * r + i];
        x = exp2_approx(fmaf(x, scale_log2, -shift));
        total += x;
      }
    state.total[r] = fmaf(state.total[r], decay[r], total);
  }
}

// The accumulator's layout is that of wgmma's A operand, with 16 columns per four registers: P needs no shuffle.
template <class S>
TF_DEVICE void forward_wgmma_pairs(uint32_t (&p)[S::BN / 16][4], const float (&s)[S::BN / 2]) {
#pragma unroll
  for (int n = 0; n < S::BN / 16; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) p[n][i] = pair_of<typename S::T>(s[8 * n + 2 * i], s[8 * n + 2 * i + 1]);
}

// Four lanes hold the columns of a row in turn, two each. After this transpose each lane has 8 contiguous columns.
TF_DEVICE void transpose_in_quad(uint32_t (&w)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if ((i & bit) == 0) {
        const bool upper = lane & bit;
        const uint32_t got = __shfl_xor_sync(0xffffffff, upper ? w[i] : w[i | bit], bit);
        if (upper)
          w[i] = got;
        else
          w[i | bit] = got;
      }
}

// Straight from registers to memory: each store of a warp writes 64 bytes of 8 rows. Rows past the sequence are not
// written: the next sequence begins there.
template <class S>
TF_DEVICE void forward_wgmma_store(const ForwardWgmma& a, const ForwardWgmmaTile& t, int32_t row,
                                   const float (&o)[S::D / 2], ForwardWgmmaRows& state) {
  const int quad_lane = threadIdx.x % 4;
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : t.b;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = state.total[r];
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    const bool dead = total == 0.f;  // a row with nothing to attend to; a total of NaN is not dead
    const float factor = dead ? 0.f : rcp_approx(total);
    const int32_t i = row + 8 * r;
    const bool alive = i < t.queries;
    using T = typename S::T;
    T* out = static_cast<T*>(a.out) + batch * a.out_strides.batch + t.h * a.out_strides.head +
             (static_cast<int64_t>(t.first_q) + i) * a.out_strides.row;
#pragma unroll
    for (int j = 0; j < S::D / 8; j += 4) {
      uint32_t w[4];
#pragma unroll
      for (int u = 0; u < 4; ++u)
        w[u] = pair_of<T>(o[4 * (j + u) + 2 * r] * factor, o[4 * (j + u) + 2 * r + 1] * factor);
      transpose_in_quad(w);
      if (alive)
        store_vec(reinterpret_cast<uint32_t*>(out + 8 * (j + quad_lane)), Vec<uint32_t, 4>{{w[0], w[1], w[2], w[3]}});
    }
    if (a.lse != nullptr && alive && quad_lane == 0) {
      constexpr float LN2 = 0.693147180559945309f;
      const float lse = dead ? -INFINITY : (state.peak[r] * a.scale_log2 + log2f(total)) * LN2;
      store(a.lse + batch * a.lse_batch + t.h * a.lse_head + t.first_q + i, lse);
    }
  }
}

template <class S>
TF_DEVICE void forward_wgmma_consume(const ForwardWgmma& a, unsigned char* shared,
                                     ForwardWgmmaBarriers<S>* barriers, int group) {
  using Slot = ForwardWgmmaSlot<S::STAGES>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const uint64_t q_descriptor = wgmma_descriptor(shared + group * 64 * S::ROW_BYTES, 0, 1024, Swizzle::b128);
  const uint64_t k_descriptor = wgmma_descriptor(shared + S::K_AT, 0, 1024, Swizzle::b128);
  // Transposed: strides from one panel of 64 columns to the next, and from 8 rows (the K axis) to the next 8.
  const uint64_t v_descriptor = wgmma_descriptor(shared + S::V_AT, S::KV_PANEL, 1024, Swizzle::b128);
  // One arrival per warp, once it has read its part of the product from shared memory.
  auto release = [&](uint64_t* empty) {
    if (lane == 0) mbarrier_arrive(empty);
  };
  const int mine = 1 + group, next = 1 + (group + 1) % S::CONSUMERS;
  if (S::TURNS && group == S::CONSUMERS - 1) named_barrier_arrive(next, 256);  // group 0 may begin

  uint32_t step = 0, turn = 0;
  for (uint32_t tiles = 0;; ++tiles) {
    const Slot tile_slot(tiles);
    mbarrier_wait(&barriers->tile_full[tile_slot.stage], tile_slot.parity);
    const ForwardWgmmaTile t = read_tile(&barriers->tile[tile_slot.stage]);
    release(&barriers->tile_empty[tile_slot.stage]);  // the shuffles in read_tile waited for every lane's read
    if (t.last) break;
    const int32_t row = t.first_row + 64 * group + 16 * warp + lane / 4;
    float o[S::D / 2];
#pragma unroll
    for (float& x : o) x = 0.f;
    ForwardWgmmaRows state{{-INFINITY, -INFINITY}, {0.f, 0.f}};
    if (t.begin < t.end) {
      // Blocks that every row sees in full need no mask.
      int32_t inner_begin = 0, inner_end = t.keys;
      if (S::WINDOWED) {
        inner_begin = max(min(t.first_row + S::BM, t.queries) - 1 + t.offset - a.left + S::BN - 1, 0) / S::BN;
        inner_end = max(min(inner_end, t.first_row + t.offset + a.right + 1), 0);
      }
      inner_end /= S::BN;
      auto mask = [&](float (&s)[S::BN / 2], int32_t n) {
        if (n >= inner_end || (S::WINDOWED && n < inner_begin))
          forward_wgmma_mask<S>(s, a, t, row, n * S::BN + lane % 4 * 2);
      };
      auto keys_at = [&](const Slot& slot) { return k_descriptor + slot.stage * (S::KV_BYTES >> 4); };
      auto values_at = [&](const Slot& slot) { return v_descriptor + slot.stage * (S::KV_BYTES >> 4); };

      float s[S::BN / 2], decay[2];
      uint32_t p[S::BN / 16][4];
      {
        const Slot slot(step);
        mbarrier_wait(&barriers->q_full, turn & 1);
        mbarrier_wait(&barriers->k_full[slot.stage], slot.parity);
        forward_wgmma_scores<S>(s, q_descriptor, keys_at(slot));
        warpgroup_wait<0>();
        register_fence(s);
        release(&barriers->k_empty[slot.stage]);
        mask(s, t.end - 1);
        forward_wgmma_softmax<S::LAZY>(s, state, decay, a.scale_log2);
      }
      // Once the last product is done, P's registers may be overwritten and O rescaled to the new peak.
      auto turn_over = [&](int32_t n) {
        warpgroup_wait<0>();
        register_fence(o);
        if (n < t.end - 2) release(&barriers->v_empty[Slot(step - 1).stage]);
        forward_wgmma_pairs<S>(p, s);
        if (S::LAZY && !__any_sync(0xffffffff, decay[0] != 1.f || decay[1] != 1.f)) return;
#pragma unroll
        for (int j = 0; j < S::D / 2; ++j) o[j] *= decay[j / 2 % 2];
      };
      // The softmax ends the loop's body, and the wait that it overlaps with starts the next: within one body ptxas,
      // which takes the wait to be free, would move it before the arithmetic.
      int32_t n = t.end - 2;
#pragma unroll 1
      for (; n >= t.begin; --n, ++step) {
        turn_over(n);
        const Slot key_slot(step + 1), value_slot(step);
        mbarrier_wait(&barriers->k_full[key_slot.stage], key_slot.parity);
        // ptxas puts most of P's conversions after this barrier, with or without register_fence(p). They cost little
        // there: they overlap with the two products of the other group, which it has issued when it arrives.
        if (S::TURNS) named_barrier_sync(mine, 256);
        forward_wgmma_scores<S>(s, q_descriptor, keys_at(key_slot));
        mbarrier_wait(&barriers->v_full[value_slot.stage], value_slot.parity);
        forward_wgmma_output<S>(o, p, values_at(value_slot));
        if (S::TURNS) named_barrier_arrive(next, 256);
        warpgroup_wait<1>();  // S is done; O += P V still runs
        register_fence(s);
        release(&barriers->k_empty[key_slot.stage]);
        if constexpr (S::WINDOWED) mask(s, n);
        forward_wgmma_softmax<S::LAZY>(s, state, decay, a.scale_log2);
        register_fence(s);
      }
      release(&barriers->q_empty);
      turn_over(n);
      const Slot slot(step);
      mbarrier_wait(&barriers->v_full[slot.stage], slot.parity);
      forward_wgmma_output<S>(o, p, values_at(slot));
      warpgroup_wait<0>();
      register_fence(o);
      release(&barriers->v_empty[slot.stage]);
      ++step;
      ++turn;
    }
    forward_wgmma_store<S>(a, t, row, o, state);
  }
  if (S::TURNS && group == 0) named_barrier_sync(mine, 256);  // matches the last group's last arrival
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    attention_forward_wgmma_kernel(TF_GRID_CONSTANT TensorMap q_map, TF_GRID_CONSTANT TensorMap k_map,
                                   TF_GRID_CONSTANT TensorMap v_map, TF_GRID_CONSTANT ForwardWgmma a) {
#if TF_SM90A
  TF_SHARED(shared);
  auto* barriers = reinterpret_cast<ForwardWgmmaBarriers<S>*>(shared + S::BARRIERS_AT);
  if (threadIdx.x == 0) {
    tma_prefetch(&q_map);
    tma_prefetch(&k_map);
    tma_prefetch(&v_map);
    mbarrier_init(&barriers->q_full, 1);
    mbarrier_init(&barriers->q_empty, S::WARPS);
    mbarrier_init(&barriers->v_loaded, 1);
    for (int stage = 0; stage < S::STAGES; ++stage) {
      mbarrier_init(&barriers->k_full[stage], 1);
      mbarrier_init(&barriers->k_empty[stage], S::WARPS);
      mbarrier_init(&barriers->v_full[stage], 1);
      mbarrier_init(&barriers->v_empty[stage], S::WARPS);
      mbarrier_init(&barriers->tile_full[stage], 1);
      mbarrier_init(&barriers->tile_empty[stage], S::WARPS);
    }
    mbarrier_fence_init();  // so that TMA, in the async proxy, sees them
  }
  __syncthreads();
  // Shuffled from lane 0, so that the compiler knows it to be uniform in the warp.
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    registers_decrease<S::LOADER_REGISTERS>();
    if (threadIdx.x < 32) forward_wgmma_produce<S>(a, &q_map, &k_map, &v_map, shared, barriers);
  } else {
    registers_increase<S::REGISTERS>();
    forward_wgmma_consume<S>(a, shared, barriers, warpgroup - 1);
  }
#endif
}

}  // namespace tf::cuda
