// The one matrix product behind attention: C[m][n] (+)= sum_k A(m, k) * B[k][n].
//
// B and C are scratch, rows of 32-bit words, n a multiple of kWidth. A is read one word at a time and broadcast, with
// any byte strides: keys and values are used in place, never transposed. A word is a float, or a pair of bf16 along k
// where the processor multiplies pairs (vdpbf16ps) or tiles of them (AMX).
#pragma once
#include "simd.hpp"
#include "tiles.hpp"

namespace tf::TF_ISA {

#if defined(TF_TILES)
constexpr bool kHasBf16Tiles = true;
using ProductState = Tiles;  // what gemm_bf16 needs while it runs
#else
constexpr bool kHasBf16Tiles = false;
struct ProductState {};
#endif
#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = kHasBf16Tiles;
#endif
// n of gemm_bf16 is a multiple of this.
constexpr int64_t kPairColumns = kHasBf16Tiles ? 16 : kWidth;

enum class Write { kStore, kAdd, kScaleAdd };  // C = AB, C + AB, C * diag(column_scale) + AB

struct Operand {  // A
  const void* data;
  int64_t row_bytes, depth_bytes;
};

// m, n, depth: sizes, depth in words. column_scale: (n,), for kScaleAdd. chain: products per running sum. A long sum
// would lose terms that are small next to a large first one. For few rows other libraries compute dot products, whose
// many partial sums lose little; short chains lose as little.
constexpr int64_t kChain = 64, kShortChain = 16, kFewRows = 16;
static inline int64_t chain_of(int64_t rows) { return rows <= kFewRows ? kShortChain : kChain; }
void gemm(Write write, int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
          int64_t ldc, const float* column_scale = nullptr, int64_t chain = kChain);
// The same on words of two bf16, if kHasBf16Dot; depth counts bf16. With tiles A's words lie side by side (depth_bytes
// is 4), and 16 rows of A at a time are read: rows from m on, and an odd last value's partner, may hold anything.
void gemm_bf16(Write write, int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
               int64_t ldc, const float* column_scale = nullptr);

}  // namespace tf::TF_ISA
