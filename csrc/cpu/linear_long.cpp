// Products with long sums: 64 columns of a weight and up to kDepth inputs at a time. The rounding errors of one running
// sum grow with its length, so none is longer than kDepth before it is added to what there is: MKL's are of 192 at most.
// A panel of the weight then fits the first cache (32 KB) beside the rows of x.
#include "activation_math.hpp"
#include "attention_tile.hpp"
#include "kernels.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int64_t kColumns = 64, kDepth = 128, kAhead = 12;  // kAhead: rows of x that are fetched while as many are used
constexpr int64_t kItemRows = 256;                           // fewer would not pay for laying the weight out

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Part of the weight as (depth, kColumns), zeros from `columns` on.
void lay_out(const LinearLong& a, int64_t column, int64_t columns, int64_t k, int64_t depth, float* panel) {
  if (a.in_stride == 1)
    load_transposed(a.weight + column * a.out_stride + k, a.out_stride, columns, depth, panel, kColumns);
  else
    load_rows(a.weight + k * a.in_stride + column, a.in_stride, depth, columns, panel, kColumns);
}

template <class Activate>
void multiply(const LinearLong& a, int64_t row, int64_t rows, int64_t column, const Activate& activate) {
  const int64_t columns = least(a.out - column, kColumns), runs = (a.in + kDepth - 1) / kDepth;
  const int64_t run = round_up((a.in + runs - 1) / runs, 16);  // all of about one length: the longest decides the error
  float* y = a.y + row * a.out + column;
  // Whole vectors are summed in y itself.
  const bool in_place = columns % kWidth == 0;
  float* panel = scratch<float>(0, kDepth * kColumns + (in_place ? 0 : rows * kColumns));
  float* sums = in_place ? y : panel + kDepth * kColumns;
  const int64_t ld = in_place ? a.out : kColumns;
  for (int64_t k = 0; k < a.in; k += run) {
    const int64_t depth = least(a.in - k, run);
    lay_out(a, column, columns, k, depth, panel);
    for (int64_t r = 0; r < rows; r += kAhead) {
      const float* x = a.x + (row + r) * a.x_stride + k;
      for (int64_t i = kAhead; i < 2 * kAhead && r + i < rows; ++i)
        for (int64_t d = 0; d < depth; d += 16) __builtin_prefetch(x + i * a.x_stride + d, 0, 2);
      gemm(k ? Write::kAdd : Write::kStore, least(rows - r, kAhead), round_up(columns, kWidth), depth,
           {x, a.x_stride * 4, 4}, panel, kColumns, sums + r * ld, ld, nullptr, kDepth);
    }
  }
  if (in_place && !a.bias && !a.has_activation) return;
  for (int64_t r = 0; r < rows; ++r)
    for_columns(columns, [&](int64_t c, auto part) {
      const Vec v = load(sums + r * ld + c, part);
      store(y + r * a.out + c, activate(a.bias ? v + load(a.bias + column + c, part) : v), part);
    });
}

template <class Activate>
void multiply_all(const LinearLong& a, const Activate& activate) {
  const int64_t panels = (a.out + kColumns - 1) / kColumns, wanted = (4 * tf_num_threads() + panels - 1) / panels;
  const int64_t most = (a.rows + kItemRows - 1) / kItemRows, blocks = wanted < most ? wanted : most;
  const int64_t each = round_up((a.rows + blocks - 1) / blocks, kAhead);
  parallel_for(panels * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % blocks * each;
      if (row < a.rows) multiply(a, row, least(a.rows - row, each), i / blocks * kColumns, activate);
    }
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
