// Parts of attention_backward_mma.cuh: the tiles and places of its blocks, the products of a warp, and how a warp
// stores its results.
#pragma once
#include "attention_scores.cuh"
#include "attention_tiles.cuh"

namespace tf::cuda::backward_mma {

enum class Side { queries, keys };
enum class Wanted { all, key, value };  // which of dK and dV a key-side block sums: registers hold both up to D = 128

struct BackwardCall : AttentionBackward {
  int32_t blocks;          // per head
  int32_t heads_together;  // run block by block, so that the tiles they stream stay in the L2 cache
  bool aligned;            // rows can be moved 16 bytes at a time
  bool delta_only;         // write only delta = rowsum(P * dP) - dlse
  float* center;           // see attention_center.cuh
};

constexpr int kBackwardThreads = 128, kBackwardRows = 64;

template <int D, bool RICH>
struct BackwardTile {
  // Rows of a streamed tile, columns of the scores: as many as fit the registers.
  static constexpr int kColumns = D > 128 ? 16 : D > 64 || RICH ? 32 : 64;
  static constexpr int kStages = 2;
  static constexpr int kResident = kBackwardRows * D, kStreamed = kColumns * D;  // elements
};

struct BackwardPlace {
  int block, b, h;
};

TF_DEVICE BackwardPlace place_of(const BackwardCall& p, int program, int heads, bool descending) {
  const int many = p.blocks * p.heads_together, group = program / many, rest = program % many;
  const int together = min(p.heads_together, p.batch * heads - group * p.heads_together);
  const int block = rest / together, bh = group * p.heads_together + rest % together;
  return {descending ? p.blocks - 1 - block : block, bh / heads, bh % heads};
}

// ---- products -------------------------------------------------------------------------------------------------------
// s += A B^T: this warp's 16 rows of A by the 2 E rows of B.
template <int D, class T, int E>
TF_DEVICE void multiply_rows(const T* a_tile, const T* b_tile, float (&s)[E]) {
  const int lane = threadIdx.x % 32, a_row = threadIdx.x / 32 * 16 + lane % 16, b_row = lane % 8 + lane / 16 * 8;
#pragma unroll 4
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[4];
    ldmatrix_x4(a, a_tile + swizzled<D>(a_row, 2 * step + lane / 16));
#pragma unroll
    for (int n = 0; n < E / 8; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, b_tile + swizzled<D>(16 * n + b_row, 2 * step + lane / 8 % 2));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_m16n8k16<T>(accumulator(s, 2 * n), a, low);
      mma_m16n8k16<T>(accumulator(s, 2 * n + 1), a, high);
    }
  }
}

// sum += S B. S are accumulators, rounded to T.
template <int D, class T, int E>
TF_DEVICE void multiply_columns(const float (&s)[E], const T* b_tile, float (&sum)[D / 2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < E / 8; ++n) {
    uint32_t a[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = pair_of<T>(s[8 * n + 2 * r], s[8 * n + 2 * r + 1]);
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, b_tile + swizzled<D>(16 * n + lane % 16, 2 * d + lane / 16));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_m16n8k16<T>(accumulator(sum, 2 * d), a, low);
      mma_m16n8k16<T>(accumulator(sum, 2 * d + 1), a, high);
    }
  }
}

// Writes this warp's 16 rows, times scale, to rows first .. first + 15 of out, staged in its own rows of `tile`. Rows
// from `used` on are written as zeros; rows from `limit` on are not written.
template <int D, bool ANY, class T>
TF_DEVICE void store_rows(const float (&sum)[D / 2], float scale, T* tile, T* out, int64_t stride, int first, int used,
                          int limit, int dim, bool aligned) {
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const bool kept = first + row < used;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float low = kept ? sum[4 * n + 2 * half] * scale : 0.f;
      const float high = kept ? sum[4 * n + 2 * half + 1] * scale : 0.f;
      store_shared(reinterpret_cast<uint32_t*>(tile + swizzled<D>(own + row, n) + lane % 4 * 2), pair_of<T>(low, high));
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int at = lane; at < 16 * (D / 8); at += 32) {
    const int row = at / (D / 8), chunk = at % (D / 8);
    if (first + row >= limit || chunk * 8 >= dim) continue;
    const Vec<T, 8> values = load_shared_vec<8>(tile + swizzled<D>(own + row, chunk));
    T* const to = out + ((first + row) * stride + chunk * 8);
    if (!ANY || aligned) {
      store_vec(to, values);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (chunk * 8 + c < dim) store(to + c, values.v[c]);
    }
  }
}

}  // namespace tf::cuda::backward_mma
