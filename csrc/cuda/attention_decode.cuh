// The kernels of attention_decode.cu.
//
// Rows are the queries of the heads that share a key head. Block (sequence and key head, split, chunk) computes the
// attention of kRows rows over its share of the keys. `lanes` neighbouring threads share a key. Each reads 16 bytes of
// it at a time, straight into registers, and keeps the same columns of q and of the output. They exchange only the sum
// of each dot product. No warp waits for another until the block's states are joined at the end. The loads of kKeys
// keys per thread are in flight together.
#pragma once
#include "attention_decode.hpp"
#include "attention_scores.cuh"
#include "vector.cuh"

namespace tf::cuda {

constexpr int kDecodeThreads = 128, kDecodeWarps = kDecodeThreads / 32, kMostSplits = 128;

// State of an online softmax: the largest score, the sum of exp(score - peak), the sum of exp(score - peak) * value.
template <int kColumns>
struct DecodeState {
  float peak, total, sum[kColumns];
};

TF_DEVICE float exponential(float x, float peak) { return exp2_approx((x - peak) * kLog2e); }
TF_DEVICE float finite_peak(float peak) { return peak == -kInfinity ? 0.f : peak; }

struct DecodeRow {  // query i of head h
  int32_t h, i;
  bool exists;
};

TF_DEVICE int32_t decode_rows(const AttentionDecode& p) { return p.max_seqlen_q * (p.heads / p.key_heads); }

TF_DEVICE DecodeRow decode_row(const AttentionDecode& p, const Head& head, int32_t r) {
  const int32_t i = r % p.max_seqlen_q;
  return {head.h + r / p.max_seqlen_q, i, r < decode_rows(p) && i < head.queries};
}

// Score with scale, soft cap, biases, mask and window, for calls that are not plain.
TF_DEVICE float rich_score(const AttentionDecode& p, const Head& head, const DecodeRow& row, int32_t j, float s) {
  s *= p.scale;
  if (p.softcap != 0.f) s = p.softcap * tanhf(s / p.softcap);
  if (!row.exists || j >= head.keys) return s;
  if (p.bias) {
    const int64_t place = head.b * p.bias_strides[0] + row.h * p.bias_strides[1] + row.i * p.bias_strides[2] +
                          j * p.bias_strides[3];
    if (p.bias_type == BiasType::f32) s += load(static_cast<const float*>(p.bias) + place);
    if (p.bias_type == BiasType::bf16) s += to_float(load(static_cast<const bf16_t*>(p.bias) + place));
    if (p.bias_type == BiasType::f16) s += to_float(load(static_cast<const half_t*>(p.bias) + place));
  }
  if (p.relative_bias) {
    const int32_t distance = min(max(j - row.i - head.offset, -p.reach), p.reach);
    s += load(p.relative_bias + row.h * p.relative_bias_stride + distance + p.reach);
  }
  if (p.mask) {
    const int64_t place = head.b * p.mask_strides[0] + row.h * p.mask_strides[1] + row.i * p.mask_strides[2] +
                          j * p.mask_strides[3];
    if (!load(p.mask + place)) s = -kInfinity;
  }
  return s;
}

// Columns from `column` on of a row of `dim` elements; zeros past its end. Rows that are unaligned or end within a
// vector are read element by element.
template <class T, bool kAligned, int kWidth>
TF_DEVICE void read_columns(Vector<T, kWidth>& vector, const T* row, int32_t column, int32_t dim) {
  if constexpr (kAligned) {
    vector.clear();
    if (column < dim) vector.read(row + column);
  } else {
    float f[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) f[e] = column + e < dim ? to_float(load(row + column + e)) : 0.f;
    vector.set(f);
  }
}
template <class T, bool kAligned, int kWidth>
TF_DEVICE void write_columns(const Vector<T, kWidth>& vector, T* row, int32_t column, int32_t dim) {
  if constexpr (kAligned) {
    if (column < dim) vector.write(row + column);
  } else {
    float f[kWidth];
    vector.get(f);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (column + e < dim) store(row + column + e, from_float<T>(f[e]));
    }
  }
}

template <class T>
TF_DEVICE void write_out(const AttentionDecode& p, const Head& head, const DecodeRow& row, int32_t d, float peak,
                         float total, float sum) {
  if (!row.exists) return;
  T* out = head_rows(static_cast<T*>(p.out), p.out_strides, head.b, row.h, head.first_q + row.i);
  store(out + d, from_float<T>(total == 0.f ? 0.f : sum / total));
  if (d == 0 && p.lse) {
    float* lse = p.lse + (head.b * p.lse_batch + row.h * p.lse_head + head.first_q + row.i);
    store(lse, total == 0.f ? -kInfinity : peak + logf(total));
  }
}

// Where a split writes the dim + 2 floats of a row: the sums, the peak, the total.
TF_DEVICE float* decode_part(const AttentionDecode& p, int64_t row, int32_t split) {
  return p.partial + (row * p.splits + split) * (p.dim + 2);
}

// Joins the parts of a chunk of kRows rows, in the order of the splits. scratch: kRows * (kMostSplits + 2) floats.
template <class T, int kRows>
TF_DEVICE void join_parts(const AttentionDecode& p, const Head& head, int32_t tile, int32_t first, float* scratch) {
  const int thread = threadIdx.x, lane = thread % 32, rows = decode_rows(p);
  float *weights = scratch, *ends = scratch + kRows * kMostSplits;
  for (int r = thread / 32; r < kRows && first + r < rows; r += kDecodeWarps) {
    const int64_t row = int64_t(tile) * rows + first + r;
    float peak = -kInfinity, total = 0.f;
    for (int s = lane; s < p.splits; s += 32) peak = fmaxf(peak, load(decode_part(p, row, s) + p.dim));
#pragma unroll
    for (int offset = 16; offset; offset /= 2) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, offset));
    for (int s = lane; s < p.splits; s += 32) {
      const float* part = decode_part(p, row, s) + p.dim;
      const float weight = exponential(load(part), finite_peak(peak));  // 0 for a part without keys
      store_shared(weights + r * kMostSplits + s, weight);
      total += weight * load(part + 1);
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    if (lane == 0) {
      store_shared(ends + 2 * r, peak);
      store_shared(ends + 2 * r + 1, total);
    }
  }
  __syncthreads();
  for (int r = 0; r < kRows && first + r < rows; ++r) {
    const int64_t row = int64_t(tile) * rows + first + r;
    for (int d = thread; d < p.dim; d += kDecodeThreads) {
      float sum = 0.f;
#pragma unroll 4
      for (int s = 0; s < p.splits; ++s)
        sum += load_shared(weights + r * kMostSplits + s) * load(decode_part(p, row, s) + d);
      write_out<T>(p, head, decode_row(p, head, first + r), d, load_shared(ends + 2 * r), load_shared(ends + 2 * r + 1),
                   sum);
    }
  }
}

// The head of a block. With new keys, head.keys includes them, and query i has the position of new key i.
TF_DEVICE Head decode_head(const AttentionDecode& p, int32_t tile, int32_t& stored) {
  const int32_t b = tile / p.key_heads;
  Head head = head_of(p, b, (tile - b * p.key_heads) * (p.heads / p.key_heads));
  if (p.wide_lengths) {
    head.keys = int32_t(min(max(load(p.wide_lengths + b), int64_t(0)), int64_t(head.keys)));
    if (p.bottom_right) head.offset = head.keys - head.queries;
  }
  stored = head.keys;
  if (p.new_key) {
    head.offset = stored;
    head.keys = min(stored + head.queries, p.max_seqlen_k);
  }
  return head;
}

// arrivals: how many blocks of each (tile, chunk) have finished, zeros before and after. null: another launch joins the
// parts.
template <class T, int kRows, int kVectors, int kKeys, bool kPlain>
__global__ void __launch_bounds__(kDecodeThreads, kRows == 1 ? 4 : 3)
    attention_decode_kernel(const AttentionDecode p, const int32_t lanes, uint32_t* arrivals) {
  constexpr int kWidth = 16 / sizeof(T), kColumns = kWidth * kVectors;
  using P = Vector<T, kWidth>;
  TF_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int32_t shift = __ffs(lanes) - 1;  // lanes is a power of two
  const int32_t thread = threadIdx.x, slice = thread & (lanes - 1), group = thread >> shift;
  const int32_t groups = kDecodeThreads >> shift;
  const int32_t tile = blockIdx.x, split = blockIdx.y, first = blockIdx.z * kRows;
  int32_t stored;
  const Head head = decode_head(p, tile, stored);

  DecodeState<kColumns> state[kRows];
  DecodeRow row[kRows];
  float q[kRows][kColumns];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    state[r].peak = -kInfinity;
    state[r].total = 0.f;
    row[r] = decode_row(p, head, first + r);
    const T* from =
        head_rows(static_cast<const T*>(p.query), p.query_strides, head.b, row[r].h, head.first_q + row[r].i);
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      P vector;
      float f[kWidth];
      vector.clear();
      if (row[r].exists) read_columns<T, kPlain>(vector, from, (slice + n * lanes) * kWidth, p.dim);
      vector.get(f);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        q[r][n * kWidth + e] = f[e];
        state[r].sum[n * kWidth + e] = 0.f;
      }
    }
  }

  T* k = head_rows(static_cast<T*>(const_cast<void*>(p.key)), p.key_strides, head.b, head.key_head, head.first_k);
  T* v = head_rows(static_cast<T*>(const_cast<void*>(p.value)), p.value_strides, head.b, head.key_head, head.first_k);
  const T *new_k = nullptr, *new_v = nullptr;
  if (p.new_key) {
    new_k = head_rows(static_cast<const T*>(p.new_key), p.new_key_strides, head.b, head.key_head, 0);
    new_v = head_rows(static_cast<const T*>(p.new_value), p.new_value_strides, head.b, head.key_head, 0);
  }
  const Range range = key_range<1>(p, head, 0, head.queries - 1);
  const int32_t share = (max(range.end - range.begin, 0) + p.splits - 1) / p.splits;
  const int32_t begin = range.begin + split * share, end = min(range.end, begin + share);

  for (int32_t start = begin; start < end; start += groups * kKeys) {
    P keys[kKeys][kVectors], values[kKeys][kVectors];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      const int32_t j = start + u * groups + group;
      const bool fresh = new_k && j >= stored;
      const T* from_k = fresh ? new_k + (j - stored) * p.new_key_strides.row : k + j * p.key_strides.row;
      const T* from_v = fresh ? new_v + (j - stored) * p.new_value_strides.row : v + j * p.value_strides.row;
#pragma unroll
      for (int n = 0; n < kVectors; ++n) {
        const int32_t column = (slice + n * lanes) * kWidth;
        keys[u][n].clear();
        values[u][n].clear();
        if (j < end) {
          read_columns<T, kPlain>(keys[u][n], from_k, column, p.dim);
          read_columns<T, kPlain>(values[u][n], from_v, column, p.dim);
        }
      }
    }
    if (new_k && start + groups * kKeys > stored && blockIdx.z == 0) {
#pragma unroll
      for (int u = 0; u < kKeys; ++u) {
        const int32_t j = start + u * groups + group;
#pragma unroll
        for (int n = 0; n < kVectors; ++n) {
          const int32_t column = (slice + n * lanes) * kWidth;
          if (j >= stored && j < end) {
            write_columns<T, kPlain>(keys[u][n], k + j * p.key_strides.row, column, p.dim);
            write_columns<T, kPlain>(values[u][n], v + j * p.value_strides.row, column, p.dim);
          }
        }
      }
    }

    float scores[kRows][kKeys];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) scores[r][u] = 0.f;
#pragma unroll
      for (int n = 0; n < kVectors; ++n) {
        float f[kWidth];
        keys[u][n].get(f);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) scores[r][u] += q[r][n * kWidth + e] * f[e];
        }
      }
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
      if (offset < lanes) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int u = 0; u < kKeys; ++u) scores[r][u] += __shfl_xor_sync(0xffffffffu, scores[r][u], offset);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t position = row[r].i + head.offset;
      const int32_t low = p.window_left < 0 ? begin : max(begin, position - p.window_left);
      const int32_t past = p.window_right < 0 ? end : min(end, position + p.window_right + 1);
      float peak = state[r].peak;
#pragma unroll
      for (int u = 0; u < kKeys; ++u) {
        const int32_t j = start + u * groups + group;
        float s = scores[r][u];
        s = kPlain ? s * p.scale : rich_score(p, head, row[r], j, s);
        scores[r][u] = j >= low && j < past ? s : -kInfinity;
        peak = fmaxf(peak, scores[r][u]);
      }
      const float reference = finite_peak(peak), decay = exponential(state[r].peak, reference);
      state[r].peak = peak;
      state[r].total *= decay;
#pragma unroll
      for (float& sum : state[r].sum) sum *= decay;
#pragma unroll
      for (int u = 0; u < kKeys; ++u) {
        scores[r][u] = exponential(scores[r][u], reference);
        state[r].total += scores[r][u];
      }
    }
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
#pragma unroll
      for (int n = 0; n < kVectors; ++n) {
        float f[kWidth];
        values[u][n].get(f);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) state[r].sum[n * kWidth + e] += scores[r][u] * f[e];
        }
      }
    }
  }

  // States are joined within each warp, then across warps: the first `lanes` lanes of each warp write theirs.
  const int32_t width = lanes * kColumns + 2;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    DecodeState<kColumns>& s = state[r];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
      if (offset >= lanes) {
        const float peak = fmaxf(s.peak, __shfl_xor_sync(0xffffffffu, s.peak, offset));
        const float decay = exponential(s.peak, finite_peak(peak));
        s.peak = peak;
        s.total *= decay;
        s.total += __shfl_xor_sync(0xffffffffu, s.total, offset);
#pragma unroll
        for (float& sum : s.sum) {
          sum *= decay;
          sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
      }
    }
    float* to = scratch + (thread / 32 * kRows + r) * width;
    if (thread % 32 < lanes) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int32_t column = (slice + c / kWidth * lanes) * kWidth + c % kWidth;
        store_shared(to + column, s.sum[c]);
      }
      if (slice == 0) {
        store_shared(to + width - 2, s.peak);
        store_shared(to + width - 1, s.total);
      }
    }
  }
  __syncthreads();
  const int32_t rows = decode_rows(p);
  for (int r = 0; r < kRows && first + r < rows; ++r) {
    float peak = -kInfinity, total = 0.f, weight[kDecodeWarps];
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      weight[w] = load_shared(scratch + (w * kRows + r) * width + width - 2);
      peak = fmaxf(peak, weight[w]);
    }
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      weight[w] = exponential(weight[w], finite_peak(peak));
      total += weight[w] * load_shared(scratch + (w * kRows + r) * width + width - 1);
    }
    float* part = p.splits > 1 ? decode_part(p, int64_t(tile) * rows + first + r, split) : nullptr;
    for (int32_t d = thread; d < p.dim; d += kDecodeThreads) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) sum += weight[w] * load_shared(scratch + (w * kRows + r) * width + d);
      if (part) {
        store(part + d, sum);
      } else {
        write_out<T>(p, head, decode_row(p, head, first + r), d, peak, total, sum);
      }
    }
    if (part && thread == 0) {
      store(part + p.dim, peak);
      store(part + p.dim + 1, total);
    }
  }
  if (!arrivals) return;

  // The last block of a chunk joins its parts.
  uint32_t* arrived = arrivals + tile * gridDim.z + blockIdx.z;
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    const bool last = atomicAdd(arrived, 1u) == uint32_t(p.splits - 1);
    if (last) store(arrived, 0u);
    store_shared(reinterpret_cast<uint32_t*>(shared), uint32_t(last));
  }
  __syncthreads();
  const bool last = load_shared(reinterpret_cast<const uint32_t*>(shared));
  __syncthreads();
  if (!last) return;
  __threadfence();
  join_parts<T, kRows>(p, head, tile, first, scratch);
}

// Block (tile, row).
template <class T>
__global__ void __launch_bounds__(kDecodeThreads) attention_decode_join_kernel(const AttentionDecode p) {
  TF_SHARED(shared);
  int32_t stored;
  const Head head = decode_head(p, blockIdx.x, stored);
  join_parts<T, 1>(p, head, blockIdx.x, blockIdx.y, reinterpret_cast<float*>(shared));
}

}  // namespace tf::cuda
