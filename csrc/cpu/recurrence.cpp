// A GRU or LSTM through all its steps in one call, by threads that do not sleep between steps. An item is 32 columns of
// the state with all their gates, so that a step is one product, the arithmetic of the gates on results still in the
// cache, and one barrier. Sequences that have ended are not computed.
#include "recurrence.hpp"

#include "attention_tile.hpp"
#include "kernels.hpp"
#include "linear_panel.hpp"
#include "parallel.hpp"
#include "recurrence_cell.hpp"
#include "team.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int kTile = kWidth == 16 ? 12 : 6;  // rows in registers at once: 2 kTile accumulators
constexpr int64_t kTogether = 32;             // rows multiplied by a panel in one item
// Products per running sum, at most: long sums lose digits. For few rows other libraries compute dot products, whose
// many partial sums lose little; short runs lose as little.
constexpr int64_t kLongRun = 128, kShortRun = 16, kFewRows = 4;
constexpr int64_t kFetchAhead = 1024;  // floats

// out (rows, 32) = x (rows, in) times one panel. fetch: the panel is not in the cache yet.
template <int M = kTile>
static void multiply_tile(int64_t rows, bool fetch, const float* x, int64_t ldx, const float* panel, int64_t in,
                          float* out) {
  if (rows == M) {
    constexpr int64_t longest = M <= kFewRows ? kShortRun : kLongRun;
    const int64_t runs = (in + longest - 1) / longest, run = (in + runs - 1) / runs;
    return fetch ? multiply_panel<M, true>(x, ldx, panel, in, run, kFetchAhead, out)
                 : multiply_panel<M, false>(x, ldx, panel, in, run, 0, out);
  }
  if constexpr (M > 1) multiply_tile<M - 1>(rows, fetch, x, ldx, panel, in, out);
}

// out (rows, 32) = x (rows, in) times one panel, in tiles with about the same number of rows.
static void multiply(int64_t rows, const float* x, int64_t ldx, const float* panel, int64_t in, float* out) {
  const int64_t tiles = (rows + kTile - 1) / kTile;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t r = rows * t / tiles;
    multiply_tile(rows * (t + 1) / tiles - r, t == 0, x + r * ldx, ldx, panel, in, out + r * kPanel);
  }
}

// Prefetches a panel's columns of a row.
template <class T>
static inline void fetch(const T* row) {
  for (int64_t i = 0; i < kPanel; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// The rows of a batch in the order of sequence lengths, and the loop over steps.
class Steps {
 public:
  explicit Steps(const Recurrence& a)
      : a_(a),
        gates_(gates_of(a.cell)),
        panels_((a.width + kPanel - 1) / kPanel),
        padded_(round_up(a.width, kPanel)),
        blocks_((a.batch + kTogether - 1) / kTogether) {}

  int64_t sequence(int64_t row) const { return a_.order[row]; }
  int64_t length(int64_t row) const { return a_.lengths[sequence(row)]; }
  int64_t position(int64_t row, int64_t step) const {
    return a_.offsets[sequence(row)] + (a_.reverse ? length(row) - 1 - step : step);
  }
  // How many rows have a step `step`: they are the first ones.
  int64_t live(int64_t step) const {
    if (step >= a_.steps) return 0;
    int64_t n = a_.batch;
    while (n && length(n - 1) <= step) --n;
    return n;
  }

  // f(step, row, rows, panel) for each block of rows and 32 columns of a step; a barrier follows every step.
  template <class F>
  void run(int64_t first, int64_t last, const F& f) const {
    const int64_t direction = first <= last ? 1 : -1, count = (last - first) * direction + 1;
    PhaseCounter* counters = scratch<PhaseCounter>(3, count);
    __builtin_memset(static_cast<void*>(counters), 0, size_t(count) * sizeof(PhaseCounter));
    // A barrier costs as much as some ten thousand products.
    const int64_t work = a_.batch * a_.width * gates_ * a_.width, useful = 1 + work / (1 << 17);
    const int64_t threads = least(least(tf_num_threads(), useful), panels_ * blocks_);
    parallel_for(threads, 1, [&](int64_t index, int64_t) {
      Team team(counters, index, threads);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t step = first + i * direction, rows = step < 0 ? a_.batch : live(step);
        const int64_t blocks = (rows + kTogether - 1) / kTogether, items = panels_ * blocks;
        team.phase(items, 1, [&](int64_t item) {
          const int64_t row = item % blocks * kTogether;
          f(step, row, least(kTogether, rows - row), item / blocks);
        });
      }
    });
  }

 protected:
  const Recurrence& a_;
  int64_t gates_, panels_, padded_, blocks_;
};

template <class T>
class Forward : Steps {
 public:
  explicit Forward(const RecurrenceForward& a) : Steps(a), a_(a), out_(static_cast<T*>(a.out)) {
    const int64_t plane = a.batch * padded_;
    hidden_[0] = scratch<float>(4, 3 * plane);
    hidden_[1] = hidden_[0] + plane;
    memory_ = hidden_[1] + plane;
  }

  void run() {
    const int64_t h = a_.width;
    for (int64_t r = 0; r < a_.batch; ++r) {
      const int64_t b = sequence(r) * h;
      const bool none = !length(r);
      for_columns(h, [&](int64_t c, auto part) {
        const auto begin = [&](const void* from, float* to, void* last) {
          const Vec v = load(static_cast<const T*>(from) + b + c, part);
          store(to + r * padded_ + c, v);
          if (none) store(static_cast<T*>(last) + b + c, v, part);
        };
        begin(a_.hidden, hidden_[0], a_.last_hidden);
        if (a_.cell == Cell::lstm) begin(a_.memory, memory_, a_.last_memory);
      });
    }
    if (!a_.steps) return;
    Steps::run(0, a_.steps - 1, [&](int64_t step, int64_t row, int64_t rows, int64_t panel) {
      block(step, row, rows, panel);
    });
  }

 private:
  void block(int64_t step, int64_t row, int64_t rows, int64_t panel) {
    alignas(64) float sums[4][kTogether * kPanel];
    const float* x = hidden_[step & 1] + row * padded_;
    for (int64_t g = 0; g < gates_; ++g) {
      for (int64_t r = 0; r < rows; ++r) fetch(gates(position(row + r, step)) + g * a_.width + panel * kPanel);
      multiply(rows, x, padded_, a_.panels + (g * panels_ + panel) * a_.width * kPanel, a_.width, sums[g]);
    }
    for (int64_t r = 0; r < rows; ++r)
      a_.cell == Cell::lstm ? lstm_row(step, row + r, panel, sums, r * kPanel)
                            : gru_row(step, row + r, panel, sums, r * kPanel);
  }

  // f(column, column in the panel, part) over the columns of a panel.
  template <class F>
  void columns(int64_t panel, const F& f) const {
    const int64_t first = panel * kPanel;
    for_columns(least(kPanel, a_.width - first), [&](int64_t c, auto part) { f(first + c, c, part); });
  }

  const T* gates(int64_t at) const { return static_cast<const T*>(a_.gates) + at * a_.gates_stride; }

  template <class Part>
  void give(int64_t step, int64_t row, int64_t at, int64_t c, Part part, Vec hidden) {
    store(hidden_[(step + 1) & 1] + row * padded_ + c, hidden);
    store(out_ + at * a_.width + c, hidden, part);
    if (step + 1 == length(row)) store(static_cast<T*>(a_.last_hidden) + sequence(row) * a_.width + c, hidden, part);
  }

  void lstm_row(int64_t step, int64_t row, int64_t panel, const float (*sums)[kTogether * kPanel], int64_t from) {
    const int64_t h = a_.width, at = position(row, step);
    const T* x = gates(at);
    columns(panel, [&](int64_t c, int64_t k, auto part) {
      Vec v[4];
      for (int g = 0; g < 4; ++g) {
        v[g] = load(sums[g] + from + k) + load(x + g * h + c, part);
        if (a_.bias) v[g] = v[g] + load(a_.bias + g * h + c, part);
      }
      float* memory = memory_ + row * padded_ + c;
      const Vec m = lstm_memory(v, load(memory));
      store(memory, m);
      give(step, row, at, c, part, v[3] * tanh_accurate(m));
      if (step + 1 == length(row)) store(static_cast<T*>(a_.last_memory) + sequence(row) * h + c, m, part);
      if (!a_.saved) return;
      for (int g = 0; g < 4; ++g) store(a_.saved + (at * 4 + g) * h + c, v[g], part);
      store(a_.memories + at * h + c, m, part);
    });
  }

  void gru_row(int64_t step, int64_t row, int64_t panel, const float (*sums)[kTogether * kPanel], int64_t from) {
    const int64_t h = a_.width, at = position(row, step);
    const T* x = gates(at);
    columns(panel, [&](int64_t c, int64_t k, auto part) {
      Vec v[3], in[3];
      for (int g = 0; g < 3; ++g) {
        v[g] = load(sums[g] + from + k);
        in[g] = load(x + g * h + c, part);
        if (a_.bias) v[g] = v[g] + load(a_.bias + g * h + c, part);
      }
      give(step, row, at, c, part, gru_hidden(in, v, load(hidden_[step & 1] + row * padded_ + c)));
      if (!a_.saved) return;
      float* saved = a_.saved + at * 4 * h + c;
      for (int g = 0; g < 3; ++g) store(saved + g * h, in[g], part);
      store(saved + 3 * h, v[2], part);
    });
  }

  const RecurrenceForward& a_;
  T* out_;
  float *hidden_[2], *memory_;
};

template <class T>
class Backward : Steps {
 public:
  explicit Backward(const RecurrenceBackward& a)
      : Steps(a), a_(a), inner_(gates_ * a.width), stride_(round_up(inner_, kWidth)) {
    const int64_t plane = a.batch * stride_;
    flow_[0] = scratch<float>(4, 2 * plane + a.batch * padded_);
    flow_[1] = flow_[0] + plane;
    carry_ = flow_[1] + plane;
  }

  void run() {
    Steps::run(a_.steps - 1, -1, [&](int64_t step, int64_t row, int64_t rows, int64_t panel) {
      // The gradient from the step after; rows without one begin with the gradient of the last state.
      alignas(64) float back[kTogether * kPanel];
      const int64_t after = step < 0 ? live(0) : live(step + 1), met = after < row ? 0 : least(rows, after - row);
      for (int64_t r = 0; r < rows && step >= 0; ++r) {
        const int64_t at = position(row + r, step);
        for (int64_t g = 0; g < 4; ++g) fetch(a_.saved + (at * 4 + g) * a_.width + panel * kPanel);
        if (a_.memories) fetch(a_.memories + at * a_.width + panel * kPanel);
        if (a_.grad_out) fetch(static_cast<const T*>(a_.grad_out) + at * a_.width + panel * kPanel);
      }
      multiply(met, flow_[(step + 1) & 1] + row * stride_, stride_, a_.panels + panel * inner_ * kPanel, inner_, back);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t first = panel * kPanel;
        for_columns(least(kPanel, a_.width - first), [&](int64_t c, auto part) {
          one(step, row + r, first + c, part, r < met ? back + r * kPanel + c : nullptr);
        });
      }
    });
  }

 private:
  template <class Part>
  static Vec maybe(const void* p, int64_t at, Part part) {
    return p ? load(static_cast<const T*>(p) + at, part) : Vec{};
  }

  // kWidth columns of one row's step. back: the gradient through the product, or null where the row ends here.
  template <class Part>
  void one(int64_t step, int64_t row, int64_t c, Part part, const float* back) {
    const int64_t h = a_.width, b = sequence(row), end = b * h + c;
    const bool lstm = a_.cell == Cell::lstm;
    float* carry = carry_ + row * padded_ + c;
    Vec grad = back ? load(back) : maybe(a_.grad_last_hidden, end, part), carried = Vec{};
    if (back)
      carried = load(carry);
    else if (lstm)
      carried = maybe(a_.grad_last_memory, end, part);
    if (!lstm) grad = grad + carried;
    if (step < 0) {
      store(static_cast<T*>(a_.grad_hidden) + end, grad, part);
      if (lstm) store(static_cast<T*>(a_.grad_memory) + end, carried, part);
      return;
    }
    const int64_t at = position(row, step), before = at + (a_.reverse ? 1 : -1);
    grad = grad + maybe(a_.grad_out, at * h + c, part);
    const float* saved = a_.saved + at * 4 * h + c;
    Vec s[4], d[4];
    for (int g = 0; g < 4; ++g) s[g] = load(saved + g * h, part);
    if (lstm) {
      const Vec m = tanh_accurate(load(a_.memories + at * h + c, part));
      const Vec previous = step ? load(a_.memories + before * h + c, part) : maybe(a_.memory, end, part);
      const Vec dm = fma(grad * s[3], 1.f - m * m, carried);
      d[0] = dm * s[2] * (s[0] * (1.f - s[0]));
      d[1] = dm * previous * (s[1] * (1.f - s[1]));
      d[2] = dm * s[0] * (1.f - s[2] * s[2]);
      d[3] = grad * m * (s[3] * (1.f - s[3]));
      store(carry, dm * s[1]);
    } else {
      const Vec previous = step ? maybe(a_.out, before * h + c, part) : maybe(a_.hidden, end, part);
      d[2] = grad * (1.f - s[1]) * (1.f - s[2] * s[2]);
      d[1] = grad * (previous - s[2]) * (s[1] * (1.f - s[1]));
      d[0] = d[2] * s[3] * (s[0] * (1.f - s[0]));
      store(carry, grad * s[1]);
    }
    float* flow = flow_[step & 1] + row * stride_ + c;
    T* gates = static_cast<T*>(a_.grad_gates) + at * inner_ + c;
    for (int g = 0; g < gates_; ++g) {
      store(gates + g * h, d[g], part);
      if (!lstm && g == 2) d[g] = d[g] * s[0];  // gradient of W_n h + b_n, which the reset gate multiplies
      store(flow + g * h, d[g], part);
      if (a_.grad_products) store(static_cast<T*>(a_.grad_products) + at * inner_ + g * h + c, d[g], part);
    }
  }

  const RecurrenceBackward& a_;
  int64_t inner_, stride_;
  float *flow_[2], *carry_;
};

}  // namespace

void recurrence_forward(const RecurrenceForward& a) {
  with_dtype(a.dtype, [&](auto element) { Forward<decltype(element)>(a).run(); });
}

void recurrence_backward(const RecurrenceBackward& a) {
  with_dtype(a.dtype, [&](auto element) { Backward<decltype(element)>(a).run(); });
}

}  // namespace tf::TF_ISA
