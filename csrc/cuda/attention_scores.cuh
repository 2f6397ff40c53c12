// Scores, for all attention kernels, forward and backward, mma.sync and wgmma: which blocks take part, and what happens
// to a warp's accumulators between Q K^T and the exponential.
//
// Accumulators are laid out as for mma.m16n8 and wgmma: E of them hold 16 rows and 2 E columns of a warp, element e at
// row lane / 4 + 8 * (e % 4 / 2) and column 8 * (e / 4) + 2 * (lane % 4) + e % 2. Rows are queries and columns keys;
// with TRANSPOSED it is the reverse.
#pragma once
#include "attention.hpp"
#include "philox.cuh"
#include "ptx.cuh"
#include "simt.cuh"

namespace tf::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// Whether only a positive scale is between product and exponential: it then folds into the exponential and the maximum.
inline bool is_plain(const Attention& a) {
  return a.scale > 0.f && a.bias_type == BiasType::none && !a.mask && !a.relative_bias && a.softcap == 0.f &&
         !a.threshold;
}

// ---- which keys, which queries ----------------------------------------------------------------
struct alignas(16) Head {  // one head of one sequence; query i has position i + offset
  int32_t b, h, key_head;
  int32_t first_q, first_k;  // rows before it in unpadded tensors
  int32_t queries, keys, offset;
};

TF_DEVICE Head head_of(const Attention& a, int32_t b, int32_t h) {
  Head head{b, h, h / (a.heads / a.key_heads), 0, 0, a.max_seqlen_q, a.max_seqlen_k, 0};
  if (a.cu_seqlens_q) {
    head.first_q = load(a.cu_seqlens_q + b);
    head.first_k = load(a.cu_seqlens_k + b);
    head.queries = load(a.cu_seqlens_q + b + 1) - head.first_q;
    head.keys = load(a.cu_seqlens_k + b + 1) - head.first_k;
  }
  if (a.key_lengths) head.keys = min(max(load(a.key_lengths + b), 0), head.keys);
  if (a.bottom_right) head.offset = head.keys - head.queries;
  return head;
}

// Row 0 of a head. Queries: pass head.h and head.first_q; keys: head.key_head and head.first_k.
template <class T>
TF_DEVICE T* head_rows(T* base, const RowStrides& rows, int32_t b, int32_t h, int32_t first) {
  return base + (b * rows.batch + h * rows.head + first * rows.row);
}

// Elements in [begin, end) take part, and in [inner_begin, inner_end) need no mask. All but end are multiples of BLOCK.
struct alignas(16) Range {
  int32_t begin, inner_begin, inner_end, end;
};

// Of `count` elements, those in [x - before, x + after] for any x in first .. last; inner: for every such x.
template <int BLOCK>
TF_DEVICE Range range_around(int32_t first, int32_t last, int32_t count, int32_t before,
                             int32_t after) {
  Range r{0, 0, count, count};
  if (after >= 0) {
    r.end = min(r.end, last + after + 1);
    r.inner_end = min(r.inner_end, first + after + 1);
  }
  if (before >= 0) {
    r.begin = max(first - before, 0) / BLOCK * BLOCK;
    r.inner_begin = (max(last - before, 0) + BLOCK - 1) / BLOCK * BLOCK;
  }
  r.end = max(r.end, r.begin);
  r.inner_end = max(max(r.inner_end, 0) / BLOCK * BLOCK, r.inner_begin);
  return r;
}

// Keys that queries first .. last see.
template <int BLOCK>
TF_DEVICE Range key_range(const Attention& a, const Head& head, int32_t first, int32_t last) {
  return range_around<BLOCK>(first + head.offset, last + head.offset, head.keys, a.window_left, a.window_right);
}

// Queries that see keys first .. last.
template <int BLOCK>
TF_DEVICE Range query_range(const Attention& a, const Head& head, int32_t first, int32_t last) {
  return range_around<BLOCK>(first - head.offset, last - head.offset, head.queries, a.window_right, a.window_left);
}

// Whether some element of the block at `start` takes part; whether none needs a mask.
template <int BLOCK>
TF_DEVICE bool is_seen(const Range& r, int32_t start) {
  return start < r.end && start + BLOCK > r.begin;
}
template <int BLOCK>
TF_DEVICE bool is_inner(const Range& r, int32_t start) {
  return start >= r.inner_begin && start + BLOCK <= r.inner_end;
}

// ---- elements ----------------------------------------------------------------------------------------------------
// The accumulators of columns 8 n .. 8 n + 7, in the form that mma takes.
template <int E>
TF_DEVICE float (&accumulator(float (&s)[E], int n))[4] {
  return *reinterpret_cast<float(*)[4]>(&s[4 * n]);
}

// Calls use(element, query, key) for every accumulator of the thread. query0, key0: the first of the warp's tile.
template <bool TRANSPOSED, int E, class Use>
TF_DEVICE void for_each_score(float (&s)[E], int32_t query0, int32_t key0, Use use) {
  const int32_t row0 = int32_t(threadIdx.x % 32 / 4), column0 = int32_t(threadIdx.x % 4 * 2);
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const int32_t row = row0 + e % 4 / 2 * 8, column = column0 + e / 4 * 8 + e % 2;
    use(s[e], query0 + (TRANSPOSED ? column : row), key0 + (TRANSPOSED ? row : column));
  }
}

// Sets scores outside of lengths and windows to -inf, for blocks that are not inner.
template <bool TRANSPOSED, int E>
TF_DEVICE void mask_edges(const Attention& a, const Head& head, int32_t query0, int32_t key0,
                          float (&s)[E]) {
  for_each_score<TRANSPOSED>(s, query0, key0, [&](float& x, int32_t i, int32_t j) {
    const int32_t position = i + head.offset;
    const int32_t low = a.window_left < 0 ? 0 : position - a.window_left;
    const int32_t past = a.window_right < 0 ? head.keys : min(head.keys, position + a.window_right + 1);
    if (j < low || j >= past || i >= head.queries) x = -kInfinity;
  });
}

template <bool TRANSPOSED, class B, int E>
TF_DEVICE void add_bias(const Attention& a, const Head& head, int32_t query0, int32_t key0,
                        float (&s)[E]) {
  const B* base = static_cast<const B*>(a.bias) + (head.b * a.bias_strides[0] + head.h * a.bias_strides[1]);
  for_each_score<TRANSPOSED>(s, query0, key0, [&](float& x, int32_t i, int32_t j) {
    if (i < head.queries && j < head.keys)
      x += to_float(load(base + (i * a.bias_strides[2] + j * a.bias_strides[3])));
  });
}

template <bool TRANSPOSED, int E>
TF_DEVICE void add_relative(const Attention& a, const Head& head, int32_t query0, int32_t key0,
                            float (&s)[E]) {
  constexpr int kQueries = TRANSPOSED ? 2 * E : 16, kKeys = TRANSPOSED ? 16 : 2 * E;
  const float* row = a.relative_bias + head.h * a.relative_bias_stride;
  const int32_t lowest = key0 - (query0 + kQueries - 1 + head.offset), highest = lowest + kQueries + kKeys - 2;
  if (lowest >= a.reach || highest <= -a.reach) {  // all distances at one end: one value
    const float far = load(row + (lowest >= a.reach ? 2 * a.reach : 0));
#pragma unroll
    for (int e = 0; e < E; ++e) s[e] += far;
    return;
  }
  for_each_score<TRANSPOSED>(s, query0, key0, [&](float& x, int32_t i, int32_t j) {
    x += load(row + min(max(j - i - head.offset + a.reach, 0), 2 * a.reach));
  });
}

template <bool TRANSPOSED, int E>
TF_DEVICE void apply_mask(const Attention& a, const Head& head, int32_t query0, int32_t key0,
                          float (&s)[E]) {
  const uint8_t* base = a.mask + (head.b * a.mask_strides[0] + head.h * a.mask_strides[1]);
  for_each_score<TRANSPOSED>(s, query0, key0, [&](float& x, int32_t i, int32_t j) {
    if (i < head.queries && j < head.keys && !load(base + (i * a.mask_strides[2] + j * a.mask_strides[3])))
      x = -kInfinity;
  });
}

// Products to scores, in natural units, for calls that are not plain: scale, soft cap, biases, mask, but not the edges.
// slope, with SLOPE: the derivative of the soft cap.
template <bool TRANSPOSED, bool SLOPE, int E>
TF_DEVICE void finish_scores(const Attention& a, const Head& head, int32_t query0, int32_t key0,
                             float (&s)[E], float (&slope)[SLOPE ? E : 1]) {
  if (a.softcap != 0.f) {
    const float inner = 2.f * kLog2e * a.scale / a.softcap;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const float t = 1.f - 2.f * rcp_approx(1.f + exp2_approx(s[e] * inner));  // tanh
      if constexpr (SLOPE) slope[e] = 1.f - t * t;
      s[e] = t * a.softcap;
    }
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if constexpr (SLOPE) slope[e] = 1.f;
      s[e] *= a.scale;
    }
  }
  if (a.bias_type == BiasType::f32) add_bias<TRANSPOSED, float>(a, head, query0, key0, s);
  if (a.bias_type == BiasType::bf16) add_bias<TRANSPOSED, bf16_t>(a, head, query0, key0, s);
  if (a.bias_type == BiasType::f16) add_bias<TRANSPOSED, half_t>(a, head, query0, key0, s);
  if (a.relative_bias) add_relative<TRANSPOSED>(a, head, query0, key0, s);
  if (a.mask) apply_mask<TRANSPOSED>(a, head, query0, key0, s);
}
template <bool TRANSPOSED, int E>
TF_DEVICE void finish_scores(const Attention& a, const Head& head, int32_t query0, int32_t key0,
                             float (&s)[E]) {
  float none[1];
  finish_scores<TRANSPOSED, false>(a, head, query0, key0, s, none);
}

// ---- dropout: the bits of csrc/cpu/philox.hpp ----------------------------------------------------------------------
struct Dropout {
  PhiloxKey key;
  uint32_t bh, threshold;
};

TF_DEVICE Dropout dropout_of(const Attention& a, const Head& head) {
  return {philox_key(a.rng), uint32_t(head.b * a.heads + head.h), a.threshold};
}

// Bit l: element (i, 128 * group + 16 * l + column) is kept; column: 0 .. 15.
TF_DEVICE uint32_t keep_byte(const Dropout& d, uint32_t i, uint32_t group, uint32_t column) {
  const PhiloxWords words = philox(16 * group + column, i, d.bh, d.key);
  uint32_t bits = 0;
#pragma unroll
  for (int l = 0; l < 8; ++l) bits |= uint32_t(kept(words, l, d.threshold)) << l;
  return bits;
}

// Which elements a thread keeps of its two rows of accumulators (queries) in a group of 128 columns. Every bit of eight
// Philox counters is used, whatever the width of a tile.
struct Kept {
  uint32_t bits[2];
};

TF_DEVICE Kept kept_of(const Dropout& d, int32_t query0, int32_t key0) {
  const uint32_t lane = threadIdx.x % 32;
  Kept kept{};
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      kept.bits[r] |= keep_byte(d, uint32_t(query0) + lane / 4 + 8 * r, uint32_t(key0) / 128,
                                c / 2 * 8 + lane % 4 * 2 + c % 2) << (8 * c);
  return kept;
}

// Whether element e of a tile is kept. The tile is within one group of 128 keys; key0: a multiple of 16.
TF_DEVICE bool keeps(const Kept& kept, int32_t key0, int e) {
  return (kept.bits[e % 4 / 2] >> (uint32_t(key0) % 128 / 16)) >> (8 * (e / 4 % 2 * 2 + e % 2) + e / 8) & 1u;
}

// Sets dropped elements to zero.
template <int E>
TF_DEVICE void drop(const Kept& kept, int32_t key0, float (&p)[E]) {
#pragma unroll
  for (int e = 0; e < E; ++e)
    if (!keeps(kept, key0, e)) p[e] = 0.f;
}

}  // namespace tf::cuda
