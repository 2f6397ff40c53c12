// Attention, backward, for sm_80 and up: mma.sync m16n8k16 on tiles loaded by cp.async and read by ldmatrix.
//
//   P = exp(score - lse)    dV = P^T dO    dP = dO V^T    delta = rowsum(dO * O) - dlse    dS = P * (dP - delta)
//   dQ = scale * dS K       dK = scale * dS^T Q           dbias = dS    drelative[distance] = sum of dS along it
//
// One source, two sides: a block holds 64 rows of one pair of operands (query side: Q and dO; key side: K and V) and
// walks over tiles of the other pair. No sum crosses blocks, so gradients are bitwise reproducible without atomics,
// semaphores or a float32 dQ in memory. A kernel that adds to dQ reads and writes that dQ once per block of keys.
// The price is Q K^T and dO V^T twice: seven products where such a kernel has five.
#pragma once
#include "attention_backward_mma_delta.cuh"
#include "attention_backward_mma_distance.cuh"
#include "attention_center.cuh"

namespace tf::cuda::backward_mma {

// Bytes of shared memory: the resident tiles, the streamed tiles, then on the key side two buffers of a streamed tile's
// lse, delta and dropout bits, on the query side dS of a tile, for its sums per distance.
template <int D, Side SIDE, bool RICH, Wanted WANTED>
struct BackwardMemory {
  using Tile = BackwardTile<D, RICH>;
  static constexpr int kStreamed = (WANTED == Wanted::value ? 1 : 2) * Tile::kResident * 2;
  static constexpr int kMore = kStreamed + Tile::kStages * 2 * Tile::kStreamed * 2;
  static constexpr int kStatistics = 2 * Tile::kColumns;  // floats of one buffer
  static constexpr int kKept = 16 * Tile::kColumns;       // bytes of one buffer
  static constexpr int kPitch = Tile::kColumns + 1;       // of dS: no bank conflicts along a diagonal
  static constexpr int kBytes = kMore + (SIDE == Side::keys ? 2 * (4 * kStatistics + kKept) : 0);
  static constexpr int kScores = 4 * kBackwardRows * kPitch;
  // Large head dims leave no room for dS in the 99 KB of some GPUs: it takes the place of V.
  static constexpr bool kInPlace = D > 128;
  static constexpr int kBytesWithScores = kInPlace ? kBytes : kBytes + kScores;
  static_assert(!kInPlace || kScores <= Tile::kStreamed * 2);
};

// RICH: any feature that is_plain() excludes, rows of any alignment.
template <class T, int D, Side SIDE, bool RICH, Wanted WANTED>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    attention_backward_kernel(TF_GRID_CONSTANT BackwardCall p) {
  using Tile = BackwardTile<D, RICH>;
  using Memory = BackwardMemory<D, SIDE, RICH, WANTED>;
  constexpr bool kKeys = SIDE == Side::keys;
  constexpr bool kFirst = WANTED != Wanted::value, kSecond = kKeys && WANTED != Wanted::key;  // dK or dQ; dV
  constexpr int kColumns = Tile::kColumns, kScores = kColumns / 2;
  TF_SHARED(memory);
  T* const resident1 = reinterpret_cast<T*>(memory);                // K or Q
  T* const resident2 = resident1 + (kFirst ? Tile::kResident : 0);  // V or dO
  float* const statistics = reinterpret_cast<float*>(memory + Memory::kMore);
  uint8_t* const kept_bytes = memory + Memory::kMore + 8 * Memory::kStatistics;

  const int groups = p.heads / p.key_heads;
  const BackwardPlace at = place_of(p, blockIdx.x, kKeys ? p.key_heads : p.heads, !kKeys && p.window_right >= 0);
  Head head = head_of(p, at.b, kKeys ? at.h * groups : at.h);
  const int first = at.block * kBackwardRows;
  const int used = kKeys ? head.keys : head.queries, stored = kKeys && !p.cu_seqlens_k ? p.max_seqlen_k : used;
  if (first >= stored) return;
  const int last = min(first + kBackwardRows, used) - 1;
  const Range range = kKeys ? query_range<kColumns>(p, head, first, last) : key_range<kColumns>(p, head, first, last);
  const int tiles = first < used ? (range.end - range.begin + kColumns - 1) / kColumns : 0;
  const int total = kKeys ? tiles * groups : tiles;

  const int lane = threadIdx.x % 32, mine = first + int(threadIdx.x) / 32 * 16;  // mine: this warp's first row
  const auto load_queries = [&](auto rows, T* tile, const void* base, const RowStrides& strides, int h, int start) {
    const T* const from = head_rows(static_cast<const T*>(base), strides, int(opaque(head.b)), h, head.first_q);
    load_rows<D, decltype(rows)::value, kBackwardThreads, RICH>(tile, from, strides.row, start, head.queries, p.dim,
                                                                p.aligned);
  };
  const auto load_keys = [&](auto rows, T* tile, const void* base, const RowStrides& strides, int start) {
    const int b = int(opaque(head.b));
    const T* const from = head_rows(static_cast<const T*>(base), strides, b, head.key_head, head.first_k);
    load_rows<D, decltype(rows)::value, kBackwardThreads, RICH>(tile, from, strides.row, start, head.keys, p.dim,
                                                                p.aligned);
  };
  const auto load_resident = [&] {
    constexpr std::integral_constant<int, kBackwardRows> rows;
    if constexpr (kKeys) {
      load_keys(rows, resident1, p.key, p.key_strides, first);
      if constexpr (kFirst) load_keys(rows, resident2, p.value, p.value_strides, first);
    } else {
      load_queries(rows, resident1, p.query, p.query_strides, head.h, first);
      load_queries(rows, resident2, p.grad_out, p.grad_out_strides, head.h, first);
    }
  };
  const auto streamed = [&](int n) {
    return reinterpret_cast<T*>(memory + Memory::kStreamed) + n % Tile::kStages * 2 * Tile::kStreamed;
  };
  const auto load_streamed = [&](int n, int h, int start) {
    constexpr std::integral_constant<int, kColumns> rows;
    T* const tile = streamed(n);
    if constexpr (kKeys) {
      load_queries(rows, tile, p.query, p.query_strides, h, start);
      load_queries(rows, tile + Tile::kStreamed, p.grad_out, p.grad_out_strides, h, start);
    } else {
      load_keys(rows, tile, p.key, p.key_strides, start);
      load_keys(rows, tile + Tile::kStreamed, p.value, p.value_strides, start);
    }
    cp_async_commit();
  };
  // Key side: statistics of a tile of queries. The first kColumns threads load lse, the next kColumns delta.
  const auto load_statistic = [&](int h, int start) {
    const int row = start + int(threadIdx.x) % kColumns;
    if (threadIdx.x >= 2 * kColumns || row >= head.queries) return kInfinity;
    const int64_t place = head.b * p.lse_batch + h * p.lse_head + head.first_q + row;
    if (threadIdx.x < kColumns) return peak_of(load(p.lse + place));
    return kFirst ? load(p.delta + place) : 0.f;
  };
  const auto store_statistic = [&](int n, int h, int start, float value) {
    const bool delta_past = threadIdx.x >= kColumns && start + int(threadIdx.x) % kColumns >= head.queries;
    if (threadIdx.x < 2 * kColumns)
      store_shared(statistics + (n % 2 * Memory::kStatistics + int(threadIdx.x)), delta_past ? 0.f : value);
    if (RICH && p.threshold) {
      Head other = head;
      other.h = h;
      const Dropout dropout = dropout_of(p, other);
      for (int c = threadIdx.x; c < Memory::kKept; c += kBackwardThreads)
        store_shared(kept_bytes + (n % 2 * Memory::kKept + c),
                     uint8_t(keep_byte(dropout, start + c / 16, first / 128, c % 16)));
    }
  };

  float peak[2], delta[2];  // delta: with delta_only its sum so far
  if constexpr (!kKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = mine + lane / 4 + 8 * half;
      const int64_t place = lse_place(p, head) + row;
      peak[half] = row < head.queries ? peak_of(load(p.lse + place)) : kInfinity;
      delta[half] = row < head.queries && !(RICH && p.delta_only) ? load(p.delta + place) : 0.f;
    }
  }
  // Query side, sums over this thread's two rows: of dS, and of P times the slope of the soft cap.
  float excess[2] = {}, weight[2] = {};
  float sum1[kFirst ? D / 2 : 4] = {}, sum2[kSecond ? D / 2 : 4] = {};
  const float to_log2 = RICH ? kLog2e : p.scale * kLog2e;
  const float keep_scale = RICH && p.threshold ? p.keep_scale : 1.f;
  Kept kept{};
  int kept_group = -1;
  DistanceSums by_distance{};

  int next_h = head.h, next_start = range.begin;
  if (total > 0) {
    load_resident();
    load_streamed(0, next_h, next_start);
    if constexpr (kKeys) store_statistic(0, next_h, next_start, load_statistic(next_h, next_start));
  }
#pragma unroll 1
  for (int n = 0; n < total; ++n) {
    const int start = next_start;
    head.h = next_h;
    next_start += kColumns;
    if (kKeys && next_start >= range.end) {
      next_start = range.begin;
      ++next_h;
    }
    const bool more = n + 1 < total;
    cp_async_wait<0>();
    __syncthreads();  // this tile has arrived, and no warp still reads the previous one
    if (more) load_streamed(n + 1, next_h, next_start);
    float statistic = 0.f;
    if (kKeys && more) statistic = load_statistic(next_h, next_start);

    const T* const tile1 = streamed(n);
    const T* const tile2 = tile1 + Tile::kStreamed;
    const int own = RICH ? int(opaque(mine)) : mine, query0 = kKeys ? start : own, key0 = kKeys ? own : start;
    float s[kScores] = {}, ds[kFirst ? kScores : 1] = {}, slope[RICH ? kScores : 1];
    if constexpr (kFirst) multiply_rows<D>(resident2, tile2, ds);  // dP, until the loop below
    multiply_rows<D>(resident1, tile1, s);
    if constexpr (RICH) finish_scores<kKeys, true>(p, head, query0, key0, s, slope);
    if (!is_inner<kColumns>(range, start)) mask_edges<kKeys>(p, head, query0, key0, s);
    if (RICH && !kKeys && p.threshold && start / 128 != kept_group) {
      kept_group = start / 128;
      kept = kept_of(dropout_of(p, head), own, start);
    }
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) {
      const int column = 8 * c + lane % 4 * 2;
      Vec<float, 2> peaks{}, deltas{};
      if constexpr (kKeys) {
        const float* const both = statistics + (n % 2 * Memory::kStatistics + column);
        peaks = load_shared_vec<2>(both);
        if constexpr (kFirst) deltas = load_shared_vec<2>(both + kColumns);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float prob = exp2_approx(s[4 * c + e] * to_log2 - (kKeys ? peaks.v[e % 2] : peak[e / 2]));
        bool keep = true;
        if (RICH && p.threshold) {
          if constexpr (kKeys) {
            const int place = n % 2 * Memory::kKept + (column + e % 2) * 16 + lane / 4 + e / 2 * 8;
            keep = load_shared(kept_bytes + place) >> (key0 % 128 / 16) & 1;
          } else {
            keep = keeps(kept, key0, 4 * c + e);
          }
        }
        s[4 * c + e] = keep ? prob : 0.f;
        if constexpr (kFirst) {
          const float dp = keep ? ds[4 * c + e] * keep_scale : 0.f;
          ds[4 * c + e] = prob * (dp - (kKeys ? deltas.v[e % 2] : delta[e / 2]));
          if (RICH && !kKeys && p.delta_only) delta[e / 2] += prob * dp;
          if constexpr (!kKeys) {
            excess[e / 2] += ds[4 * c + e];
            if (RICH && p.softcap != 0.f) weight[e / 2] += prob * slope[4 * c + e];
          }
        }
      }
    }
    if constexpr (kSecond) multiply_columns<D>(s, tile2, sum2);
    if constexpr (RICH && !kKeys) {
      if (p.dbias) {
        float* const base = p.dbias + (head.b * p.dbias_strides[0] + head.h * p.dbias_strides[1]);
        for_each_score<false>(ds, own, start, [&](float& x, int i, int j) {
          if (i < head.queries && j < head.keys) store(base + (i * p.dbias_strides[2] + j * p.dbias_strides[3]), x);
        });
      }
      if (p.drelative_bias) {
        if (Memory::kInPlace) __syncthreads();  // no warp still reads V
        float* const scores = Memory::kInPlace ? reinterpret_cast<float*>(streamed(n) + Tile::kStreamed)
                                               : reinterpret_cast<float*>(memory + Memory::kBytes);
        by_distance.add<kColumns>(p, head, first, own, start, ds, scores);
      }
    }
    if constexpr (kFirst) {
      if constexpr (RICH) {
#pragma unroll
        for (int e = 0; e < kScores; ++e) ds[e] *= slope[e];
      }
      if (!(RICH && !kKeys && p.delta_only)) multiply_columns<D>(ds, tile1, sum1);
    }
    if (kKeys && more) store_statistic(n + 1, next_h, next_start, statistic);
  }

  const auto store_gradient = [&](const float(&sum)[D / 2], float scale, T* tile, void* base, const RowStrides& strides,
                                  int h, int first_row) {
    T* const to = head_rows(static_cast<T*>(base), strides, head.b, h, first_row);
    store_rows<D, RICH>(sum, scale, tile, to, strides.row, mine, used, stored, p.dim, p.aligned);
  };
  if constexpr (kKeys) {
    if constexpr (kFirst) store_gradient(sum1, p.scale, resident1, p.dk, p.dk_strides, head.key_head, head.first_k);
    if constexpr (kSecond) store_gradient(sum2, keep_scale, resident2, p.dv, p.dv_strides, head.key_head, head.first_k);
  } else {
    if constexpr (RICH) {
      if (p.drelative_bias) by_distance.finish(p, head, first, reinterpret_cast<float*>(streamed(0)));
      if (p.delta_only) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = mine + lane / 4 + 8 * half;
          float sum = delta[half];
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          if (lane % 4 == 0 && row < head.queries) store_delta(p, head, row, sum);
        }
        return;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        excess[half] += __shfl_xor_sync(0xffffffffu, excess[half], step);
        weight[half] += __shfl_xor_sync(0xffffffffu, weight[half], step);
      }
      const int row = mine + lane / 4 + 8 * half;
      if (p.grad_lse && row < head.queries && peak[half] != kInfinity) excess[half] -= load_grad_lse(p, head, row);
      if (RICH && p.softcap != 0.f) excess[half] *= weight[half];
    }
    const float* const center = center_of(p, p.center, head);
#pragma unroll
    for (int e = 0; e < D / 2; ++e) {
      const int column = e / 4 * 8 + lane % 4 * 2 + e % 2;
      if (column < p.dim) sum1[e] -= excess[e / 2 % 2] * load(center + column);
    }
    store_gradient(sum1, p.scale, resident1, p.dq, p.dq_strides, head.h, head.first_q);
  }
}

}  // namespace tf::cuda::backward_mma
