// Quantises rows in groups, to u8 with a scale and a zero point per group (linear_int8.hpp).
#pragma once
#include "linear_int8.hpp"
#include "simd.hpp"

namespace tf::TF_ISA {

typedef uint8_t VecB __attribute__((vector_size(kWidth)));

// v after rounding: the compiler contracts nothing across it.
static inline Vec rounded(Vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  volatile Vec kept = v;
  v = kept;
#endif
  return v;
}

static inline VecI to_nearest(Vec v) {
#if defined(__AVX512F__)
  return bit_cast<VecI>(_mm512_maskz_cvtps_epi32(0xffff, bit_cast<__m512>(v)));
#elif defined(__AVX2__)
  return bit_cast<VecI>(_mm256_cvtps_epi32(bit_cast<__m256>(v)));
#else
  return __builtin_convertvector((rounded(v) + 12582912.f) - 12582912.f, VecI);  // |v| < 2^22
#endif
}

// Stores v clamped to 0..255, as bytes.
static inline void store_clamped(uint8_t* to, VecI v) {
#if defined(__AVX512F__)
  const __m512i least = _mm512_maskz_max_epi32(0xffff, bit_cast<__m512i>(v), bit_cast<__m512i>(VecI{}));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtusepi32_epi8(0xffff, least));
#elif defined(__AVX2__)
  const __m256i words = _mm256_packs_epi32(bit_cast<__m256i>(v), bit_cast<__m256i>(v));
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const int32_t low = _mm_cvtsi128_si32(_mm256_castsi256_si128(bytes));
  const int32_t high = _mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1));
  __builtin_memcpy(to, &low, 4);
  __builtin_memcpy(to + 4, &high, 4);
#else
  v = v < 0 ? VecI{} : v;
  v = v > 255 ? broadcast_i(255) : v;
  const VecB bytes = __builtin_convertvector(v, VecB);
  __builtin_memcpy(to, &bytes, sizeof bytes);
#endif
}

static inline Int8Rows from_row(const Int8Rows& x, int64_t row) {
  return {x.values + row * x.stride, x.scale + row * x.groups, x.zero + row * x.groups, x.stride, x.groups};
}

// A group's term of a product, from the exact sum of u q, the row's zero point and scale, and the columns' scales and
// sums of q.
static inline Vec group_term(VecI exact, float zero, Vec sums, float scale, Vec scales) {
  return rounded((__builtin_convertvector(exact, Vec) - zero * sums) * scale * scales);
}

// Lane i of the result: op over the lanes of v[i], for kWidth vectors.
template <int Step, class F>
static inline void fold_by(Vec* v, const F& op) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; i += 2 * Step)
    v[i] = op(lower_half<Step>(v[i], v[i + Step]), upper_half<Step>(v[i], v[i + Step]));
}
template <class F>
static inline Vec fold(Vec* v, const F& op) {
  fold_by<1>(v, op);
  fold_by<2>(v, op);
  if constexpr (kWidth > 4) fold_by<4>(v, op);
  if constexpr (kWidth > 8) fold_by<8>(v, op);
  return v[0];
}

static inline VecI larger(VecI a, VecI b) {
#if defined(__AVX512F__)
  return bit_cast<VecI>(_mm512_maskz_max_epi32(0xffff, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecI>(_mm256_max_epi32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return a > b ? a : b;
#endif
}

// The smallest and largest value of a group, 0 included. size: the bits of the largest |v|, also if v is not finite;
// integers leave the multipliers to the products.
struct Reach {
  Vec low = {}, high = {};
  VecI size = {};
  inline void add(Vec v) {
    low = min(v, low);
    high = max(v, high);
    size = larger(size, bit_cast<VecI>(v) & 0x7fffffff);
  }
};

// x (n,) -> u8: nearest(x * inverse) + zero, with an integer zero. May write up to one vector past the end.
template <class T>
static inline void store_quantized(const T* x, int64_t n, float inverse, float zero, uint8_t* to) {
  const VecI shift = broadcast_i(int32_t(zero));
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c + 4 * kWidth <= n; c += 4 * kWidth) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = bit_cast<__m512i>(to_nearest(load(x + c + i * kWidth) * inverse) + shift);
    const __m512i low = _mm512_packus_epi32(v[0], v[1]), high = _mm512_packus_epi32(v[2], v[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to + c, _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_packus_epi16(low, high)));
  }
#endif
  for_columns(n - c, [&](int64_t i, auto part) {
    store_clamped(to + c + i, to_nearest(load(x + c + i, part) * inverse) + shift);
  });
}

// Quantises `count` groups: reach_of(i) returns the Reach of group i, then write(i, scale, zero, 1 / scale) is called.
// kWidth groups go together, to hide the latency of computing a scale. A value that is not finite makes scale and
// results NaN.
template <class Find, class Write>
static inline void quantize_groups(int64_t count, const Find& reach_of, const Write& write) {
  for (int64_t begin = 0; begin < count; begin += kWidth) {
    const int64_t here = count - begin < kWidth ? count - begin : kWidth;
    Vec lows[kWidth] = {}, highs[kWidth] = {}, odds[kWidth] = {};
    for (int64_t i = 0; i < here; ++i) {
      const Reach found = reach_of(begin + i);
      lows[i] = found.low;
      highs[i] = found.high;
      odds[i] = bit_cast<Vec>(found.size) * 0.f;  // NaN where a value is not finite
    }
    const Vec least = fold(lows, [](Vec a, Vec b) { return min(a, b); });
    const Vec range = fold(highs, [](Vec a, Vec b) { return max(a, b); }) - least;
    const Vec odd = fold(odds, [](Vec a, Vec b) { return a + b; });
    const auto some = range > broadcast(1e-30f);
    const Vec inverse = some ? 255.f / range : Vec{};
    const Vec zero = __builtin_convertvector(to_nearest(-least * inverse), Vec);
    float inverses[kWidth], zeros[kWidth], scales[kWidth];
    store(inverses, inverse);
    store(zeros, zero >= Vec{} ? zero : Vec{});  // 0 also where least is not finite
    store(scales, (some ? range / 255.f : Vec{}) + odd);
    for (int64_t i = 0; i < here; ++i) write(begin + i, scales[i], zeros[i], inverses[i]);
  }
}

// Quantises x (rows, n), rows `stride` apart, to u8.
template <class T>
static inline void quantize_rows(const T* x, int64_t stride, int64_t rows, int64_t n, int64_t group, const Int8Rows& to,
                                 int64_t row) {
  const int64_t groups = int8_groups(n, group);
  const Int8Rows r = from_row(to, row);
  const auto length = [&](int64_t g) { return n - g * group < group ? n - g * group : group; };
  quantize_groups(
      rows * groups,
      [&](int64_t i) {
        const int64_t m = i / groups, g = i % groups;
        const T* from = x + m * stride + g * group;
        Reach found;
        for_columns(length(g), [&](int64_t c, auto part) { found.add(load(from + c, part)); });
        return found;
      },
      [&](int64_t i, float scale, float zero, float inverse) {
        const int64_t m = i / groups, g = i % groups;
        r.scale[m * r.groups + g] = scale;
        r.zero[m * r.groups + g] = zero;
        store_quantized(x + m * stride + g * group, length(g), inverse, zero, r.values + m * r.stride + g * group);
      });
}

}  // namespace tf::TF_ISA
