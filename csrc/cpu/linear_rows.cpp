// Products of few rows with weights in their own layout: one input, several weights per call.
#include "activation_math.hpp"
#include "kernels.hpp"
#include "linear_direct.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

template <class Activate>
void finish_panel(const RowsWeight& w, int64_t row, int rows, int64_t column, int64_t columns, const float* sums,
                  const Activate& activate) {
  for (int m = 0; m < rows; ++m) {
    float* y = w.y + (row + m) * w.out + column;
    for_columns(columns, [&](int64_t c, auto part) {
      const Vec v = load(sums + m * kPanel + c, part);
      store(y + c, activate(w.bias ? v + load(w.bias + column + c, part) : v), part);
    });
  }
}

template <class Activate>
void multiply(const LinearRows& a, const Activate& activate) {
  int64_t panels = 0;
  for (int64_t i = 0; i < a.count; ++i) panels += (a.weights[i].out + kPanel - 1) / kPanel;
  parallel_for(panels, 1 + 65536 / (a.in * kPanel), [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kRows * kPanel];
    int64_t first = 0;  // index of w's first panel
    const RowsWeight* w = a.weights;
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t own; p - first >= (own = (w->out + kPanel - 1) / kPanel); ++w) first += own;
      const int64_t column = (p - first) * kPanel, columns = w->out - column < kPanel ? w->out - column : kPanel;
      const float* weight = w->weight + column * w->stride;
      for (int64_t r = 0; r < a.rows; r += kRows) {
        const int rows = a.rows - r < kRows ? int(a.rows - r) : kRows;
        multiply_rows_of(rows, a.x + r * a.x_stride, a.x_stride, weight, w->stride, columns, a.in, r == 0, sums);
        finish_panel(*w, r, rows, column, columns, sums, activate);
      }
    }
  });
}

}  // namespace

void linear_rows(const LinearRows& a) {
  if (!a.has_activation) return multiply(a, [](Vec v) { return v; });
  with_activation(a.activation, [&](auto activation) {
    multiply(a, [](Vec v) {
      Vec y, slope;
      decltype(activation)::compute(v, y, slope);
      return y;
    });
  });
}

}  // namespace tf::TF_ISA
