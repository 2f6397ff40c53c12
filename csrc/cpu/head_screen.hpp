// The largest output of each row without computing all outputs. The int8 form of the weight, a quarter of its bytes,
// gives every output up to a bounded error: |x . w - x8 . w8| <= |x| |w - w8| + |x - x8| |w8|. Panels whose bounds
// exclude the largest output are skipped; the others are computed with the weight itself, 32 columns at a time.
#pragma once
#include "step_products.hpp"

namespace tf::TF_ISA {

class ScreenedArgmax : public StepProducts {
 protected:
  static constexpr int kPhasesOfArgmax = 5;
  using StepProducts::StepProducts;

  // Floats of memory that argmax needs.
  static int64_t argmax_floats(const StepWeight& w, const Int8Weight& screen, int64_t rows) {
    return Memory(nullptr, w, screen, rows).floats;
  }

  // Writes c.tokens (rows + 1,): per row the first index of the largest output that is not barred, NaN being above all;
  // then the number of panels that were computed.
  void argmax(const StepWeight& w, const HeadChoice& c, const float* x, int64_t ldx, float* memory) {
    const Memory m(memory, w, c.screen, rows_);
    const int64_t panels = m.panels;
    team_.phase(rows_, 1, [&](int64_t r) {
      const float* row = x + r * ldx;
      int8_->quantize(row, w.in, c.screen.group, m.x, r);
      measure(row, w.in, c.screen.group, m.x, r, m.size[r], m.error[r]);
    });
    team_.phase(panels, chunk_of(panels), [&](int64_t p) { bound(c, m, p); });
    team_.phase(1, 1, [&](int64_t) { select(m); });
    team_.phase(*m.count, 1, [&](int64_t i) { compute(w, c, m, m.chosen[i], i, x, ldx); });
    team_.phase(1, 1, [&](int64_t) {
      for (int64_t r = 0; r < rows_; ++r) {
        const float* best = m.best + r * panels;
        int64_t at = 0;
        for (int64_t i = 1; i < *m.count; ++i)
          if (above(best[i], best[at])) at = i;
        c.tokens[r] = m.index[r * panels + at];
      }
      c.tokens[rows_] = *m.count;
    });
  }

 private:
  struct Memory {
    int64_t panels, stride, floats = 0;
    Int8Rows x;
    float *size, *error;     // (rows,): |x|, |x - x8|
    float *upper, *lower;    // (rows, stride): the largest upper and lower bound per panel
    int32_t *chosen, *count; // panels to compute
    float* best;             // (rows, panels): the largest output of the i-th chosen panel, and its index
    int32_t* index;

    Memory(float* base, const StepWeight& w, const Int8Weight& screen, int64_t rows)
        : panels(panels_of(w)), stride(round_up(panels, kWidth)) {
      const auto take = [&](int64_t count) {
        float* at = base ? base + floats : nullptr;
        floats += round_up(count, 16);
        return at;
      };
      x.stride = int8_row_stride(w.in);
      x.groups = int8_groups(w.in, screen.group);
      x.values = reinterpret_cast<uint8_t*>(take(rows * x.stride / 4));
      x.scale = take(rows * x.groups);
      x.zero = take(rows * x.groups);
      size = take(rows);
      error = take(rows);
      upper = take(rows * stride);
      lower = take(rows * stride);
      chosen = reinterpret_cast<int32_t*>(take(panels));
      count = reinterpret_cast<int32_t*>(take(1));
      best = take(rows * panels);
      index = reinterpret_cast<int32_t*>(take(rows * panels));
    }
  };

  // Upper bounds of |x| and |x - x8| of a row.
  static void measure(const float* x, int64_t n, int64_t group, const Int8Rows& rows, int64_t r, float& size,
                      float& error) {
    const uint8_t* values = rows.values + r * rows.stride;
    float square = 0.f, off = 0.f;
    for (int64_t begin = 0, g = r * rows.groups; begin < n; begin += group, ++g) {
      const float scale = rows.scale[g], zero = rows.zero[g];
      float part = 0.f, apart = 0.f;
      for (int64_t k = begin; k < n && k < begin + group; ++k) {
        const float d = x[k] - scale * (float(values[k]) - zero);
        part += x[k] * x[k];
        apart += d * d;
      }
      square += part;
      off += apart;
    }
    const float tiny = 1e-18f * float(n);  // for squares that underflow
    size = 1.0001f * __builtin_sqrtf(square) + tiny;
    error = 1.0001f * __builtin_sqrtf(off) + tiny;
  }

  void bound(const HeadChoice& c, const Memory& m, int64_t p) const {
    alignas(64) float sums[kTogether * kPanel];
    const int64_t at = p * kPanel;
    for (int64_t first = 0; first < rows_; first += kTogether) {
      const int64_t rows = rows_ - first < kTogether ? rows_ - first : kTogether;
      int8_->product(c.screen, m.x, first, rows, p, sums);
      for_barred(c.barred, c.barred_count, at, [&](int64_t column) {
        for (int64_t r = 0; r < rows; ++r) sums[r * kPanel + column] = -1e38f;
      });
      for (int64_t r = 0; r < rows; ++r) {
        const Vec size = broadcast(m.size[first + r]), error = broadcast(m.error[first + r]);
        Vec upper = broadcast(-INFINITY), lower = upper, odd = {};
        for (int64_t k = 0; k < kPanel; k += kWidth) {
          const Vec start = load(c.start + at + k), v = load(sums + r * kPanel + k) + start;
          Vec apart = fma(load(c.error + at + k), size, load(c.size + at + k) * error);
          apart = fma(abs(start), broadcast(2.4e-7f), apart);  // rounding of the bias addition
          const Vec high = v + apart;
          upper = max(high, upper);
          lower = max(v - apart, lower);
          odd = fma(high, Vec{}, odd);  // NaN where a bound is not finite
        }
        m.upper[(first + r) * m.stride + p] = max_of(upper) + sum(odd);
        m.lower[(first + r) * m.stride + p] = max_of(lower);
      }
    }
  }

  void select(const Memory& m) const {
    for (int64_t p = 0; p < m.panels; ++p) m.chosen[p] = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      const float *upper = m.upper + r * m.stride, *lower = m.lower + r * m.stride;
      float least = -INFINITY;
      for (int64_t p = 0; p < m.panels; ++p) least = lower[p] > least ? lower[p] : least;
      for (int64_t p = 0; p < m.panels; ++p) m.chosen[p] |= !(upper[p] < least);
    }
    int32_t count = 0;
    for (int64_t p = 0; p < m.panels; ++p)
      if (m.chosen[p]) m.chosen[count++] = int32_t(p);
    *m.count = count;
  }

  void compute(const StepWeight& w, const HeadChoice& c, const Memory& m, int64_t p, int64_t place, const float* x,
               int64_t ldx) const {
    alignas(64) float sums[kRows * kPanel];
    const int64_t at = p * kPanel, columns = w.out - at < kPanel ? w.out - at : kPanel;
    for (int64_t first = 0; first < rows_; first += kRows) {
      const int rows = rows_ - first < kRows ? int(rows_ - first) : kRows;
      multiply(w, p, rows, x + first * ldx, ldx, true, sums);
      for (int r = 0; r < rows; ++r) {
        float* v = sums + r * kPanel;
        if (w.bias)
          for (int64_t k = 0; k < columns; ++k) v[k] += w.bias[at + k];
        for_barred(c.barred, c.barred_count, at, [&](int64_t column) { v[column] = -INFINITY; });
        int64_t best = 0;
        for (int64_t k = 1; k < columns; ++k)
          if (above(v[k], v[best])) best = k;
        m.best[(first + r) * m.panels + place] = v[best];
        m.index[(first + r) * m.panels + place] = int32_t(at + best);
      }
    }
  }
};

}  // namespace tf::TF_ISA
