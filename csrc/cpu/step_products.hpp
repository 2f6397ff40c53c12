// The products of a decoding step: a few rows with weights of any layout, shared out among a team of threads.
#pragma once
#include "activation_math.hpp"
#include "linear_direct.hpp"
#include "step_weight.hpp"
#include "team.hpp"

namespace tf::TF_ISA {

// Columns of a weight (in, out) that are gone through together, at most: their sums must stay near.
constexpr int64_t split_width(int64_t rows) { return rows < 4 ? 1024 : 256; }

// What becomes of a product: y = [y +] activation(scale * product + bias) [* (gate product + gate bias)], and
// softcap * tanh(y / softcap) where there is one.
struct Finish {
  float* y;
  int64_t stride;
  float scale = 1.f, softcap = 0.f;
  bool add = false;
  bool has_activation = false;
  Activation activation = Activation::relu;
  const StepWeight* gate = nullptr;
};

template <class F>
static void finish_columns(const StepWeight& w, const Finish& f, int64_t row, int rows, int64_t column, const float* sums,
                    const float* gates, const F& activate) {
  const int64_t n = w.out - column < kPanel ? w.out - column : kPanel;
  for (int m = 0; m < rows; ++m) {
    float* y = f.y + (row + m) * f.stride + column;
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

static inline int64_t panels_of(const StepWeight& w) { return (w.out + kPanel - 1) / kPanel; }

// sums (kRows, 32): those of a panel. first: of the blocks of rows that it meets.
template <class W>
static void multiply(const StepWeight& w, int64_t panel, int rows, const float* x, int64_t ldx, bool first, float* sums) {
  const W* data = static_cast<const W*>(w.data);
  if (w.layout == WeightLayout::panels)
    return multiply_rows(rows, x, ldx, data + panel * panel_slots<W>(w.in), w.in, first, sums);
  if constexpr (sizeof(W) > 1) {
    const int64_t begin = panel * kPanel, columns = w.out - begin < kPanel ? w.out - begin : kPanel;
    multiply_rows_of(rows, x, ldx, data + begin * w.stride, w.stride, columns, w.in, first, sums);
  }
}

static void multiply(const StepWeight& w, int64_t panel, int rows, const float* x, int64_t ldx, bool first, float* sums) {
  if (w.storage == Storage::f32) return multiply<float>(w, panel, rows, x, ldx, first, sums);
  w.storage == Storage::i8 ? multiply<int8_t>(w, panel, rows, x, ldx, first, sums)
                         : multiply<bf16>(w, panel, rows, x, ldx, first, sums);
}

class StepProducts {
 protected:
  // rows: of this step, at most most_rows. split: memory for split_floats() of each row of those, and int8: its kernels,
  // where a weight needs them.
  StepProducts(PhaseCounter* counters, int64_t rows, int64_t threads, int64_t most_rows = 0, float* split = nullptr,
               const Int8Kernels* int8 = nullptr)
      : team_(counters), rows_(rows), threads_(threads), most_rows_(most_rows), int8_(int8), split_(split) {}

  void linear(const StepWeight& w, const float* x, int64_t ldx, const Finish& f) { linear(&w, 1, x, ldx, f); }

  // Of up to three weights side by side.
  void linear(const StepWeight* weights, int count, const float* x, int64_t ldx, Finish f) {
    int64_t panels = 0, ends[3] = {};
    bool split = false, int8 = false, all_int8 = true;
    for (int i = 0; i < count && weights[i].data; ++i) {
      int8 |= weights[i].layout == WeightLayout::int8;
      all_int8 &= weights[i].layout == WeightLayout::int8 && weights[i].group == weights[0].group;
    }
    if (int8 && all_int8 && (!f.gate || f.gate->layout == WeightLayout::int8))
      return linear_int8(weights, count, x, ldx, f);
    split |= int8;
    for (int i = 0; i < count; ++i) {
      split |= weights[i].data && weights[i].layout == WeightLayout::columns;
      ends[i] = panels += weights[i].data ? panels_of(weights[i]) : 0;
    }
    if (split) {
      for (int i = 0; i < count && weights[i].data; f.y += weights[i++].out)
        weights[i].layout == WeightLayout::columns ? split_linear(weights[i], x, ldx, f) : linear(weights[i], x, ldx, f);
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
        finish(w, own, r, rows, p * kPanel, sums, f.gate ? gates : nullptr);
      }
    });
  }

  // In int8: the rows of x are quantised first.
  void linear_int8(const StepWeight* weights, int count, const float* x, int64_t ldx, const Finish& f) {
    Int8Weight parts[3] = {}, gate{};
    int64_t panels = 0, ends[3] = {};
    for (int i = 0; i < count; ends[i++] = panels) {
      if (!weights[i].data) continue;
      parts[i] = int8_of(weights[i]);
      panels += panels_of(weights[i]);
    }
    if (f.gate) gate = int8_of(*f.gate);
    Int8Rows rows{};
    rows.stride = int8_row_stride(parts[0].in);
    rows.groups = int8_groups(parts[0].in, parts[0].group);
    rows.scale = split_;
    rows.zero = rows.scale + most_rows_ * rows.groups;
    rows.values = reinterpret_cast<uint8_t*>(rows.zero + most_rows_ * rows.groups);
    team_.phase(rows_, 1, [&](int64_t r) { int8_->quantize(x + r * ldx, parts[0].in, parts[0].group, rows, r); });
    team_.phase(panels, chunk_of(panels), [&](int64_t p) {
      int i = 0;
      Finish own = f;
      for (; p >= ends[i]; ++i) own.y += weights[i].out;
      p -= i ? ends[i - 1] : 0;
      constexpr int64_t kTogether = 24;
      alignas(64) float sums[kTogether * kPanel], gates[kTogether * kPanel];
      for (int64_t r = 0; r < rows_; r += kTogether) {
        const int64_t n = rows_ - r < kTogether ? rows_ - r : kTogether;
        int8_->product(parts[i], rows, r, n, p, sums);
        if (f.gate) int8_->product(gate, rows, r, n, p, gates);
        finish(weights[i], own, r, int(n), p * kPanel, sums, f.gate ? gates : nullptr);
      }
    });
  }

  static Int8Weight int8_of(const StepWeight& w) {
    return {static_cast<const int8_t*>(w.data), w.bias, w.out, w.in, w.group};
  }

  // Of a weight (in, out). Its rows are read from end to end, which memory likes best, and so the products with some of
  // them are done first and added up afterwards. The parts do not depend on the number of threads.
  void split_linear(const StepWeight& w, const float* x, int64_t ldx, const Finish& f) {
    const int64_t blocks = (w.in + kSplitDepth - 1) / kSplitDepth, panels = panels_of(w), ldo = panels * kPanel;
    const int64_t cuts = (w.out + split_width(rows_) - 1) / split_width(rows_), width = (panels + cuts - 1) / cuts * kPanel;
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
        finish(w, f, r, 1, p * kPanel, sums, nullptr);
      }
    });
  }

  int64_t chunk_of(int64_t panels) const {
    const int64_t chunk = panels / (8 * threads_);
    return chunk < 1 ? 1 : chunk > 8 ? 8 : chunk;
  }

  void finish(const StepWeight& w, const Finish& f, int64_t row, int rows, int64_t column, const float* sums,
              const float* gates) {
    if (!f.has_activation) return finish_columns(w, f, row, rows, column, sums, gates, [](Vec v) { return v; });
    with_activation(f.activation, [&](auto activation) {
      finish_columns(w, f, row, rows, column, sums, gates, [](Vec v) {
        Vec y, slope;
        decltype(activation)::compute(v, y, slope);
        return y;
      });
    });
  }

  Team team_;
  const int64_t rows_, threads_, most_rows_;
  const Int8Kernels* int8_;

 private:
  float* split_;
};

}  // namespace tf::TF_ISA
