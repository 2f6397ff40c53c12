// The largest output of each row, found while the outputs are computed: they are not written to memory.
#pragma once
#include "step_products.hpp"

namespace tf::TF_ISA {

class HeadArgmax : public StepProducts {
 protected:
  using StepProducts::StepProducts;

  // Resets every thread's best of the row; called in a phase before argmax.
  void begin_argmax(const RowChoice& c, int64_t row) const {
    for (int64_t t = 0; t < threads_; ++t) c.best[t * best_stride(rows_) + row] = {-INFINITY, INT32_MAX};
  }

  // Writes c.tokens: per row the first index of the largest output of w, after finish, NaN being above all. Barred
  // outputs count as -infinity. Two phases.
  void argmax(const StepWeight& w, const RowChoice& c, const StepInput& in, Finish f) {
    RowBest* best = c.best + index_ * best_stride(rows_);
    f.stride = kPanel;
    const int64_t panels = panels_of(w);
    team_.phase(panels, chunk_of(panels), [&](int64_t p) {
      alignas(64) float y[kTogether * kPanel];
      const int64_t at = p * kPanel, columns = w.out - at < kPanel ? w.out - at : kPanel;
      const int64_t together = in.int8 ? kTogether : kRows;
      for (int64_t first = 0; first < rows_; first += together) {
        const int64_t rows = rows_ - first < together ? rows_ - first : together;
        if (in.int8)
          int8_->product(int8_of(w), *in.int8, first, rows, p, y);
        else
          multiply(w, p, int(rows), in.x + first * in.stride, in.stride, first == 0, y);
        finish(w, f, y, int(rows), at, y, nullptr);
        for_barred(c.barred, c.barred_count, at, [&](int64_t column) {
          for (int64_t r = 0; r < rows; ++r) y[r * kPanel + column] = -INFINITY;
        });
        for (int64_t r = 0; r < rows; ++r) improve(best[first + r], y + r * kPanel, columns, at);
      }
    });
    team_.phase(rows_, 1, [&](int64_t r) {
      RowBest found = c.best[r];
      for (int64_t t = 1; t < threads_; ++t) take(found, c.best[t * best_stride(rows_) + r]);
      c.tokens[r] = found.index;
    });
  }

 private:
  // Keeps the larger of the two, or of equal ones the first index, in whatever order they come.
  static void take(RowBest& best, const RowBest& other) {
    if (above(other.value, best.value) || (!above(best.value, other.value) && other.index < best.index)) best = other;
  }

  static void improve(RowBest& best, const float* y, int64_t columns, int64_t at) {
    if (columns == kPanel) {
      Vec top = load(y), odd = fma(top, Vec{}, Vec{});
      for (int64_t k = kWidth; k < kPanel; k += kWidth) {
        const Vec v = load(y + k);
        top = max(v, top);
        odd = fma(v, Vec{}, odd);  // NaN where a value is not finite
      }
      if (max_of(top) < best.value && sum(odd) == 0.f) return;
    }
    for (int64_t k = 0; k < columns; ++k) take(best, {y[k], int32_t(at + k)});
  }
};

}  // namespace tf::TF_ISA
