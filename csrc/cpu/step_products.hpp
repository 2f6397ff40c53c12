// The products of a decoding step: a few rows with weights of any layout, by a team of threads.
#pragma once
#include "activation_math.hpp"
#include "linear_direct.hpp"
#include "step_weight.hpp"
#include "team.hpp"

namespace tf::TF_ISA {

// Columns of a weight (in, out) per item, at most: their sums must stay in the cache.
constexpr int64_t split_width(int64_t rows) { return rows < 4 ? 1024 : 256; }

// The operations after a product: y = [y +] activation(scale * product + bias) [* (gate product + gate bias)], then
// softcap * tanh(y / softcap) if softcap is not 0.
struct Finish {
  float* y;
  int64_t stride;
  float scale = 1.f, softcap = 0.f;
  bool add = false;
  bool has_activation = false;
  Activation activation = Activation::relu;
  const StepWeight* gate = nullptr;
  const Int8Rows* int8 = nullptr;  // y in u8, in groups of int8_group, instead of y: only for int8 weights without add
  int64_t int8_group = 0;
};

// Rows that a product reads. int8: the same rows in u8, or null.
struct StepInput {
  const float* x;
  int64_t stride;
  const Int8Rows* int8 = nullptr;
};

// y: of the first row and column.
template <class F>
static void finish_columns(const StepWeight& w, const Finish& f, float* y, int rows, int64_t column, const float* sums,
                           const float* gates, const F& activate) {
  const int64_t n = w.out - column < kPanel ? w.out - column : kPanel;
  for (int m = 0; m < rows; ++m, y += f.stride) {
    for_columns(n, [&](int64_t c, auto part) {
      Vec v = load(sums + m * kPanel + c) * f.scale;
      if (w.bias) v = v + load(w.bias + column + c, part);
      v = activate(v);
      if (gates) {
        const Vec g = load(gates + m * kPanel + c);
        v = v * (f.gate->bias ? g + load(f.gate->bias + column + c, part) : g);
      }
      if (f.softcap > 0.f) v = tanh_accurate(v * (1.f / f.softcap)) * f.softcap;
      store(y + c, f.add ? v + load(y + c, part) : v, part);
    });
  }
}

// NaN is above everything, as it is for torch.argmax.
static inline bool above(float a, float b) { return a > b || (a != a && b == b); }

// f(column of the panel) for the barred outputs in the panel that begins at output `begin`.
template <class F>
static inline void for_barred(const int64_t* barred, int64_t count, int64_t begin, const F& f) {
  for (int64_t i = 0; i < count; ++i)
    if (barred[i] >= begin && barred[i] < begin + kPanel) f(barred[i] - begin);
}

static inline int64_t panels_of(const StepWeight& w) { return (w.out + kPanel - 1) / kPanel; }

// sums (kRows, 32) = rows of x times one panel. first: the panel's first block of rows.
template <class W>
static void multiply(const StepWeight& w, int64_t panel, int rows, const float* x, int64_t ldx, bool first,
                     float* sums) {
  const W* data = static_cast<const W*>(w.data);
  if (w.layout == WeightLayout::panels)
    return multiply_rows(rows, x, ldx, data + panel * panel_slots<W>(w.in), w.in, first, sums);
  if constexpr (sizeof(W) > 1) {
    const int64_t begin = panel * kPanel, columns = w.out - begin < kPanel ? w.out - begin : kPanel;
    multiply_rows_of(rows, x, ldx, data + begin * w.stride, w.stride, columns, w.in, first, sums);
  }
}

static void multiply(const StepWeight& w, int64_t panel, int rows, const float* x, int64_t ldx, bool first,
                     float* sums) {
  if (w.storage == Storage::f32) return multiply<float>(w, panel, rows, x, ldx, first, sums);
  w.storage == Storage::i8 ? multiply<int8_t>(w, panel, rows, x, ldx, first, sums)
                         : multiply<bf16>(w, panel, rows, x, ldx, first, sums);
}

class StepProducts {
 protected:
  static constexpr int64_t kTogether = 24;  // rows per int8 product

  // index: this thread's. rows: of this step, at most most_rows. split: split_floats() per row of most_rows. int8: the
  // int8 kernels. split and int8 may be null if no weight needs them.
  StepProducts(PhaseCounter* counters, int64_t index, int64_t threads, int64_t rows, int64_t most_rows = 0,
               float* split = nullptr, const Int8Kernels* int8 = nullptr)
      : team_(counters, index, threads),
        index_(index),
        rows_(rows),
        threads_(threads),
        most_rows_(most_rows),
        int8_(int8),
        split_(split) {}

  void linear(const StepWeight& w, const float* x, int64_t ldx, const Finish& f) { linear(&w, 1, {x, ldx}, f); }
  void linear(const StepWeight& w, const StepInput& in, const Finish& f) { linear(&w, 1, in, f); }

  // Up to three weights, outputs side by side.
  void linear(const StepWeight* weights, int count, const StepInput& in, Finish f) {
    const float* x = in.x;
    const int64_t ldx = in.stride;
    if (reads_int8(weights, count) && (!f.gate || f.gate->layout == WeightLayout::int8))
      return linear_int8(weights, count, in, f);
    int64_t panels = 0, ends[3] = {};
    bool split = false;
    for (int i = 0; i < count; ++i) {
      split |= weights[i].data && weights[i].layout >= WeightLayout::columns;
      ends[i] = panels += weights[i].data ? panels_of(weights[i]) : 0;
    }
    if (split) {
      for (int i = 0; i < count && weights[i].data; f.y += weights[i++].out)
        weights[i].layout == WeightLayout::columns ? split_linear(weights[i], x, ldx, f)
                                                   : linear(weights[i], StepInput{x, ldx}, f);
      return;
    }
    team_.phase(panels, chunk_of(panels), [&](int64_t p) {
      int i = 0;
      Finish own = f;
      for (; p >= ends[i]; ++i) own.y += weights[i].out;
      const StepWeight& w = weights[i];
      p -= i ? ends[i - 1] : 0;
      alignas(64) float sums[kRows * kPanel], gates[kRows * kPanel];
      for (int64_t r = 0; r < rows_; r += kRows) {
        const int rows = rows_ - r < kRows ? int(rows_ - r) : kRows;
        multiply(w, p, rows, x + r * ldx, ldx, r == 0, sums);
        if (f.gate) multiply(*f.gate, p, rows, x + r * ldx, ldx, r == 0, gates);
        finish(w, own, own.y + r * own.stride + p * kPanel, rows, p * kPanel, sums, f.gate ? gates : nullptr);
      }
    });
  }

  // Whether all weights are int8 with one group size, so that one int8 product covers them.
  static bool reads_int8(const StepWeight* weights, int count) {
    for (int i = 0; i < count && weights[i].data; ++i)
      if (weights[i].layout != WeightLayout::int8 || weights[i].group != weights[0].group) return false;
    return weights[0].data;
  }

  // Memory for the rows that w reads in u8. beside: another weight whose rows must be kept, or null.
  Int8Rows int8_room(const StepWeight& w, const StepWeight* beside = nullptr) const {
    Int8Rows rows{};
    rows.stride = int8_row_stride(w.in);
    rows.groups = int8_groups(w.in, w.group);
    rows.scale = split_ + (beside ? most_rows_ * int8_row_floats(beside->in, beside->group) : 0);
    rows.zero = rows.scale + most_rows_ * rows.groups;
    rows.values = reinterpret_cast<uint8_t*>(rows.zero + most_rows_ * rows.groups);
    return rows;
  }

  // Quantises n inputs of a row from `column` on, a multiple of group.
  void quantize(int64_t group, const float* x, int64_t n, const Int8Rows& to, int64_t row, int64_t column) const {
    const Int8Rows at{to.values + column, to.scale + column / group, to.zero + column / group, to.stride, to.groups};
    int8_->quantize(x, n, group, at, row);
  }

  // The product in int8. Rows that are not quantised yet are quantised first.
  void linear_int8(const StepWeight* weights, int count, const StepInput& in, const Finish& f) {
    Int8Weight parts[3] = {}, gate{};
    int64_t panels = 0, ends[3] = {};
    for (int i = 0; i < count; ends[i++] = panels) {
      if (!weights[i].data) continue;
      parts[i] = int8_of(weights[i]);
      panels += panels_of(weights[i]);
    }
    if (f.gate) gate = int8_of(*f.gate);
    Int8Rows rows;
    if (in.int8) {
      rows = *in.int8;
    } else {
      rows = int8_room(weights[0]);
      team_.phase(rows_, 1, [&](int64_t r) {
        quantize(weights[0].group, in.x + r * in.stride, weights[0].in, rows, r, 0);
      });
    }
    // Panel p of the products with rows r .. r + n - 1. y: of row r and the panel's first column.
    const auto product = [&](int i, const Finish& own, int64_t p, int64_t r, int64_t n, float* y) {
      alignas(64) float sums[kTogether * kPanel], gates[kTogether * kPanel];
      int8_->product(parts[i], rows, r, n, p, sums);
      if (f.gate) int8_->product(gate, rows, r, n, p, gates);
      finish(weights[i], own, y, int(n), p * kPanel, sums, f.gate ? gates : nullptr);
    };
    if (f.int8) {
      const StepWeight& w = weights[0];
      Finish own = f;
      const int64_t width = int8_columns(f.int8_group);
      own.stride = width;
      team_.phase((w.out + width - 1) / width, 1, [&](int64_t block) {
        alignas(64) float y[kTogether * kInt8Group];
        const int64_t begin = block * width, n = w.out - begin < width ? w.out - begin : width;
        for (int64_t r = 0; r < rows_; r += kTogether) {
          const int64_t count = rows_ - r < kTogether ? rows_ - r : kTogether;
          for (int64_t c = 0; c < n; c += kPanel) product(0, own, (begin + c) / kPanel, r, count, y + c);
          for (int64_t m = 0; m < count; ++m) quantize(f.int8_group, y + m * width, n, *f.int8, r + m, begin);
        }
      });
      return;
    }
    team_.phase(panels, chunk_of(panels), [&](int64_t p) {
      int i = 0;
      Finish own = f;
      for (; p >= ends[i]; ++i) own.y += weights[i].out;
      p -= i ? ends[i - 1] : 0;
      for (int64_t r = 0; r < rows_; r += kTogether)
        product(i, own, p, r, rows_ - r < kTogether ? rows_ - r : kTogether, own.y + r * own.stride + p * kPanel);
    });
  }

  // The number of outputs that a thread computes and then quantises in groups.
  static int64_t int8_columns(int64_t group) { return group < 128 ? 128 : group; }

  static Int8Weight int8_of(const StepWeight& w) {
    return {static_cast<const int8_t*>(w.data), w.bias, w.out, w.in, w.group};
  }

  // Of a weight (in, out). Its rows are read end to end, which is best for memory bandwidth: an item is the product
  // with some of the rows, and the parts are added up afterwards. They do not depend on the number of threads.
  void split_linear(const StepWeight& w, const float* x, int64_t ldx, const Finish& f) {
    const int64_t blocks = (w.in + kSplitDepth - 1) / kSplitDepth, panels = panels_of(w), ldo = panels * kPanel;
    const int64_t cuts = (w.out + split_width(rows_) - 1) / split_width(rows_);
    const int64_t width = (panels + cuts - 1) / cuts * kPanel;
    team_.phase(blocks * cuts, 1, [&](int64_t item) {
      const int64_t begin = item / cuts * kSplitDepth, column = item % cuts * width;
      const int64_t depth = w.in - begin < kSplitDepth ? w.in - begin : kSplitDepth;
      const int64_t columns = w.out - column < width ? w.out - column : width, at = begin * w.stride + column;
      for (int64_t r = 0; r < rows_ && columns > 0; r += kRows) {
        const int rows = rows_ - r < kRows ? int(rows_ - r) : kRows;
        const float* from = x + r * ldx + begin;
        float* to = split_ + (item / cuts * rows_ + r) * ldo + column;
        if (w.storage == Storage::f32)
          multiply_columns_of<kRows>(rows, from, ldx, static_cast<const float*>(w.data) + at, w.stride, columns, depth,
                                     to, ldo);
        else
          multiply_columns_of<kRows>(rows, from, ldx, static_cast<const bf16*>(w.data) + at, w.stride, columns, depth,
                                     to, ldo);
      }
    });
    team_.phase(panels, chunk_of(panels), [&](int64_t p) {
      alignas(64) float sums[kPanel];
      for (int64_t r = 0; r < rows_; ++r) {
        for (int c = 0; c < kPanel; c += kWidth) {
          Vec sum = {};
          for (int64_t i = 0; i < blocks; ++i) sum = sum + load(split_ + (i * rows_ + r) * ldo + p * kPanel + c);
          store(sums + c, sum);
        }
        finish(w, f, f.y + r * f.stride + p * kPanel, 1, p * kPanel, sums, nullptr);
      }
    });
  }

  int64_t chunk_of(int64_t panels) const {
    const int64_t chunk = panels / (8 * threads_);
    return chunk < 1 ? 1 : chunk > 8 ? 8 : chunk;
  }

  void finish(const StepWeight& w, const Finish& f, float* y, int rows, int64_t column, const float* sums,
              const float* gates) {
    if (!f.has_activation) return finish_columns(w, f, y, rows, column, sums, gates, [](Vec v) { return v; });
    with_activation(f.activation, [&](auto activation) {
      finish_columns(w, f, y, rows, column, sums, gates, [](Vec v) {
        Vec y, slope;
        decltype(activation)::compute(v, y, slope);
        return y;
      });
    });
  }

  Team team_;
  const int64_t index_, rows_, threads_, most_rows_;
  const Int8Kernels* int8_;

 private:
  float* split_;
};

}  // namespace tf::TF_ISA
