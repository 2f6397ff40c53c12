// The product of a few rows with one panel of a weight (linear.hpp).
#pragma once
#include "linear.hpp"
#include "simd.hpp"

namespace tf::TF_ISA {

constexpr int kRows = kWidth == 16 ? 8 : 6;  // rows in registers at once: 2 kRows accumulators
constexpr int64_t kRun = 32;                 // products per running sum: long sums lose digits

// Two vectors of a panel's row of 32: columns from g and from 16 + g.
static inline void load_pair(const float* w, int g, Vec& low, Vec& high) {
  low = load(w + g);
  high = load(w + 16 + g);
}
static inline void load_pair(const bf16* w, int g, Vec& low, Vec& high) {
  VecU words;
  __builtin_memcpy(&words, w + 2 * g, sizeof words);
  low = bit_cast<Vec>(words << 16);
  high = bit_cast<Vec>(words & 0xffff0000u);
}
static inline Vec widen(const int8_t* w) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  return bit_cast<Vec>(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes)));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w));
  return bit_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = float(w[i]);
  return v;
#endif
}
static inline void load_pair(const int8_t* w, int g, Vec& low, Vec& high) {
  low = widen(w + g);
  high = widen(w + 16 + g);
}

// Elements per panel, scales included.
template <class W>
constexpr int64_t panel_slots(int64_t in) {
  return in * kPanel + (sizeof(W) == 1 ? kScaleSlots : 0);
}

// out (M, 32) = x (M, in) times one panel, before the scales of int8, in running sums of at most `run` products. Fetch:
// memory `ahead` of the panel is prefetched.
template <int M, bool Fetch = true, class W>
static void multiply_panel(const float* x, int64_t ldx, const W* panel, int64_t in, int64_t run, int64_t ahead,
                           float* out) {
  for (int g = 0; g < 16; g += kWidth) {
    for (int64_t begin = 0; begin < in; begin += run) {
      const int64_t end = begin + run < in ? begin + run : in;
      Vec low[M] = {}, high[M] = {};
      for (int64_t k = begin; k < end; ++k) {
        const W* w = panel + k * kPanel;
        if (Fetch) __builtin_prefetch(w + ahead);
        if (Fetch && sizeof(W) == 4) __builtin_prefetch(w + ahead + 16);
        Vec w0, w1;
        load_pair(w, g, w0, w1);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const Vec v = broadcast(x[m * ldx + k]);
          low[m] = fma(v, w0, low[m]);
          high[m] = fma(v, w1, high[m]);
        }
      }
      for (int m = 0; m < M; ++m) {
        float *left = out + m * kPanel + g, *right = left + 16;
        store(left, begin ? load(left) + low[m] : low[m]);
        store(right, begin ? load(right) + high[m] : high[m]);
      }
    }
  }
}

template <int M, class W>
static void multiply_panels(int rows, const float* x, int64_t ldx, const W* panel, int64_t in, int64_t ahead,
                            float* out) {
  if (rows == M) return multiply_panel<M>(x, ldx, panel, in, kRun, ahead, out);
  if constexpr (M > 1) multiply_panels<M - 1>(rows, x, ldx, panel, in, ahead, out);
}

// out (rows, 32) = x (rows, in) times one panel; at most kRows rows. first: the panel's first block of rows. Later
// blocks find the panel in the cache, and prefetch the next one.
template <class W>
static void multiply_rows(int rows, const float* x, int64_t ldx, const W* panel, int64_t in, bool first, float* out) {
  multiply_panels<kRows>(rows, x, ldx, panel, in, first ? int64_t(4096 / sizeof(W)) : panel_slots<W>(in), out);
  if constexpr (sizeof(W) == 1) {
    const char* scales = reinterpret_cast<const char*>(panel + in * kPanel);
    for (int64_t c = 0; c < kPanel; c += kWidth) {
      Vec scale;
      __builtin_memcpy(&scale, scales + c * int64_t(sizeof(float)), sizeof scale);
      for (int m = 0; m < rows; ++m) store(out + m * kPanel + c, load(out + m * kPanel + c) * scale);
    }
  }
}

}  // namespace tf::TF_ISA
