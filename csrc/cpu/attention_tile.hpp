// Copies tiles between tensors and scratch: transposed, widened to float, or as pairs of bf16 in a word.
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
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & Step) continue;
    const Vec a = rows[i], b = rows[i + Step];
    rows[i] = lower_half<Step>(a, b);
    rows[i + Step] = upper_half<Step>(a, b);
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
typedef uint16_t Halves __attribute__((vector_size(kWidth * 4)));

// Words of (even[i], odd[i]): the first kWidth, or those from kWidth on.
static inline Vec interleave(Halves even, Halves odd, int from) {
  Halves lanes;
  for (int i = 0; i < 2 * kWidth; ++i) lanes[i] = uint16_t(from + i / 2 + i % 2 * 2 * kWidth);
  return bit_cast<Vec>(__builtin_shuffle(even, odd, lanes));
}
static inline Vec pair(Vec even, Vec odd) {
#if defined(__AVX512BF16__)
  const Halves both = bit_cast<Halves>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(odd), bit_cast<__m512>(even)));
  Halves lanes;
  for (int i = 0; i < 2 * kWidth; ++i) lanes[i] = uint16_t(i / 2 + i % 2 * kWidth);
  return bit_cast<Vec>(__builtin_shuffle(both, lanes));
#else
  return bit_cast<Vec>(__builtin_convertvector(to_bf16_bits(even), VecU) |
                       (__builtin_convertvector(to_bf16_bits(odd), VecU) << 16));
#endif
}

// Two vectors of neighbouring values.
static inline void store_two(bf16* p, Vec low, Vec high) {
#if defined(__AVX512BF16__)
  const auto both = _mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low));
  __builtin_memcpy(p, &both, sizeof both);
#else
  store(p, low);
  store(p + kWidth, high);
#endif
}

// n values at p as words, at most 2 * kWidth; an odd one is paired with zero.
static inline Vec load_words(const bf16* p, int64_t n) {
#if defined(__AVX512BW__)
  const __mmask32 mask = n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1;
  return bit_cast<Vec>(_mm512_maskz_loadu_epi16(mask, p));
#else
  Vec words = Vec{};
  if (n >= 2 * kWidth)
    __builtin_memcpy(&words, p, sizeof words);
  else if (n > 0)
    __builtin_memcpy(&words, p, size_t(n) * 2);
  return words;
#endif
}

// dst[r / 2 * ld + c] = (src[r][c], src[r + 1][c]); a missing last row counts as zeros.
static inline void pair_rows(const bf16* src, int64_t stride, int64_t rows, int64_t columns, float* dst, int64_t ld) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < columns; c += 2 * kWidth) {
      const bf16* p = src + r * stride + c;
      const Halves even = bit_cast<Halves>(load_words(p, columns - c));
      const Halves odd = r + 1 < rows ? bit_cast<Halves>(load_words(p + stride, columns - c)) : Halves{};
      float* out = dst + r / 2 * ld + c;
      store(out, interleave(even, odd, 0));
      if (c + kWidth < columns) store(out + kWidth, interleave(even, odd, kWidth));
    }
}

// The same, transposed: dst[c * ld + r / 2], with zeros up to a multiple of kWidth words.
static inline void pair_rows_transposed(const bf16* src, int64_t stride, int64_t rows, int64_t columns, float* dst,
                                        int64_t ld) {
  for (int64_t r = 0; r < rows; r += 2 * kWidth)
    for (int64_t c = 0; c < columns; c += 2 * kWidth) {
      Vec low[kWidth], high[kWidth];
      const bf16* p = src + r * stride + c;
      for (int64_t i = 0; i < kWidth; ++i, p += 2 * stride) {
        const int64_t left = rows - r - 2 * i;
        const Halves even = left > 0 ? bit_cast<Halves>(load_words(p, columns - c)) : Halves{};
        const Halves odd = left > 1 ? bit_cast<Halves>(load_words(p + stride, columns - c)) : Halves{};
        low[i] = interleave(even, odd, 0);
        high[i] = interleave(even, odd, kWidth);
      }
      transpose(low);
      transpose(high);
      float* out = dst + c * ld + r / 2;
      for (int64_t i = 0; i < kWidth; ++i) {
        if (c + i < columns) store(out + i * ld, low[i]);
        if (c + kWidth + i < columns) store(out + (kWidth + i) * ld, high[i]);
      }
    }
}

// dst[r * ld + c] = (src[r][2c], src[r][2c + 1]); an odd last column is paired with zero. ld is a multiple of kWidth.
static inline void load_pair_rows(const bf16* src, int64_t stride, int64_t rows, int64_t columns, float* dst,
                                  int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; 2 * c < columns; c += kWidth)
      store(dst + r * ld + c, load_words(src + r * stride + 2 * c, columns - 2 * c));
}

// Words of (src[r][2c], src[r][2c + 1]), transposed: dst[c * ld + r]; an odd last column is paired with zero.
static inline void load_pairs_transposed(const bf16* src, int64_t stride, int64_t rows, int64_t columns, float* dst,
                                         int64_t ld) {
  const int64_t words = (columns + 1) / 2;
  for (int64_t r = 0; r < ld; r += kWidth)
    for (int64_t c = 0; c < words; c += kWidth) {
      Vec tile[kWidth];
      const bf16* p = src + r * stride + 2 * c;
      if (r + kWidth <= rows && 2 * (c + kWidth) <= columns) {
        for (int i = 0; i < kWidth; ++i) __builtin_memcpy(&tile[i], p + i * stride, sizeof tile[i]);
      } else {
        for (int i = 0; i < kWidth; ++i) tile[i] = r + i < rows ? load_words(p + i * stride, columns - 2 * c) : Vec{};
      }
      transpose(tile);
      for (int i = 0; i < kWidth && c + i < words; ++i) store(dst + (c + i) * ld + r, tile[i]);
    }
}

// The same as store_transposed, two columns at a time.
static inline void store_pairs_transposed(const float* src, int64_t ld, const float* factor, bf16* dst, int64_t stride,
                                          int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    const Vec f = load(factor + r);
    for (int64_t c = 0; c < columns; c += 2 * kWidth) {
      Vec tile[kWidth];
      const float* p = src + c * ld + r;
      const int64_t left = columns - c < 2 * kWidth ? columns - c : 2 * kWidth;
      for (int i = 0; i < kWidth; ++i, p += 2 * ld)
        tile[i] = 2 * i < left ? pair(load(p) * f, 2 * i + 1 < left ? load(p + ld) * f : Vec{}) : Vec{};
      transpose(tile);
      bf16* out = dst + r * stride + c;
      if (r + kWidth <= rows && left == 2 * kWidth) {
        for (int i = 0; i < kWidth; ++i) __builtin_memcpy(out + i * stride, &tile[i], sizeof tile[i]);
        continue;
      }
      for (int i = 0; i < kWidth && r + i < rows; ++i) __builtin_memcpy(out + i * stride, &tile[i], size_t(left) * 2);
    }
  }
}

}  // namespace tf::TF_ISA
