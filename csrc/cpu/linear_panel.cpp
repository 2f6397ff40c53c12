// Products of few rows with a weight in panels (linear.hpp): the weight is read once, in order.
#include "activation_math.hpp"
#include "attention_tile.hpp"
#include "kernels.hpp"
#include "linear_panel.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int64_t kRowsInCache = 64;  // rows multiplied by a weight in one pass

template <class T>
void finish_rows(const LinearPanel& a, int64_t row, int rows, int64_t column, float* sums) {
  const int64_t n = a.out - column < kPanel ? a.out - column : kPanel;
  for (int m = 0; m < rows; ++m) {
    const float* from = sums + m * kPanel;
    T* y = static_cast<T*>(a.y) + (row + m) * a.out + column;
    if (!a.has_activation) {
      for_columns(n, [&](int64_t c, auto part) {
        const Vec v = load(from + c);
        store(y + c, a.bias ? v + load(a.bias + column + c, part) : v, part);
      });
      continue;
    }
    with_activation(a.activation, [&](auto activation) {
      for_columns(n, [&](int64_t c, auto part) {
        Vec v = load(from + c), value, slope;
        if (a.bias) v = v + load(a.bias + column + c, part);
        decltype(activation)::compute(v, value, slope);
        store(y + c, value, part);
      });
    });
  }
}

template <class T, class W>
void multiply(const LinearPanel& a) {
  const int64_t panels = (a.out + kPanel - 1) / kPanel;
  const float* x = static_cast<const float*>(a.x);
  int64_t ldx = a.x_stride;
  if constexpr (sizeof(T) == 2) {
    ldx = (a.in + 15) / 16 * 16;
    float* wide = scratch<float>(1, a.rows * ldx);
    for (int64_t r = 0; r < a.rows; ++r) {
      const T* from = static_cast<const T*>(a.x) + r * a.x_stride;
      for_columns(a.in, [&](int64_t c, auto part) { store(wide + r * ldx + c, load(from + c, part)); });
    }
    x = wide;
  }
  parallel_for(panels, 1 + 65536 / (a.in * kPanel), [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kRows * kPanel];
    for (int64_t block = 0; block < a.rows; block += kRowsInCache) {
      const int64_t block_end = block + kRowsInCache < a.rows ? block + kRowsInCache : a.rows;
      for (int64_t p = begin; p < end; ++p)
        for (int64_t r = block; r < block_end; r += kRows) {
          const int rows = block_end - r < kRows ? int(block_end - r) : kRows;
          const W* panel = static_cast<const W*>(a.panels) + p * panel_slots<W>(a.in);
          multiply_rows(rows, x + r * ldx, ldx, panel, a.in, r == block, sums);
          finish_rows<T>(a, r, rows, p * kPanel, sums);
        }
    }
  });
}

// Stores (depth, 32) floats as rows of a panel.
void store_panel(const float* rows, int64_t depth, float* panel) {
  __builtin_memcpy(panel, rows, size_t(depth * kPanel) * sizeof(float));
}
void store_panel(const float* rows, int64_t depth, bf16* panel) {
  for (int64_t k = 0; k < depth; ++k, rows += kPanel, panel += kPanel)
    for (int g = 0; g < 16; g += kWidth) {
      const VecU low = __builtin_convertvector(to_bf16_bits(load(rows + g)), VecU);
      const VecU words = low | __builtin_convertvector(to_bf16_bits(load(rows + 16 + g)), VecU) << 16;
      __builtin_memcpy(panel + 2 * g, &words, sizeof words);
    }
}

constexpr int64_t kDepth = 64;  // inputs per call of visit

// visit(k, rows, depth) for the inputs of a panel; rows: floats (depth, 32), zeros in columns past the weight's end.
template <class T, class F>
void visit_panel(const ToPanels& a, int64_t panel, const F& visit) {
  alignas(64) float rows[kDepth * kPanel];
  const int64_t columns = a.out - panel * kPanel < kPanel ? a.out - panel * kPanel : kPanel;
  const T* weight = static_cast<const T*>(a.weight) + panel * kPanel * a.out_stride;
  for (int64_t k = 0; k < a.in; k += kDepth) {
    const int64_t depth = a.in - k < kDepth ? a.in - k : kDepth;
    if (a.in_stride == 1)
      load_transposed(weight + k, a.out_stride, columns, depth, rows, kPanel);
    else
      load_rows(weight + k * a.in_stride, a.in_stride, depth, columns, rows, kPanel);
    visit(k, static_cast<const float*>(rows), depth);
  }
}

template <class T>
void lay_out_int8(const ToPanels& a, int64_t p) {
  int8_t* panel = static_cast<int8_t*>(a.panels) + p * panel_slots<int8_t>(a.in);
  float scales[kPanel] = {}, inverse[kPanel];
  visit_panel<T>(a, p, [&](int64_t, const float* rows, int64_t depth) {
    for (int64_t i = 0; i < depth * kPanel; ++i) {
      const float size = __builtin_fabsf(rows[i]);
      if (size > scales[i % kPanel] || size != size) scales[i % kPanel] = size;  // a NaN stays NaN
    }
  });
  for (int c = 0; c < kPanel; ++c) {
    inverse[c] = scales[c] > 0.f ? 127.f / scales[c] : 0.f;
    if (!(inverse[c] <= 3e38f)) inverse[c] = 0.f;  // the column is too small for a scale, or has NaN
    scales[c] /= 127.f;
  }
  visit_panel<T>(a, p, [&](int64_t k, const float* rows, int64_t depth) {
    for (int64_t i = 0; i < depth * kPanel; ++i) {
      const float v = rows[i] * inverse[i % kPanel];
      panel[k * kPanel + i] = v == v ? int8_t(__builtin_rintf(v)) : int8_t(1);
    }
  });
  __builtin_memcpy(panel + a.in * kPanel, scales, sizeof scales);
}

template <class T, class W>
void lay_out(const ToPanels& a) {
  parallel_for((a.out + kPanel - 1) / kPanel, 1 + 65536 / (a.in * kPanel), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      if constexpr (sizeof(W) == 1) {
        lay_out_int8<T>(a, p);
      } else {
        visit_panel<T>(a, p, [&](int64_t k, const float* rows, int64_t depth) {
          store_panel(rows, depth, static_cast<W*>(a.panels) + (p * a.in + k) * kPanel);
        });
      }
    }
  });
}

}  // namespace

void to_panels(const ToPanels& a) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.storage == Storage::f32) return lay_out<T, float>(a);
    a.storage == Storage::i8 ? lay_out<T, int8_t>(a) : lay_out<T, bf16>(a);
  });
}

void linear_panel(const LinearPanel& a) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.storage == Storage::f32) return multiply<T, float>(a);
    a.storage == Storage::i8 ? multiply<T, int8_t>(a) : multiply<T, bf16>(a);
  });
}

}  // namespace tf::TF_ISA
