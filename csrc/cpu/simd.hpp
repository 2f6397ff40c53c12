// One vector type per instruction set, from GCC's vector extensions: 16, 8 or 4 floats. Everything is static and inside
// the instruction set's own namespace, so that the linker cannot merge two builds.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "types.hpp"

namespace tf::TF_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecI __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecU __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecH __attribute__((vector_size(kWidth * 2)));
typedef uint64_t VecU64 __attribute__((vector_size(kWidth * 4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline Vec broadcast(float x) { return x - Vec{}; }
static inline VecU broadcast_u(uint32_t x) { return x - VecU{}; }
static inline VecI broadcast_i(int32_t x) { return x - VecI{}; }
static inline VecU iota_u(uint32_t start) {
  VecU v;
  for (int i = 0; i < kWidth; ++i) v[i] = start + i;
  return v;
}

template <class To, class From>
static inline To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  __builtin_memcpy(&r, &v, sizeof r);
  return r;
}

// ---- memory -------------------------------------------------------------------------------------
static inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

static inline Vec load(const bf16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  return bit_cast<Vec>(__builtin_convertvector(h, VecU) << 16);
}
// Round to nearest even; NaN stays NaN.
static inline VecH to_bf16_bits(Vec v) {
#if defined(__AVX512BF16__)
  return bit_cast<VecH>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#else
  VecU u = bit_cast<VecU>(v);
  VecU r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  r = v == v ? r : broadcast_u(0x7fc0u);
  return __builtin_convertvector(r, VecH);
#endif
}
static inline void store(bf16* p, Vec v) {
  VecH h = to_bf16_bits(v);
  __builtin_memcpy(p, &h, sizeof h);
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
static inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff, u;
  if (magnitude >= 0x7c00) {
    u = 0x7f800000u | (magnitude & 0x3ff) << 13;
  } else {  // exact for subnormals too: scale by 2^112
    u = magnitude << 13;
    float f;
    __builtin_memcpy(&f, &u, 4);
    f *= 0x1p112f;
    __builtin_memcpy(&u, &f, 4);
  }
  u |= sign;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
#endif
}
static inline void from_float(float& y, float x) { y = x; }
static inline void from_float(bf16& y, float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  y.bits = x == x ? uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}
static inline void from_float(f16& y, float x) {
#if defined(__F16C__)
  y.bits = _cvtss_sh(x, 0);
#else
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) {
    y.bits = uint16_t(sign | 0x7e00u);
  } else if (a >= 0x47800000u) {  // >= 65536; 65520..65536 rounds up to infinity below
    y.bits = uint16_t(sign | 0x7c00u);
  } else if (a < 0x38800000u) {  // subnormal half: let the float adder round
    float f;
    __builtin_memcpy(&f, &a, 4);
    f += 0.5f;
    __builtin_memcpy(&a, &f, 4);
    y.bits = uint16_t(sign | (a - 0x3f000000u));
  } else {
    a += 0xc8000fffu + ((a >> 13) & 1u);
    y.bits = uint16_t(sign | (a >> 13));
  }
#endif
}

static inline Vec load(const f16* p) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bit_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
static inline void store(f16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(v), 0));
#else
  for (int i = 0; i < kWidth; ++i) from_float(p[i], v[i]);
#endif
}

// First n (< kWidth) elements; the rest is read as `fill` and not written.
template <class T>
static inline Vec load_partial(const T* p, int n, float fill = 0.f) {
  Vec v = broadcast(fill);
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}
#if defined(__AVX512F__)
static inline Vec load_partial(const float* p, int n, float fill = 0.f) {
  return bit_cast<Vec>(_mm512_mask_loadu_ps(bit_cast<__m512>(broadcast(fill)), __mmask16((1u << n) - 1), p));
}
#endif
template <class T>
static inline void store_partial(T* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) from_float(p[i], v[i]);
}
#if defined(__AVX512F__)
static inline void store_partial(float* p, Vec v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), bit_cast<__m512>(v));
}
#endif

// A loop over n columns: f(c, Full{}) for whole vectors, then f(c, Part{rest}).
struct Full {};
struct Part {
  int n;
};
template <class T>
static inline Vec load(const T* p, Full, float = 0.f) {
  return load(p);
}
template <class T>
static inline Vec load(const T* p, Part part, float fill = 0.f) {
  return load_partial(p, part.n, fill);
}
template <class T>
static inline void store(T* p, Vec v, Full) {
  store(p, v);
}
template <class T>
static inline void store(T* p, Vec v, Part part) {
  store_partial(p, v, part.n);
}
template <class F>
static inline void for_columns(int64_t n, const F& f) {
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) f(c, Full{});
  if (c < n) f(c, Part{int(n - c)});
}

// The sum of f(c, part) over n columns; unused lanes of f's last vector must be zero.
template <class F>
static inline Vec sum_columns(int64_t n, const F& f) {
  Vec s[4] = {};
  int64_t c = 0;
  for (; c + 4 * kWidth <= n; c += 4 * kWidth)
    for (int k = 0; k < 4; ++k) s[k] = s[k] + f(c + k * kWidth, Full{});
  for (; c + kWidth <= n; c += kWidth) s[0] = s[0] + f(c, Full{});
  if (c < n) s[1] = s[1] + f(c, Part{int(n - c)});
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// f(T{}) with the C++ type of a dtype.
template <class F>
static inline void with_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32)
    f(float{});
  else if (dtype == DType::bf16)
    f(bf16{});
  else
    f(f16{});
}

// ---- arithmetic ---------------------------------------------------------------------------------
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // contracted: -ffp-contract=fast
// If one argument is NaN, max and min return the second argument, as the x86 instructions do.
#if defined(__AVX512F__)
static inline Vec max(Vec a, Vec b) {
  return bit_cast<Vec>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
static inline Vec min(Vec a, Vec b) {
  return bit_cast<Vec>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
#elif defined(__AVX2__)
static inline Vec max(Vec a, Vec b) { return bit_cast<Vec>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b))); }
static inline Vec min(Vec a, Vec b) { return bit_cast<Vec>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b))); }
#else
static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif
static inline Vec abs(Vec a) { return bit_cast<Vec>(bit_cast<VecU>(a) & 0x7fffffffu); }
static inline Vec select_u_ge(VecU a, VecU b, Vec yes, Vec no) { return a >= b ? yes : no; }

static inline float sum(Vec v) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad q[kWidth / 4];
  __builtin_memcpy(q, &v, sizeof v);
  for (int n = kWidth / 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) q[i] = q[i] + q[i + n];
  return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}
static inline float max_of(Vec v) {
  float s[kWidth];
  __builtin_memcpy(s, &v, sizeof v);
  for (int n = kWidth / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
  return s[0];
}

// Each takes half of the lanes of a and b, in blocks of Step: lane l of the lower half is l & Step ? b[l - Step] :
// a[l], of the upper half l & Step ? b[l] : a[l + Step].
template <int Step>
static inline Vec lower_half(Vec a, Vec b) {
  VecI lanes;
  for (int l = 0; l < kWidth; ++l) lanes[l] = l & Step ? kWidth + l - Step : l;
  return __builtin_shuffle(a, b, lanes);
}
template <int Step>
static inline Vec upper_half(Vec a, Vec b) {
  VecI lanes;
  for (int l = 0; l < kWidth; ++l) lanes[l] = l & Step ? kWidth + l : l + Step;
  return __builtin_shuffle(a, b, lanes);
}

// 32 x 32 -> 64 bit products, high and low halves.
static inline VecU64 multiply_even(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  return bit_cast<VecU64>(_mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecU64>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}
static inline void multiply_wide(VecU a, uint32_t b, VecU& hi, VecU& lo) {
  const VecU64 wide = bit_cast<VecU64>(a), by = uint64_t(b) - VecU64{}, high = 0xffffffff00000000ull - VecU64{};
  const VecU64 even = multiply_even(wide, by), odd = multiply_even(wide >> 32, by);
  lo = bit_cast<VecU>((even & ~high) | (odd << 32));
  hi = bit_cast<VecU>((even >> 32) | (odd & high));
}

// exp(x) for x in [-87, 88], within 2 ulp.
static inline Vec exp_bounded(Vec x) {
  const Vec t = x * 1.44269504f;
#if defined(__AVX512F__)
  const Vec n = bit_cast<Vec>(_mm512_maskz_roundscale_ps(0xffff, bit_cast<__m512>(t), 8));  // to nearest, no exceptions
#else
  const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23: adding rounds to the nearest integer
  const Vec shifted = t + magic, n = shifted - magic;
#endif
  Vec r = fma(n, broadcast(-0.693145751953125f), x);
  r = fma(n, broadcast(-1.428606765330187e-06f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.f);
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(p), bit_cast<__m512>(n)));
#else
  return bit_cast<Vec>(bit_cast<VecI>(p) + (bit_cast<VecI>(shifted) << 23));  // low bits of `shifted` hold n
#endif
}

// exp(x): |relative error| < 2 ulp for x in [-87.3, 88.7]; below it goes to 0, above to infinity.
static inline Vec exp(Vec x) {
#if defined(__AVX512F__)
  return exp_bounded(max(broadcast(-105.f), min(broadcast(89.f), x)));  // scaling by 2^n goes to 0 and infinity
#else
  Vec result = exp_bounded(max(broadcast(-87.33654f), min(broadcast(88.72283f), x)));
  result = x < broadcast(-87.33654f) ? broadcast(0.f) : result;
  return x > broadcast(88.72283f) ? broadcast(INFINITY) : result;
#endif
}

// 1 / x for finite x of ordinary size, within 1 ulp.
static inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec r = bit_cast<Vec>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(x)));
  return fma(r, fma(-x, r, broadcast(1.f)), r);
#else
  return 1.f / x;
#endif
}

// 2^x for x <= 128, relative error about 1e-7; 0 for -inf; NaN for NaN.
static inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec t = max(broadcast(-160.f), x);
  const Vec n = bit_cast<Vec>(_mm512_maskz_roundscale_ps(0xffff, bit_cast<__m512>(t), 8));
#else
  const Vec t = max(broadcast(-126.f), x);
  const Vec shifted = t + 12582912.f;  // 1.5 * 2^23: adding rounds to the nearest integer
  const Vec n = shifted - 12582912.f;
#endif
  const Vec r = t - n;
  Vec p = broadcast(1.534581198e-4f);
  p = fma(p, r, broadcast(1.339993139e-3f));
  p = fma(p, r, broadcast(9.618488959e-3f));
  p = fma(p, r, broadcast(5.550328777e-2f));
  p = fma(p, r, broadcast(2.402264689e-1f));
  p = fma(p, r, broadcast(6.931472057e-1f));
  p = fma(p, r, broadcast(1.f));
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(p), bit_cast<__m512>(n)));
#else
  const Vec y = bit_cast<Vec>(bit_cast<VecI>(p) + (bit_cast<VecI>(shifted) << 23));
  return x < broadcast(-126.f) ? broadcast(0.f) : y;
#endif
}

// Small arguments use a series, so that the relative error stays near 1e-7 (Cephes).
static inline Vec tanh_accurate(Vec x) {
  const Vec a = bit_cast<Vec>(bit_cast<VecU>(x) & broadcast_u(0x7fffffffu));
  const Vec z = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const Vec small = fma(p * z, x, x);
  const Vec e = exp2(min(a * 2.885390082f, broadcast(60.f)));  // e^(2a)
  const Vec large = bit_cast<Vec>(bit_cast<VecU>(1.f - 2.f / (e + 1.f)) | (bit_cast<VecU>(x) & broadcast_u(1u << 31)));
  const Vec y = a < broadcast(0.625f) ? small : large;
  return x == x ? y : x;
}

// ---- scratch memory: growing buffers per thread, in csrc/ops.cpp ---------------------------------
extern "C" void* tf_scratch(int slot, int64_t bytes);  // 64-byte aligned, kept between calls
template <class T>
static inline T* scratch(int slot, int64_t count) {
  return static_cast<T*>(tf_scratch(slot, count * int64_t(sizeof(T))));
}

}  // namespace tf::TF_ISA
