// wgmma.mma_async has up to 128 accumulators as operands; the preprocessor makes their lists.
#pragma once
#include "descriptor.cuh"

namespace tf::cuda::detail {

template <int N>
struct Wgmma;

#define TF_TO_7(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define TF_TEN(X, t) X(t##0) X(t##1) X(t##2) X(t##3) X(t##4) X(t##5) X(t##6) X(t##7) X(t##8) X(t##9)
#define TF_TO_9(X) TF_TO_7(X) X(8) X(9)
#define TF_TO_29(X) TF_TO_9(X) TF_TEN(X, 1) TF_TEN(X, 2)
#define TF_TO_39(X) TF_TO_29(X) TF_TEN(X, 3)
#define TF_TO_59(X) TF_TO_39(X) TF_TEN(X, 4) TF_TEN(X, 5)
#define TF_TO_79(X) TF_TO_59(X) TF_TEN(X, 6) TF_TEN(X, 7)
// Numbers 1 .. N / 2 - 1.
#define TF_REST_8(X) X(1) X(2) X(3)
#define TF_REST_16(X) TF_TO_7(X)
#define TF_REST_32(X) TF_TO_9(X) X(10) X(11) X(12) X(13) X(14) X(15)
#define TF_REST_48(X) TF_TO_9(X) TF_TEN(X, 1) X(20) X(21) X(22) X(23)
#define TF_REST_64(X) TF_TO_29(X) X(30) X(31)
#define TF_REST_80(X) TF_TO_39(X)
#define TF_REST_96(X) TF_TO_39(X) X(40) X(41) X(42) X(43) X(44) X(45) X(46) X(47)
#define TF_REST_112(X) TF_TO_39(X) TF_TEN(X, 4) X(50) X(51) X(52) X(53) X(54) X(55)
#define TF_REST_128(X) TF_TO_59(X) X(60) X(61) X(62) X(63)
#define TF_REST_160(X) TF_TO_79(X)
#define TF_REST_176(X) TF_TO_79(X) X(80) X(81) X(82) X(83) X(84) X(85) X(86) X(87)
#define TF_REST_192(X) TF_TO_79(X) TF_TEN(X, 8) X(90) X(91) X(92) X(93) X(94) X(95)
#define TF_REST_256(X)                                                                                          \
  TF_TO_79(X) TF_TEN(X, 8) TF_TEN(X, 9) TF_TEN(X, 10) TF_TEN(X, 11) X(120) X(121) X(122) X(123) X(124) X(125) X(126) \
  X(127)

#define TF_NAME(i) ", %" #i
#define TF_OPERAND(i) , "+f"(d[i])

#define TF_WGMMA_SS(N, type, i0, i1, i2, i3, i4)                                                    \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N   \
               "k16.f32." type "." type " {%0" TF_REST_##N(TF_NAME) "}, %" #i0 ", %" #i1            \
               ", p, 1, 1, %" #i3 ", %" #i4 ";}"                                                    \
               : "+f"(d[0]) TF_REST_##N(TF_OPERAND)                                                 \
               : "l"(a), "l"(b), "r"(accumulate), "n"(ATrans), "n"(BTrans))
#define TF_WGMMA_RS(N, type, i0, i1, i2, i3, i4, i5, i6)                                            \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N   \
               "k16.f32." type "." type " {%0" TF_REST_##N(TF_NAME) "}, {%" #i0 ", %" #i1 ", %" #i2 \
               ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";}"                                         \
               : "+f"(d[0]) TF_REST_##N(TF_OPERAND)                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(BTrans))

// The numbers of the other operands follow those of the accumulators: N / 2, N / 2 + 1, ...
#define TF_WGMMA(N, i0, i1, i2, i3, i4, i5, i6)                                                             \
  template <>                                                                                               \
  struct Wgmma<N> {                                                                                         \
    template <class T, int ATrans, int BTrans>                                                              \
    static TF_DEVICE void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {                   \
      if constexpr (std::is_same_v<T, half_t>) {                                                            \
        TF_WGMMA_SS(N, "f16", i0, i1, i2, i3, i4);                                                          \
      } else {                                                                                              \
        TF_WGMMA_SS(N, "bf16", i0, i1, i2, i3, i4);                                                         \
      }                                                                                                     \
    }                                                                                                       \
    template <class T, int BTrans>                                                                          \
    static TF_DEVICE void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {       \
      if constexpr (std::is_same_v<T, half_t>) {                                                            \
        TF_WGMMA_RS(N, "f16", i0, i1, i2, i3, i4, i5, i6);                                                  \
      } else {                                                                                              \
        TF_WGMMA_RS(N, "bf16", i0, i1, i2, i3, i4, i5, i6);                                                 \
      }                                                                                                     \
    }                                                                                                       \
  }
TF_WGMMA(8, 4, 5, 6, 7, 8, 9, 10);
TF_WGMMA(16, 8, 9, 10, 11, 12, 13, 14);
TF_WGMMA(32, 16, 17, 18, 19, 20, 21, 22);
TF_WGMMA(48, 24, 25, 26, 27, 28, 29, 30);
TF_WGMMA(64, 32, 33, 34, 35, 36, 37, 38);
TF_WGMMA(80, 40, 41, 42, 43, 44, 45, 46);
TF_WGMMA(96, 48, 49, 50, 51, 52, 53, 54);
TF_WGMMA(112, 56, 57, 58, 59, 60, 61, 62);
TF_WGMMA(128, 64, 65, 66, 67, 68, 69, 70);
TF_WGMMA(160, 80, 81, 82, 83, 84, 85, 86);
TF_WGMMA(176, 88, 89, 90, 91, 92, 93, 94);
TF_WGMMA(192, 96, 97, 98, 99, 100, 101, 102);
TF_WGMMA(256, 128, 129, 130, 131, 132, 133, 134);

#undef TF_WGMMA
#undef TF_WGMMA_RS
#undef TF_WGMMA_SS
#undef TF_OPERAND
#undef TF_NAME
#undef TF_REST_8
#undef TF_REST_16
#undef TF_REST_32
#undef TF_REST_48
#undef TF_REST_64
#undef TF_REST_80
#undef TF_REST_96
#undef TF_REST_112
#undef TF_REST_128
#undef TF_REST_160
#undef TF_REST_176
#undef TF_REST_192
#undef TF_REST_256
#undef TF_TO_7
#undef TF_TO_9
#undef TF_TO_29
#undef TF_TO_39
#undef TF_TO_59
#undef TF_TO_79
#undef TF_TEN

}  // namespace tf::cuda::detail

namespace tf::cuda {

// D (64xN) = A (64x16) B (16xN), plus D if `accumulate`, by a warpgroup. Warp w, lane l holds
// d[4 * j + i] = D[16 * w + l / 4 + 8 * (i / 2)][8 * j + 2 * (l % 4) + i % 2]. a and b: descriptors of shared memory.
// ATrans, BTrans: M or N, not K, is contiguous in memory.
template <class T, int N, bool ATrans = false, bool BTrans = false>
TF_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  detail::Wgmma<N>::template ss<T, ATrans, BTrans>(d, a, b, accumulate);
}
// A in registers, as for mma_m16n8k16; warp w has rows 16 * w .. 16 * w + 15.
template <class T, int N, bool BTrans = false>
TF_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  detail::Wgmma<N>::template rs<T, BTrans>(d, a, b, accumulate);
}

}  // namespace tf::cuda
