// A tile of scores between the two matrix products, forward and backward.
//
// A tile is transposed, (keys, queries), with one lane per query: the softmax of kWidth queries needs no sum across
// lanes, and masks by position are one comparison per key.
#pragma once
#include "attention.hpp"
#include "attention_tile.hpp"
#include "parallel.hpp"
#include "philox.hpp"

namespace tf::TF_ISA {

constexpr int64_t kQueries = kAttentionQueries, kKeys = 128;  // per tile; kKeys is also a dropout counter's group
constexpr double kLog2e = 1.4426950408889634;

// 2^x for x <= 0, 0 for -inf, within 3e-6: to be rounded to bf16.
static inline Vec exp2_for_bf16(Vec x) {
#if defined(__AVX512F__)
  const Vec r = bit_cast<Vec>(_mm512_maskz_reduce_ps(0xffff, bit_cast<__m512>(x), 9));  // x - floor(x); 0 for -inf
  Vec p = broadcast(0.0134267015f);
  p = fma(p, r, broadcast(0.0522424467f));
  p = fma(p, r, broadcast(0.241280213f));
  p = fma(p, r, broadcast(0.693044841f));
  p = fma(p, r, broadcast(1.f));
  return bit_cast<Vec>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(p), bit_cast<__m512>(x)));  // p * 2^floor(x)
#else
  return exp2(x);
#endif
}

struct mask8 {
  uint8_t alive;
};
static inline float to_float(mask8 m) { return m.alive ? 0.f : -INFINITY; }
static inline Vec load(const mask8* p) {
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, VecU) == VecU{} ? broadcast(-INFINITY) : Vec{};
}

// Row r of head h of sequence b.
template <class T, class Data>
static inline T* row_of(Data* data, const RowStrides& strides, int64_t b, int64_t h, int64_t r) {
  return static_cast<T*>(data) + b * strides.batch + h * strides.head + r * strides.row;
}

// Queries [q0, q0 + count) of head h of sequence b, `lanes` wide (a multiple of kPairColumns).
struct Tile {
  int64_t b, h, q0, count, lanes;
  int64_t offset;  // position of query i is i + offset
  int64_t keys;    // of the sequence
};

static inline Tile make_tile(const Attention& a, int64_t b, int64_t h, int64_t q0) {
  const int64_t left = a.query_lengths[b] - q0, count = left < kQueries ? left : kQueries;
  const int64_t offset = a.bottom_right ? a.key_lengths[b] - a.query_lengths[b] : 0;
  return {b, h, q0, count, round_up(count, kPairColumns), offset, a.key_lengths[b]};
}

// Keys that some query of the tile can see: [begin, end), empty when end <= begin.
static inline void key_range(const Attention& a, const Tile& t, int64_t& begin, int64_t& end) {
  begin = 0;
  end = t.keys;
  if (a.window_left >= 0) {
    const int64_t first = t.q0 + t.offset - a.window_left;
    if (first > begin) begin = first;
  }
  if (a.window_right >= 0) {
    const int64_t past = t.q0 + t.count + t.offset + a.window_right;
    if (past < end) end = past;
  }
}
// The end of the group of kKeys that j belongs to, at most `end`.
static inline int64_t block_end(int64_t j, int64_t end) {
  const int64_t next = (j / kKeys + 1) * kKeys;
  return next < end ? next : end;
}

// Whether only the scale is between product and exponential. A scale that is not positive would change the sign of -inf
// and turn the maximum into a minimum.
static inline bool folds_scale(const Attention& a) {
  return a.scale > 0. && a.bias_type == BiasType::none && !a.mask && !a.relative_bias && a.softcap == 0.f;
}
// The factor from differences of scores to exponents of two.
static inline float log2_factor(const Attention& a) { return float(folds_scale(a) ? a.scale * kLog2e : kLog2e); }

// f(c, Vectors<N>{}) for the N vectors of queries from c on, which together use the registers well.
template <int N>
struct Vectors {
  static constexpr int kCount = N;
};
template <class F>
static inline void for_vectors(int64_t lanes, const F& f) {
  int64_t c = 0;
  if constexpr (kWidth == 16) {
    for (; c + 4 * kWidth <= lanes; c += 4 * kWidth) f(c, Vectors<4>{});
    for (; c + 2 * kWidth <= lanes; c += 2 * kWidth) f(c, Vectors<2>{});
  }
  for (; c < lanes; c += kWidth) f(c, Vectors<1>{});
}

// use(x, v) for every vector of a tile: v = base[(c + lane) * si + j * sj] is for the elements from x = j * lanes + c.
template <class T, class Use>
static inline void for_each_vector(const T* base, int64_t si, int64_t sj, const Tile& t, int64_t keys,
                                   const Use& use) {
  if (si == 0) {
    for (int64_t j = 0; j < keys; ++j) {
      const Vec v = broadcast(to_float(base[j * sj]));
      for (int64_t c = 0; c < t.lanes; c += kWidth) use(j * t.lanes + c, v);
    }
    return;
  }
  for (int64_t c = 0; c < t.lanes; c += kWidth)
    for (int64_t j = 0; j < keys; j += kWidth) {
      Vec tile[kWidth];
      if (sj == 1 && c + kWidth <= t.count && j + kWidth <= keys) {
        for (int64_t i = 0; i < kWidth; ++i) tile[i] = load(base + (c + i) * si + j);
        transpose(tile);
        for (int64_t n = 0; n < kWidth; ++n) use((j + n) * t.lanes + c, tile[n]);
        continue;
      }
      for (int64_t i = 0; i < kWidth; ++i) {
        const T* row = base + (c + i) * si + j * sj;
        if (c + i >= t.count) {
          tile[i] = Vec{};
        } else if (sj == 1) {
          tile[i] = load_some(row, keys - j);
        } else {
          float values[kWidth];
          for (int64_t n = 0; n < kWidth; ++n) values[n] = j + n < keys ? to_float(row[n * sj]) : 0.f;
          tile[i] = load(values);
        }
      }
      transpose(tile);
      for (int64_t n = 0; n < kWidth && j + n < keys; ++n) use((j + n) * t.lanes + c, tile[n]);
    }
}

template <class Use>
static inline void for_each_bias(const Attention& a, const Tile& t, int64_t j0, int64_t keys, const Use& use) {
  const int64_t* s = a.bias_strides;
  const int64_t at = t.b * s[0] + t.h * s[1] + t.q0 * s[2] + j0 * s[3];
  if (a.bias_type == BiasType::f32)
    for_each_vector(static_cast<const float*>(a.bias) + at, s[2], s[3], t, keys, use);
  else if (a.bias_type == BiasType::bf16)
    for_each_vector(static_cast<const bf16*>(a.bias) + at, s[2], s[3], t, keys, use);
  else
    for_each_vector(static_cast<const f16*>(a.bias) + at, s[2], s[3], t, keys, use);
}

// In a head's row of biases per distance, the start of the vector for key j and the first kWidth queries. Distances
// fall as positions of queries rise: the vector is in reverse order, and that of the next queries is before it.
template <class Float>
static inline Float* relative_row(const Attention& a, const Tile& t, int64_t j, Float* row) {
  return row + a.reach + j - (t.q0 + t.offset) - (kWidth - 1);
}

// Products of keys j0.. with the tile's queries -> scores, in place: scale, softcap, biases and mask.
// slope, if not null: d score / d (scaled product), for the backward of a softcap.
static inline void finish_scores(const Attention& a, const Tile& t, int64_t j0, int64_t keys, float* scores,
                                 float* slope) {
  const int64_t size = keys * t.lanes;
  const bool bias = a.bias_type != BiasType::none;
  float scale = float(a.scale);
  if (a.softcap != 0.f) {
    const float inner = float(a.scale / a.softcap);
    for (int64_t x = 0; x < size; x += kWidth) {
      const Vec y = tanh_accurate(load(scores + x) * inner);
      store(scores + x, y * a.softcap);
      if (slope) store(slope + x, 1.f - y * y);
    }
    scale = 1.f;
  } else if (!bias) {
    for (int64_t x = 0; x < size; x += kWidth) store(scores + x, load(scores + x) * scale);
  }
  if (bias)
    for_each_bias(a, t, j0, keys, [&](int64_t x, Vec v) {
      store(scores + x, fma(load(scores + x), broadcast(scale), v));
    });
  if (a.relative_bias) {
    for (int64_t j = 0; j < keys; ++j) {
      const float* row = relative_row(a, t, j0 + j, a.relative_bias + t.h * a.relative_bias_stride);
      float* s = scores + j * t.lanes;
      for (int64_t c = 0; c < t.lanes; c += kWidth) store(s + c, load(s + c) + reversed(load(row - c)));
    }
  }
  if (a.mask) {
    const int64_t* s = a.mask_strides;
    const int64_t at = t.b * s[0] + t.h * s[1] + t.q0 * s[2] + j0 * s[3];
    for_each_vector(reinterpret_cast<const mask8*>(a.mask) + at, s[2], s[3], t, keys, [&](int64_t x, Vec dead) {
      store(scores + x, dead < broadcast(0.f) ? dead : load(scores + x));
    });
  }
}

// Sets scores outside the window to -inf. Returns at once for blocks that no edge crosses.
static inline void mask_edges(const Attention& a, const Tile& t, int64_t j0, int64_t keys, float* scores) {
  const int64_t first = t.q0 + t.offset, last = first + t.count - 1, no_limit = INT32_MAX;
  const bool right = a.window_right >= 0 && j0 + keys - 1 > first + a.window_right;
  const bool left = a.window_left >= 0 && j0 < last - a.window_left;
  if (!right && !left) return;
  for (int64_t j = 0; j < keys; ++j) {
    // lane's position first + lane must lie in [j - window_right, j + window_left]
    int64_t low = right ? j0 + j - a.window_right - first : 0;
    int64_t high = left ? j0 + j + a.window_left - first : no_limit;
    if (low <= 0 && high >= t.lanes - 1) continue;
    if (low > t.lanes) low = t.lanes;
    if (high > no_limit) high = no_limit;
    if (high < -1) high = -1;
    const VecI lows = broadcast_i(int32_t(low)), highs = broadcast_i(int32_t(high));
    float* s = scores + j * t.lanes;
    for (int64_t c = 0; c < t.lanes; c += kWidth) {
      const VecI lane = bit_cast<VecI>(iota_u(uint32_t(c)));
      Vec v = load(s + c);
      v = lane < lows ? broadcast(-INFINITY) : v;
      v = lane > highs ? broadcast(-INFINITY) : v;
      store(s + c, v);
    }
  }
}

// One thread if the call has fewer products than `least`: it ends before a second thread would wake up.
static inline int64_t threads_for(const Attention& a, double least) {
  double work = 0;
  for (int64_t b = 0; b < a.batch; ++b)
    work += double(a.query_lengths[b]) * double(a.key_lengths[b]) * double(a.dim * a.heads);
  return work < least ? 1 : tf_num_threads();
}

// Calls use(row, c, factor): factor is 0 or keep_scale, for key j0 + row and queries q0 + c .. q0 + c + kWidth. The
// keys may span several groups of kKeys.
template <class Use>
static inline void for_each_dropout(const Attention& a, const Tile& t, int64_t j0, int64_t keys, const Use& use) {
  const uint32_t bh = uint32_t(t.b * a.heads + t.h);
  const VecU threshold = broadcast_u(a.dropout.threshold);
  const Vec keep = broadcast(a.dropout.keep_scale), zero = broadcast(0.f);
  const uint32_t first = uint32_t(j0 / kKeys) * 16, past = uint32_t((j0 + keys - 1) / kKeys + 1) * 16;
  for (uint32_t m = first; m < past; ++m) {
    const int64_t start = j0 - int64_t(m / 16) * kKeys;
    for (int64_t c = 0; c < t.lanes; c += kWidth) {
      const PhiloxWords r = philox(broadcast_u(m), iota_u(uint32_t(t.q0 + c)), broadcast_u(bh),
                                   broadcast_u(uint32_t(a.dropout.offset)), a.dropout.seed);
#pragma GCC unroll 8
      for (int lane = 0; lane < 8; ++lane) {
        const int64_t row = lane * 16 + int64_t(m % 16) - start;
        if (row < 0 || row >= keys) continue;
        const VecU bits = lane < 4 ? r.w[lane] & broadcast_u(0xffffu) : r.w[lane - 4] >> 16;
        use(row, c, select_u_ge(bits, threshold, keep, zero));
      }
    }
  }
}

}  // namespace tf::TF_ISA
