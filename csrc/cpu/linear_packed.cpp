// Products of few rows with a weight laid out for them: every weight is read once, in order.
#include "activation_math.hpp"
#include "kernels.hpp"
#include "linear.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int kRows = kWidth == 16 ? 8 : 6;  // rows held in registers: 2 kRows accumulators
constexpr int64_t kRowsInCache = 64;         // rows that pass over a weight together
constexpr int64_t kRun = 32;                 // products in one running sum: long ones lose digits

// Two vectors of a panel's row of 32: columns g.. and 16 + g..
static inline void load_pair(const float* w, int g, Vec& low, Vec& high) {
  low = load(w + g);
  high = load(w + 16 + g);
}
static inline void load_pair(const bf16* w, int g, Vec& low, Vec& high) {
  VecU words;
  __builtin_memcpy(&words, w + 2 * g, sizeof words);
  low = bit_cast<Vec>(words << 16);
  high = bit_cast<Vec>(words & 0xffff0000u);
}

// out (M, 32) = x (M, in) times one panel.
template <int M, class W>
void multiply_panel(const float* x, int64_t ldx, const W* panel, int64_t in, float* out) {
  for (int g = 0; g < 16; g += kWidth) {
    for (int64_t begin = 0; begin < in; begin += kRun) {
      const int64_t end = begin + kRun < in ? begin + kRun : in;
      Vec low[M] = {}, high[M] = {};
      for (int64_t k = begin; k < end; ++k) {
        const W* w = panel + k * kPanel;
        __builtin_prefetch(w + 4096 / sizeof(W));
        if (sizeof(W) == 4) __builtin_prefetch(w + 4096 / sizeof(W) + 16);
        Vec w0, w1;
        load_pair(w, g, w0, w1);
        for (int m = 0; m < M; ++m) {
          const Vec v = broadcast(x[m * ldx + k]);
          low[m] = fma(v, w0, low[m]);
          high[m] = fma(v, w1, high[m]);
        }
      }
      for (int m = 0; m < M; ++m) {
        float *left = out + m * kPanel + g, *right = left + 16;
        store(left, begin ? load(left) + low[m] : low[m]);
        store(right, begin ? load(right) + high[m] : high[m]);
      }
    }
  }
}

template <int M, class W>
void multiply_rows(int rows, const float* x, int64_t ldx, const W* panel, int64_t in, float* out) {
  if (rows == M) return multiply_panel<M>(x, ldx, panel, in, out);
  if constexpr (M > 1) multiply_rows<M - 1>(rows, x, ldx, panel, in, out);
}

template <class T>
void finish_rows(const PackedLinear& a, int64_t row, int rows, int64_t column, float* sums) {
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
void multiply(const PackedLinear& a) {
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
          const W* panel = static_cast<const W*>(a.packed) + p * a.in * kPanel;
          multiply_rows<kRows>(rows, x + r * ldx, ldx, panel, a.in, sums);
          finish_rows<T>(a, r, rows, p * kPanel, sums);
        }
    }
  });
}

template <class T, class W>
void pack(const PackWeight& a) {
  parallel_for((a.out + kPanel - 1) / kPanel, 1 + 65536 / (a.in * kPanel + 1), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      W* panel = static_cast<W*>(a.packed) + p * a.in * kPanel;
      for (int64_t k = 0; k < a.in; ++k)
        for (int64_t j = 0; j < kPanel; ++j) {
          const int64_t slot = sizeof(W) == 4 ? j : j < 16 ? 2 * j : 2 * (j - 16) + 1, n = p * kPanel + j;
          from_float(panel[k * kPanel + slot],
                     n < a.out ? to_float(static_cast<const T*>(a.weight)[n * a.stride + k]) : 0.f);
        }
    }
  });
}

}  // namespace

void pack_weight(const PackWeight& a) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    a.storage == DType::f32 ? pack<T, float>(a) : pack<T, bf16>(a);
  });
}

void packed_linear(const PackedLinear& a) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    a.storage == DType::f32 ? multiply<T, float>(a) : multiply<T, bf16>(a);
  });
}

}  // namespace tf::TF_ISA
