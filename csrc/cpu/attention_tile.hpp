// Copies tiles between tensors and scratch: transposed, widened to float, or as pairs of bf16 for vdpbf16ps.
#pragma once
#include "attention_gemm.hpp"

namespace tf::TF_ISA {

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Pieces of one allocation, each aligned to a cache line.
struct Arena {
  char* next;
  static int64_t bytes(int64_t floats) { return round_up(floats * 4, 64); }
  float* take(int64_t floats) {
    float* p = reinterpret_cast<float*>(next);
    next += bytes(floats);
    return p;
  }
};

template <int Step>
static inline void exchange(Vec* rows) {
  VecI low, high;  // lane l of the lower row: l & Step ? upper[l - Step] : lower[l]
  for (int l = 0; l < kWidth; ++l) {
    low[l] = l & Step ? kWidth + l - Step : l;
    high[l] = l & Step ? kWidth + l : l + Step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & Step) continue;
    const Vec a = rows[i], b = rows[i + Step];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + Step] = __builtin_shuffle(a, b, high);
  }
}
static inline Vec reversed(Vec v) {
  VecI lanes;
  for (int l = 0; l < kWidth; ++l) lanes[l] = kWidth - 1 - l;
  return __builtin_shuffle(v, lanes);
}
static inline void transpose(Vec* rows) {  // kWidth x kWidth
  exchange<1>(rows);
  exchange<2>(rows);
  if constexpr (kWidth > 4) exchange<4>(rows);
  if constexpr (kWidth > 8) exchange<8>(rows);
}

template <class T>
static inline Vec load_some(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : n <= 0 ? Vec{} : load_partial(p, int(n));
}
template <class T>
static inline void store_some(T* p, Vec v, int64_t n) {
  n >= kWidth ? store(p, v) : store_partial(p, v, int(n));
}

// dst[c * ld + r] = src[r * stride + c] for r < rows (zeros up to ld, a multiple of kWidth), c < columns.
template <class T>
static void load_transposed(const T* src, int64_t stride, int64_t rows, int64_t columns, float* dst, int64_t ld) {
  for (int64_t r = 0; r < ld; r += kWidth)
    for (int64_t c = 0; c < columns; c += kWidth) {
      Vec tile[kWidth];
      if (r + kWidth <= rows && c + kWidth <= columns) {
        for (int i = 0; i < kWidth; ++i) tile[i] = load(src + (r + i) * stride + c);
        transpose(tile);
        for (int i = 0; i < kWidth; ++i) store(dst + (c + i) * ld + r, tile[i]);
        continue;
      }
      for (int i = 0; i < kWidth; ++i)
        tile[i] = r + i < rows ? load_some(src + (r + i) * stride + c, columns - c) : Vec{};
      transpose(tile);
      for (int i = 0; i < kWidth && c + i < columns; ++i) store(dst + (c + i) * ld + r, tile[i]);
    }
}

// dst[r * stride + c] = src[c * ld + r] * factor[r]; src has `columns` rows, rounded up to kWidth.
template <class T>
static void store_transposed(const float* src, int64_t ld, const float* factor, T* dst, int64_t stride, int64_t rows,
                             int64_t columns) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    const Vec f = load(factor + r);
    for (int64_t c = 0; c < columns; c += kWidth) {
      Vec tile[kWidth];
      for (int i = 0; i < kWidth; ++i) tile[i] = load(src + (c + i) * ld + r) * f;
      transpose(tile);
      if (r + kWidth <= rows && c + kWidth <= columns) {
        for (int i = 0; i < kWidth; ++i) store(dst + (r + i) * stride + c, tile[i]);
        continue;
      }
      for (int i = 0; i < kWidth && r + i < rows; ++i) store_some(dst + (r + i) * stride + c, tile[i], columns - c);
    }
  }
}

// dst[r * ld + c] = src[r * stride + c], zeros from columns up to ld.
template <class T>
static void load_rows(const T* src, int64_t stride, int64_t rows, int64_t columns, float* dst, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < ld; c += kWidth) store(dst + r * ld + c, load_some(src + r * stride + c, columns - c));
}
template <class T>
static void store_rows(const float* src, int64_t ld, float factor, T* dst, int64_t stride, int64_t rows,
                       int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += kWidth)
      store_some(dst + r * stride + c, load(src + r * ld + c) * factor, columns - c);
}
template <class T>
static void zero_rows(T* dst, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) __builtin_memset(dst + r * stride, 0, size_t(columns) * sizeof(T));
}

// ---- pairs of bf16 in one word ---------------------------------------------------------------------
static inline VecU load_bits(const bf16* p, int64_t n) {
  VecH h{};
  if (n >= kWidth)
    __builtin_memcpy(&h, p, sizeof h);
  else
    for (int64_t i = 0; i < n; ++i) h[i] = p[i].bits;
  return __builtin_convertvector(h, VecU);
}
static inline Vec pair(VecU even, VecU odd) { return bit_cast<Vec>(even | (odd << 16)); }
static inline Vec pair(Vec even, Vec odd) {
  return pair(__builtin_convertvector(to_bf16_bits(even), VecU), __builtin_convertvector(to_bf16_bits(odd), VecU));
}

// dst[r / 2 * ld + c] = (src[r][c], src[r + 1][c]); a missing last row counts as zeros.
static inline void pair_rows(const bf16* src, int64_t stride, int64_t rows, int64_t columns, float* dst, int64_t ld) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < columns; c += kWidth) {
      const VecU even = load_bits(src + r * stride + c, columns - c);
      const VecU odd = r + 1 < rows ? load_bits(src + (r + 1) * stride + c, columns - c) : VecU{};
      store(dst + r / 2 * ld + c, pair(even, odd));
    }
}

// The words of load_pairs_transposed, not transposed: dst[r * ld + c].
static inline void load_pair_rows(const bf16* src, int64_t stride, int64_t rows, int64_t columns, float* dst,
                                  int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    if (columns % 2) dst[r * ld + columns / 2] = 0.f;
    __builtin_memcpy(dst + r * ld, src + r * stride, size_t(columns) * 2);
  }
}

// Words of (src[r][2c], src[r][2c + 1]), transposed: dst[c * ld + r]; an odd last column is paired with zero.
static inline void load_pairs_transposed(const bf16* src, int64_t stride, int64_t rows, int64_t columns, float* dst,
                                         int64_t ld) {
  const int64_t words = (columns + 1) / 2;
  for (int64_t r = 0; r < ld; r += kWidth)
    for (int64_t c = 0; c < words; c += kWidth) {
      Vec tile[kWidth];
      if (r + kWidth <= rows && 2 * (c + kWidth) <= columns) {
        for (int i = 0; i < kWidth; ++i) __builtin_memcpy(&tile[i], src + (r + i) * stride + 2 * c, kWidth * 4);
        transpose(tile);
        for (int i = 0; i < kWidth; ++i) store(dst + (c + i) * ld + r, tile[i]);
        continue;
      }
      for (int i = 0; i < kWidth; ++i) {
        tile[i] = Vec{};
        if (r + i >= rows) continue;
        const int64_t left = (columns - 2 * c) * 2;
        __builtin_memcpy(&tile[i], src + (r + i) * stride + 2 * c, left < kWidth * 4 ? size_t(left) : kWidth * 4);
      }
      transpose(tile);
      for (int i = 0; i < kWidth && c + i < words; ++i) store(dst + (c + i) * ld + r, tile[i]);
    }
}

}  // namespace tf::TF_ISA
