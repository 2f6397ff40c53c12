// The product of a few rows with 32 output columns of a weight in its own layout.
#pragma once
#include "linear_panel.hpp"

namespace tf::TF_ISA {

template <int Step>
static inline void fold_lanes(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; i += 2 * Step)
    v[i] = lower_half<Step>(v[i], v[i + Step]) + upper_half<Step>(v[i], v[i + Step]);
}
// Lane i of the result: the sum of the lanes of v[i], for kWidth vectors.
static inline Vec lane_sums(Vec* v) {
  fold_lanes<1>(v);
  fold_lanes<2>(v);
  if constexpr (kWidth > 4) fold_lanes<4>(v);
  if constexpr (kWidth > 8) fold_lanes<8>(v);
  return v[0];
}

// A tile of M rows by N columns, M * N <= kWidth: out[m * kPanel + n] = x[m] . w[n]. Of the rows w[n] + ahead, First to
// Last are prefetched. Each lane adds up every kWidth-th product, at most kRun per running sum: rounding errors grow
// with the length of a sum.
template <int M, int N, int First, int Last, class W>
static inline void dot_tile(const float* x, int64_t ldx, const W* const* w, int64_t in, int64_t ahead, float* out) {
  constexpr int64_t kRun = 192;
  Vec total{};
  for (int64_t begin = 0; begin < in; begin += kRun * kWidth) {
    const float* row = x + begin;
    const W* column[N];
    for (int n = 0; n < N; ++n) column[n] = w[n] + begin;
    Vec sums[kWidth] = {};
    for_columns(in - begin < kRun * kWidth ? in - begin : kRun * kWidth, [&](int64_t k, auto part) {
      Vec b[N];
      for (int n = 0; n < N; ++n) {
        b[n] = load(column[n] + k, part);
        if (n >= First && n < Last) __builtin_prefetch(column[n] + k + ahead, 0, 2);
      }
      for (int m = 0; m < M; ++m) {
        const Vec a = load(row + m * ldx + k, part);
        for (int n = 0; n < N; ++n) sums[m * N + n] = fma(a, b[n], sums[m * N + n]);
      }
    });
    total = total + lane_sums(sums);
  }
  alignas(64) float totals[kWidth];
  store(totals, total);
  for (int m = 0; m < M; ++m) __builtin_memcpy(out + m * kPanel, totals + m * N, N * sizeof(float));
}

template <int M, int N, int First, int Last, class W>
static void dot_rows(int rows, const float* x, int64_t ldx, const W* const* w, int64_t in, int64_t ahead, float* out) {
  if (rows >= M) return dot_tile<M, N, First, Last>(x, ldx, w, in, ahead, out);
  if constexpr (M > 1) dot_rows<M - 1, N, First, Last>(rows, x, ldx, w, in, ahead, out);
}

template <int M, class W>
static void multiply_dots(int rows, const float* x, int64_t ldx, const W* w, int64_t stride, int64_t columns,
                          int64_t in, bool fetch, float* out) {
  constexpr int N = kWidth / M;
  const int64_t ahead = kWidth * stride;
  for (int64_t c = 0; c < columns; c += N) {
    const W* from[N];
    for (int n = 0; n < N; ++n) from[n] = w + (c + n < columns ? c + n : columns - 1) * stride;
    int r = 0;
    if (fetch && rows > M) {  // each tile issues half of the prefetches
      dot_rows<M, N, 0, N / 2>(rows, x, ldx, from, in, ahead, out + c);
      dot_rows<M, N, N / 2, N>(rows - M, x + M * ldx, ldx, from, in, ahead, out + M * kPanel + c);
      r = 2 * M;
    } else if (fetch) {
      dot_rows<M, N, 0, N>(rows, x, ldx, from, in, ahead, out + c);
      r = M;
    }
    for (; r < rows; r += M) dot_rows<M, N, 0, 0>(rows - r, x + r * ldx, ldx, from, in, 0, out + r * kPanel + c);
  }
}

// out (rows, 32) = x (rows, in) times `columns` (at most 32) rows of a weight (out, in), `stride` apart. fetch: whether
// to prefetch the rows after those, for the next call.
template <class W>
static void multiply_rows_of(int rows, const float* x, int64_t ldx, const W* w, int64_t stride, int64_t columns,
                             int64_t in, bool fetch, float* out) {
  if (rows == 1) return multiply_dots<1>(rows, x, ldx, w, stride, columns, in, fetch, out);
  if (rows == 2) return multiply_dots<2>(rows, x, ldx, w, stride, columns, in, fetch, out);
  multiply_dots<4>(rows, x, ldx, w, stride, columns, in, fetch, out);
}

template <int M, class W>
static void multiply_columns(const float* x, int64_t ldx, const W* w, int64_t stride, int64_t columns, int64_t in,
                             float* out, int64_t ldo) {
  constexpr int64_t kLines = 16;  // rows streamed side by side: as many as the hardware prefetcher follows
  for (int64_t begin = 0; begin < in; begin += kLines) {
    const int64_t end = begin + kLines < in ? begin + kLines : in;
    for (int64_t c = 0; c < columns; c += 2 * kWidth) {
      Vec low[M] = {}, high[M] = {};
      const auto run = [&](auto first, auto second) {
        for (int64_t k = begin; k < end; ++k) {
          const W* from = w + k * stride + c;
          for (int i = 0; i < 2 * kWidth * int(sizeof(W)); i += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(from + kLines * stride) + i, 0, 2);
          const Vec w0 = load(from, first), w1 = load(from + kWidth, second);
          for (int m = 0; m < M; ++m) {
            const Vec v = broadcast(x[m * ldx + k]);
            low[m] = fma(v, w0, low[m]);
            high[m] = fma(v, w1, high[m]);
          }
        }
      };
      const int64_t rest = columns - c;
      if (rest >= 2 * kWidth)
        run(Full{}, Full{});
      else
        run(Part{int(rest < kWidth ? rest : kWidth)}, Part{int(rest < kWidth ? 0 : rest - kWidth)});
      float* to = out + c;
      for (int m = 0; m < M; ++m, to += ldo) {
        store(to, begin ? load(to) + low[m] : low[m]);
        store(to + kWidth, begin ? load(to + kWidth) + high[m] : high[m]);
      }
    }
  }
}

// out (rows, columns rounded up to 32), rows ldo apart, = x (rows, in) times `columns` of a weight (in, out), rows
// `stride` apart.
template <int M, class W>
static void multiply_columns_of(int rows, const float* x, int64_t ldx, const W* w, int64_t stride, int64_t columns,
                                int64_t in, float* out, int64_t ldo) {
  if (rows == M) return multiply_columns<M>(x, ldx, w, stride, columns, in, out, ldo);
  if constexpr (M > 1) multiply_columns_of<M - 1>(rows, x, ldx, w, stride, columns, in, out, ldo);
}

}  // namespace tf::TF_ISA
