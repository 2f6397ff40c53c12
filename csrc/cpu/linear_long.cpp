// Products with long sums: 64 columns of a weight and up to kDepth inputs at a time. The rounding errors of a running
// sum grow with its length, so none exceeds kDepth terms before it is added to the total (MKL: at most 192). A panel of
// the weight then fits the L1 cache (32 KB) beside the rows of x.
#include "activation_math.hpp"
#include "attention_tile.hpp"
#include "kernels.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int64_t kColumns = 64, kDepth = 128, kAhead = 12;  // kAhead: rows of x to prefetch ahead
// Fewer rows do not pay for the copy of the weight; more, with their sums, do not fit the L2 cache.
constexpr int64_t kLeastRows = 256, kMostRows = 512;

// Copies part of the weight into a panel (depth, kColumns), zeros from `columns` on.
void lay_out(const LinearLong& a, int64_t column, int64_t columns, int64_t k, int64_t depth, float* panel) {
  if (a.in_stride == 1)
    load_transposed(a.weight + column * a.out_stride + k, a.out_stride, columns, depth, panel, kColumns);
  else
    load_rows(a.weight + k * a.in_stride + column, a.in_stride, depth, columns, panel, kColumns);
}

#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;  // 24 sums in 32 registers
#else
constexpr int kRows = 6, kVectors = 2;  // 12 in 16
#endif
constexpr int64_t kTile = kVectors * kWidth;

// y (M, kTile) (+)= x (M, depth) panel (depth, kTile of kColumns). Rows are addressed from rows 0 and 3.
template <int M, bool First>
void block(const float* x, int64_t stride, const float* panel, int64_t depth, float* y, int64_t ldy) {
  Vec sums[M][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Vec{};
  const float* third = x + 3 * stride;
  for (int64_t k = 0; k < depth; ++k, panel += kColumns) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load(panel + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec v = broadcast((i < 3 ? x : third)[i % 3 * stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = fma(v, row[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* to = y + i * ldy + j * kWidth;
      store(to, First ? sums[i][j] : load(to) + sums[i][j]);
    }
}

template <int M>
void block(int64_t rows, bool first, const float* x, int64_t stride, const float* panel, int64_t depth, float* y,
           int64_t ldy) {
  if (rows >= M)
    return first ? block<M, true>(x, stride, panel, depth, y, ldy) : block<M, false>(x, stride, panel, depth, y, ldy);
  if constexpr (M > 1) block<M - 1>(rows, first, x, stride, panel, depth, y, ldy);
}

template <class Activate>
void multiply(const LinearLong& a, int64_t row, int64_t rows, int64_t column, const Activate& activate) {
  const int64_t columns = least(a.out - column, kColumns), runs = (a.in + kDepth - 1) / kDepth;
  const int64_t run = round_up((a.in + runs - 1) / runs, 16);  // about equal lengths: the longest decides the error
  float* y = a.y + row * a.out + column;
  // Whole tiles are summed in y itself.
  const bool in_place = columns % kTile == 0;
  float* panel = scratch<float>(0, kDepth * kColumns + (in_place ? 0 : rows * kColumns));
  float* sums = in_place ? y : panel + kDepth * kColumns;
  const int64_t ld = in_place ? a.out : kColumns;
  const auto finish = [&](int64_t r, int64_t count) {
    for (const int64_t end = r + count; r < end; ++r)
      for_columns(columns, [&](int64_t c, auto part) {
        const Vec v = load(sums + r * ld + c, part);
        store(y + r * a.out + c, activate(a.bias ? v + load(a.bias + column + c, part) : v), part);
      });
  };
  for (int64_t k = 0; k < a.in; k += run) {
    const int64_t depth = least(a.in - k, run);
    lay_out(a, column, columns, k, depth, panel);
    for (int64_t r = 0; r < rows; r += kAhead) {
      const float* x = a.x + (row + r) * a.x_stride + k;
      for (int64_t i = kAhead; i < 2 * kAhead && r + i < rows; ++i)
        for (int64_t d = 0; d < depth; d += 16) __builtin_prefetch(x + i * a.x_stride + d, 0, 2);
      for (int64_t c = 0; c < columns; c += kTile)
        for (int64_t i = 0; i < kAhead && r + i < rows; i += kRows)
          block<kRows>(rows - r - i, k == 0, x + i * a.x_stride, a.x_stride, panel + c, depth, sums + (r + i) * ld + c,
                       ld);
      if (k + depth == a.in && !(in_place && !a.bias && !a.has_activation)) finish(r, least(rows - r, kAhead));
    }
  }
}

template <class Activate>
void multiply_all(const LinearLong& a, const Activate& activate) {
  const int64_t panels = (a.out + kColumns - 1) / kColumns, threads = tf_num_threads();
  const int64_t wanted = (4 * threads + panels - 1) / panels, most = (a.rows + kLeastRows - 1) / kLeastRows;
  const int64_t fewest = (a.rows + kMostRows - 1) / kMostRows;
  const int64_t blocks = wanted > most ? most : wanted > fewest ? wanted : fewest;
  const int64_t each = round_up((a.rows + blocks - 1) / blocks, kAhead);
  share_out(panels * blocks, threads, [&] {
    return [&](int64_t i) {
      const int64_t row = i % blocks * each;
      if (row < a.rows) multiply(a, row, least(a.rows - row, each), i / blocks * kColumns, activate);
    };
  });
}

}  // namespace

void linear_long(const LinearLong& a) {
  if (!a.has_activation) return multiply_all(a, [](Vec v) { return v; });
  with_activation(a.activation, [&](auto activation) {
    multiply_all(a, [](Vec v) {
      Vec y, slope;
      decltype(activation)::compute(v, y, slope);
      return y;
    });
  });
}

}  // namespace tf::TF_ISA
