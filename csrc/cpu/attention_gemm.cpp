#include "attention_gemm.hpp"

namespace tf::TF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kColumns = 4;  // 24 accumulators in 32 registers
#else
constexpr int kRows = 6, kColumns = 2;  // 12 in 16
#endif

struct Float {
  static Vec step(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};
#if defined(__AVX512BF16__)
struct Bf16Pair {
  static Vec step(Vec a, Vec b, Vec c) {
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(c), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
};
#endif

static inline Vec broadcast_word(const char* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return bit_cast<Vec>(broadcast_u(word));
}

template <class Dot, Write W, int M, int N>
inline void block(int64_t depth, const char* a, int64_t row_bytes, int64_t depth_bytes, const float* b, int64_t ldb,
                  float* c, int64_t ldc, const float* column_scale) {
  Vec acc[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) acc[i][j] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = load(b + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec x = broadcast_word(a + i * row_bytes);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] = Dot::step(x, row[j], acc[i][j]);
    }
    a += depth_bytes;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      float* out = c + i * ldc + j * kWidth;
      if constexpr (W == Write::kAdd) acc[i][j] = load(out) + acc[i][j];
      if constexpr (W == Write::kScaleAdd) acc[i][j] = fma(load(out), load(column_scale + j * kWidth), acc[i][j]);
      store(out, acc[i][j]);
    }
  }
}

template <class Dot, Write W, int N, int M = kRows - 1>
inline void last_rows(int64_t rows, int64_t depth, const char* a, int64_t row_bytes, int64_t depth_bytes,
                      const float* b, int64_t ldb, float* c, int64_t ldc, const float* column_scale) {
  if (rows == M) {
    block<Dot, W, M, N>(depth, a, row_bytes, depth_bytes, b, ldb, c, ldc, column_scale);
  } else if constexpr (M > 1) {
    last_rows<Dot, W, N, M - 1>(rows, depth, a, row_bytes, depth_bytes, b, ldb, c, ldc, column_scale);
  }
}

template <class Dot, Write W, int N>
void columns(int64_t m, int64_t depth, const char* a, int64_t row_bytes, int64_t depth_bytes, const float* b,
             int64_t ldb, float* c, int64_t ldc, const float* column_scale) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows)
    block<Dot, W, kRows, N>(depth, a + i * row_bytes, row_bytes, depth_bytes, b, ldb, c + i * ldc, ldc, column_scale);
  if (i < m)
    last_rows<Dot, W, N>(m - i, depth, a + i * row_bytes, row_bytes, depth_bytes, b, ldb, c + i * ldc, ldc,
                         column_scale);
}

template <class Dot, Write W>
void product(int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c, int64_t ldc,
             const float* scale) {
  const char* data = static_cast<const char*>(a.data);
  for (int64_t j = 0; j < n; j += kColumns * kWidth) {
    const int64_t vectors = (n - j) / kWidth;
    const float* s = scale ? scale + j : nullptr;
#define TF_COLUMNS(N) columns<Dot, W, N>(m, depth, data, a.row_bytes, a.depth_bytes, b + j, ldb, c + j, ldc, s)
    if (vectors >= kColumns) {
      TF_COLUMNS(kColumns);
    } else if (vectors == 1) {
      TF_COLUMNS(1);
    } else if constexpr (kColumns == 4) {
      if (vectors == 2)
        TF_COLUMNS(2);
      else
        TF_COLUMNS(3);
    }
#undef TF_COLUMNS
  }
}

template <class Dot>
void dispatch(Write write, int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
              int64_t ldc, const float* scale, int64_t chain) {
  for (int64_t k = 0; k < depth; k += chain) {
    const int64_t part = depth - k < chain ? depth - k : chain;
    if (write == Write::kStore)
      product<Dot, Write::kStore>(m, n, part, a, b, ldb, c, ldc, scale);
    else if (write == Write::kAdd)
      product<Dot, Write::kAdd>(m, n, part, a, b, ldb, c, ldc, scale);
    else
      product<Dot, Write::kScaleAdd>(m, n, part, a, b, ldb, c, ldc, scale);
    write = Write::kAdd;
    a.data = static_cast<const char*>(a.data) + part * a.depth_bytes;
    b += part * ldb;
  }
}

}  // namespace

void gemm(Write write, int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
          int64_t ldc, const float* scale, int64_t chain) {
  dispatch<Float>(write, m, n, depth, a, b, ldb, c, ldc, scale, chain);
}

#if defined(__AVX512BF16__)
void gemm_bf16(Write write, int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
               int64_t ldc, const float* scale) {
  dispatch<Bf16Pair>(write, m, n, depth, a, b, ldb, c, ldc, scale, kChain);
}
#endif

}  // namespace tf::TF_ISA
