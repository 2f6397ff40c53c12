// Multiplies quantised rows by panels of an int8 weight (linear_int8.hpp).
#pragma once
#include "int8_tiles.hpp"

namespace tf::TF_ISA {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int kInt8Rows = kWidth == 16 ? 12 : 6;  // rows in registers at once: 2 kInt8Rows accumulators
#else
constexpr int kInt8Rows = kWidth == 16 ? 8 : 4;
#endif

#if defined(TF_TILES)
constexpr int64_t kTiledRows = 10;  // with fewer rows, vectors are as fast
#endif

// acc[lane] += the sum of the 4 products u8 x int8 in that lane.
static inline VecI dot4(VecI acc, VecI u, VecI w) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  return bit_cast<VecI>(_mm512_dpbusd_epi32(bit_cast<__m512i>(acc), bit_cast<__m512i>(u), bit_cast<__m512i>(w)));
#elif defined(__AVXVNNI__)
  return bit_cast<VecI>(
      _mm256_dpbusd_avx_epi32(bit_cast<__m256i>(acc), bit_cast<__m256i>(u), bit_cast<__m256i>(w)));
#else
  // Bytes 0 and 2, and 1 and 3, as 16-bit numbers: the instruction that multiplies bytes saturates.
  typedef int16_t VecS __attribute__((vector_size(kWidth * 4)));
  typedef uint16_t VecW __attribute__((vector_size(kWidth * 4)));
  const VecS w_even = bit_cast<VecS>(bit_cast<VecW>(w) << 8) >> 8, w_odd = bit_cast<VecS>(w) >> 8;
  const VecS u_even = bit_cast<VecS>(u & 0x00ff00ff), u_odd = bit_cast<VecS>(bit_cast<VecW>(u) >> 8);
#if defined(__AVX512F__)
  const auto multiply = [](VecS a, VecS b) {
    return bit_cast<VecI>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
  };
#elif defined(__AVX2__)
  const auto multiply = [](VecS a, VecS b) {
    return bit_cast<VecI>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
  };
#elif defined(__SSE2__)
  const auto multiply = [](VecS a, VecS b) {
    typedef short V8 __attribute__((vector_size(16)));
    return bit_cast<VecI>(__builtin_ia32_pmaddwd128(bit_cast<V8>(a), bit_cast<V8>(b)));
  };
#else
  const auto multiply = [](VecS a, VecS b) {
    VecI sums;
    for (int i = 0; i < kWidth; ++i) sums[i] = int32_t(a[2 * i]) * b[2 * i] + int32_t(a[2 * i + 1]) * b[2 * i + 1];
    return sums;
  };
#endif
  return acc + multiply(u_even, w_even) + multiply(u_odd, w_odd);
#endif
}

static inline int32_t load_four(const uint8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}

// out (M, 32) (+)= x (M, 4 depth) times one group of a panel. As many bytes from `ahead` on are prefetched. Rows are
// addressed from every third row.
template <int M, bool First>
static void multiply_group(const Int8Rows& x, const int8_t* w, const int8_t* ahead, int64_t depth, float* out,
                           int64_t ldo) {
  for (int c = 0; c < kPanel; c += 2 * kWidth) {
    VecI acc[M][2] = {};
    const uint8_t* base[(M + 2) / 3];
    const int64_t stride = x.stride, groups = x.groups;
#pragma GCC unroll 4
    for (int i = 0; i < (M + 2) / 3; ++i) base[i] = x.values + 3 * i * stride;
    const int8_t* p = w + 4 * c;
    for (int64_t k = 0; k < depth; ++k, p += 4 * kPanel, ahead += 4 * kPanel) {
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + 64);
      VecI w0, w1;
      __builtin_memcpy(&w0, p, sizeof w0);
      __builtin_memcpy(&w1, p + 4 * kWidth, sizeof w1);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const VecI u = broadcast_i(load_four(base[m / 3] + m % 3 * stride + 4 * k));
        acc[m][0] = dot4(acc[m][0], u, w0);
        acc[m][1] = dot4(acc[m][1], u, w1);
      }
    }
    ahead = w;
    const char* tail = reinterpret_cast<const char*>(w + depth * 4 * kPanel) + c * sizeof(float);
    Vec scales[2], sums[2];
    __builtin_memcpy(scales, tail, sizeof scales);
    __builtin_memcpy(sums, tail + kScaleSlots, sizeof sums);
    const float *zero = x.zero, *scale = x.scale;
    float* to = out + c;
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m, to += ldo, zero += groups, scale += groups) {
      const float z = *zero, s = *scale;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Vec v = group_term(acc[m][i], z, sums[i], s, scales[i]);
        store(to + i * kWidth, First ? v : load(to + i * kWidth) + v);
      }
    }
  }
}

template <int M>
static void multiply_group(int rows, bool first, const Int8Rows& x, const int8_t* w, const int8_t* ahead, int64_t depth,
                           float* out, int64_t ldo) {
  if (rows >= M)
    return first ? multiply_group<M, true>(x, w, ahead, depth, out, ldo)
                 : multiply_group<M, false>(x, w, ahead, depth, out, ldo);
  if constexpr (M > 1) multiply_group<M - 1>(rows, first, x, w, ahead, depth, out, ldo);
}

// out (rows, 32 count), rows ldo apart, = x W^T for the columns from 32 panel on. It goes group by group, so that a
// group of x stays in the L1 cache for all columns.
static inline void multiply_int8(const Int8Weight& w, const Int8Rows& x, int64_t rows, int64_t panel, int64_t count,
                                 float* out, int64_t ldo) {
#if defined(TF_TILES)
  if (rows >= kTiledRows && Int8Tiles::fit(w.in, w.group))
    return Int8Tiles::multiply(w, x, rows, panel, count, out, ldo);
#endif
  const int64_t bytes = int8_panel_bytes(w.in, w.group);
  const int8_t* from = w.panels + panel * bytes;
  for (int64_t k = 0, g = 0; k < w.in; k += w.group, ++g) {
    const int64_t depth = int8_depth(w.in - k < w.group ? w.in - k : w.group) / 4;
    const int64_t size = depth * 4 * kPanel + 2 * kScaleSlots;
    const Int8Rows part{x.values + k, x.scale + g, x.zero + g, x.stride, x.groups};
    for (int64_t p = 0; p < count; ++p) {
      const int8_t* here = from + p * bytes;
      // With few rows, multiplying a group takes less time than loading the next one.
      const int8_t* next = count == 1             ? here + 2 * size
                           : k + w.group < w.in ? here + size
                                                : w.panels + (panel + count + p) * bytes;
      for (int64_t r = 0; r < rows; r += kInt8Rows) {
        const Int8Rows block = from_row(part, r);
        const int left = int(rows - r < kInt8Rows ? rows - r : kInt8Rows);
        if (p == count - 1)  // prefetch the next group's inputs
          for (int m = 0; m < left; ++m)
            for (int64_t c = 0; c < w.group; c += 64)
              __builtin_prefetch(block.values + m * x.stride + w.group + c);
        multiply_group<kInt8Rows>(left, g == 0, block, here, r ? here : next, depth, out + r * ldo + p * kPanel, ldo);
      }
    }
    from += size;
  }
}

}  // namespace tf::TF_ISA
