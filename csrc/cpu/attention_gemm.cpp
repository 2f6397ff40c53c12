#include "attention_gemm.hpp"

#include "attention_tile.hpp"
#include "parallel.hpp"

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
#if defined(__AVX512BF16__) && !defined(TF_TILES)
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

template <class Dot>
struct ByVectors {
  static constexpr int64_t kPerWord = 1;  // units of depth
  template <Write W>
  static void product(int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
                      int64_t ldc, const float* scale) {
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
};

#if defined(TF_TILES)
constexpr int64_t kStep = kTileBytes / 4;  // words of depth in a tile, and its columns
// A product of tiles sums 16 even and 16 odd terms by themselves and adds the two sums to C: kChain additions.
constexpr int64_t kTileChain = kChain * 2 * kStep;

// M x N tiles of C are 0 to 3, the second row of them from 2; of A 4 and 5, of B 6 and 7.
template <int M, int N>
inline void zero_tiles() {
  tile_zero<0>();
  if constexpr (N == 2) tile_zero<1>();
  if constexpr (M == 2) tile_zero<2>();
  if constexpr (M == 2 && N == 2) tile_zero<3>();
}
template <int M, int N>
inline void load_tiles(const float* c, int64_t ldc) {
  tile_load<0>(c, ldc * 4);
  if constexpr (N == 2) tile_load<1>(c + kStep, ldc * 4);
  if constexpr (M == 2) tile_load<2>(c + kTileRows * ldc, ldc * 4);
  if constexpr (M == 2 && N == 2) tile_load<3>(c + kTileRows * ldc + kStep, ldc * 4);
}
template <int M, int N>
inline void store_tiles(float* c, int64_t ldc) {
  tile_store<0>(c, ldc * 4);
  if constexpr (N == 2) tile_store<1>(c + kStep, ldc * 4);
  if constexpr (M == 2) tile_store<2>(c + kTileRows * ldc, ldc * 4);
  if constexpr (M == 2 && N == 2) tile_store<3>(c + kTileRows * ldc + kStep, ldc * 4);
}
// Denormal numbers count as zeros, in inputs and sums: far below the rounding of the results to bf16.
template <int M, int N>
inline void multiply_tiles(int64_t steps, const char* a, int64_t row_bytes, const float* b, int64_t ldb) {
  for (int64_t k = 0; k < steps; ++k, a += kTileBytes, b += kStep * ldb) {
    tile_load<4>(a, row_bytes);
    tile_load<6>(b, ldb * 4);
    tile_multiply_bf16<0, 4, 6>();
    if constexpr (N == 2) {
      tile_load<7>(b + kStep, ldb * 4);
      tile_multiply_bf16<1, 4, 7>();
    }
    if constexpr (M == 2) {
      tile_load<5>(a + kTileRows * row_bytes, row_bytes);
      tile_multiply_bf16<2, 5, 6>();
    }
    if constexpr (M == 2 && N == 2) tile_multiply_bf16<3, 5, 7>();
  }
}

// `rows` rows of C, of M groups of 16. depth counts bf16. b_rest: the rows of B past whole tiles, then zeros.
template <Write W, int M, int N>
void tile_block(int64_t rows, int64_t depth, const char* a, int64_t row_bytes, const float* b, int64_t ldb,
                const float* b_rest, float* c, int64_t ldc, const float* column_scale) {
  const bool whole = rows == M * kTileRows;
  if (W == Write::kAdd && whole)
    load_tiles<M, N>(c, ldc);
  else
    zero_tiles<M, N>();
  const int64_t steps = depth / (2 * kStep), rest = depth % (2 * kStep);
  multiply_tiles<M, N>(steps, a, row_bytes, b, ldb);
  if (rest) {  // zeros in the place of what follows in a row: zero times infinity would be NaN
    alignas(64) float a_rest[M * kTileRows * kStep];
    const char* row = a + steps * kTileBytes;
    for (int64_t i = 0; i < M * kTileRows; ++i, row += row_bytes)
      for (int64_t k = 0; k < kStep; k += kWidth)
        store(a_rest + i * kStep + k, load_words(reinterpret_cast<const bf16*>(row) + 2 * k, rest - 2 * k));
    multiply_tiles<M, N>(1, reinterpret_cast<const char*>(a_rest), kTileBytes, b_rest, N * kStep);
  }
  if (W != Write::kScaleAdd && whole) return store_tiles<M, N>(c, ldc);
  alignas(64) float sums[M * kTileRows * N * kStep];
  store_tiles<M, N>(sums, N * kStep);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < N * kStep; j += kWidth) {
      float* out = c + i * ldc + j;
      Vec v = load(sums + i * N * kStep + j);
      if constexpr (W == Write::kAdd) v = load(out) + v;
      if constexpr (W == Write::kScaleAdd) v = fma(load(out), load(column_scale + j), v);
      store(out, v);
    }
}

template <Write W, int N>
void tile_columns(int64_t m, int64_t depth, const char* a, int64_t row_bytes, const float* b, int64_t ldb, float* c,
                  int64_t ldc, const float* scale) {
  alignas(64) float b_rest[kStep * N * kStep];
  const int64_t steps = depth / (2 * kStep), rest = (depth % (2 * kStep) + 1) / 2;
  for (int64_t k = 0; rest && k < kStep; ++k)
    for (int64_t j = 0; j < N * kStep; j += kWidth)
      store(b_rest + k * N * kStep + j, k < rest ? load(b + (steps * kStep + k) * ldb + j) : Vec{});
  for (int64_t i = 0; i < m; i += 2 * kTileRows, a += 2 * kTileRows * row_bytes, c += 2 * kTileRows * ldc) {
    const int64_t rows = least(m - i, 2 * kTileRows);
    if (rows > kTileRows)
      tile_block<W, 2, N>(rows, depth, a, row_bytes, b, ldb, b_rest, c, ldc, scale);
    else
      tile_block<W, 1, N>(rows, depth, a, row_bytes, b, ldb, b_rest, c, ldc, scale);
  }
}

struct ByTiles {
  static constexpr int64_t kPerWord = 2;
  template <Write W>
  static void product(int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
                      int64_t ldc, const float* scale) {
    const char* data = static_cast<const char*>(a.data);
    int64_t j = 0;
    for (; j + 2 * kStep <= n; j += 2 * kStep)
      tile_columns<W, 2>(m, depth, data, a.row_bytes, b + j, ldb, c + j, ldc, scale ? scale + j : nullptr);
    if (j < n) tile_columns<W, 1>(m, depth, data, a.row_bytes, b + j, ldb, c + j, ldc, scale ? scale + j : nullptr);
  }
};
#endif

template <class By>
void dispatch(Write write, int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
              int64_t ldc, const float* scale, int64_t chain) {
  for (int64_t k = 0; k < depth; k += chain) {
    const int64_t part = depth - k < chain ? depth - k : chain;
    if (write == Write::kStore)
      By::template product<Write::kStore>(m, n, part, a, b, ldb, c, ldc, scale);
    else if (write == Write::kAdd)
      By::template product<Write::kAdd>(m, n, part, a, b, ldb, c, ldc, scale);
    else
      By::template product<Write::kScaleAdd>(m, n, part, a, b, ldb, c, ldc, scale);
    write = Write::kAdd;
    a.data = static_cast<const char*>(a.data) + part / By::kPerWord * a.depth_bytes;
    b += part / By::kPerWord * ldb;
  }
}

}  // namespace

void gemm(Write write, int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
          int64_t ldc, const float* scale, int64_t chain) {
  dispatch<ByVectors<Float>>(write, m, n, depth, a, b, ldb, c, ldc, scale, chain);
}

#if defined(TF_TILES)
void gemm_bf16(Write write, int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
               int64_t ldc, const float* scale) {
  dispatch<ByTiles>(write, m, n, depth, a, b, ldb, c, ldc, scale, kTileChain);
}
#elif defined(__AVX512BF16__)
void gemm_bf16(Write write, int64_t m, int64_t n, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
               int64_t ldc, const float* scale) {
  dispatch<ByVectors<Bf16Pair>>(write, m, n, (depth + 1) / 2, a, b, ldb, c, ldc, scale, kChain);
}
#endif

}  // namespace tf::TF_ISA
