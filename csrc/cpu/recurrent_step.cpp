// One token per row through a recurrent decoder: cells, attention and output are phases, which threads go through
// without sleeping in between. All gates of 32 columns of a state are one item, so that the arithmetic of the cells
// works on products still in the cache.
#include "recurrent_step.hpp"

#include "decoder_step_attention.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "recurrence_cell.hpp"
#include "head_screen.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int64_t kTogether = 4 * kRows;  // rows multiplied by a panel in one item
constexpr int64_t kPhases = 16;          // besides those of the layers, at most

struct Buffers {  // each (rows, ...)
  int64_t input_width, read_width, out_width;
  float *input, *query, *read, *wide, *out, *split, *choice;
  int64_t floats;
};

// base: null to compute only the size.
Buffers buffers_of(const RecurrentStep& s, float* base, int64_t choice_floats) {
  Buffers b{};
  const bool given = s.context != Context::none;
  b.input_width = s.embedding + (s.maxout ? s.width : s.feed ? s.readout.out : 0);
  b.read_width = s.maxout ? 2 * s.width + s.embedding : given ? 2 * s.width : 0;
  b.out_width = s.maxout ? s.readout.out / 2 : s.readout.out;
  const auto take = [&](int64_t width, int64_t rows) {
    float* at = base ? base + b.floats : nullptr;
    b.floats += round_up(rows * width, 16);
    return at;
  };
  b.input = take(b.input_width, s.rows);
  b.query = take(s.query.out, s.rows);
  b.read = take(b.read_width, s.rows);
  b.wide = take(s.maxout ? s.readout.out : 0, s.rows);
  b.out = take(b.out_width, s.rows);
  b.split = take(s.split_floats, s.rows);
  b.choice = take(choice_floats, 1);
  return b;
}

class Step : ScreenedArgmax {
 public:
  Step(const RecurrentStep& s, const Buffers& b, PhaseCounter* counters, int64_t index, int64_t threads)
      : ScreenedArgmax(counters, index, threads, s.rows, s.rows, b.split, s.int8),
        s_(s),
        b_(b),
        top_((s.layers - 1) * plane()) {}

  void run() {
    embed();
    if (s_.maxout) attend_from(s_.hidden + top_);
    const float* x = b_.input;
    for (int64_t l = 0; l < s_.layers; ++l) {
      cells(l, x, l ? s_.width : b_.input_width);
      x = s_.next_hidden + l * plane();
    }
    int64_t width = s_.width;
    if (s_.maxout) {
      linear(s_.readout, b_.read, b_.read_width, Finish{b_.wide, s_.readout.out});
      team_.phase(rows_, 1, [&](int64_t r) { pair_maxima(b_.wide + r * s_.readout.out, b_.out + r * b_.out_width); });
      x = b_.out, width = b_.out_width;
    } else if (s_.context != Context::none) {
      attend_from(x);
      float* out = s_.next_feed ? s_.next_feed : b_.out;
      Finish f{out, b_.out_width};
      f.softcap = 1.f;  // tanh
      linear(s_.readout, b_.read, b_.read_width, f);
      x = out, width = b_.out_width;
    }
    if (s_.choice.tokens)
      argmax(s_.head, s_.choice, x, width, b_.choice);
    else
      linear(s_.head, x, width, Finish{s_.logits, s_.head.out});
  }

  static int64_t choice_floats(const RecurrentStep& s) {
    return s.choice.tokens ? argmax_floats(s.head, s.choice.screen, s.rows) : 0;
  }

 private:
  int64_t plane() const { return s_.rows * s_.width; }
  int64_t source(int64_t r) const { return s_.sources ? s_.sources[r] : r; }
  // Where the readout reads the context and the last layer's state.
  float* read_context(int64_t r) const {
    return b_.read + r * b_.read_width + (s_.maxout ? s_.width + s_.embedding : 0);
  }
  float* read_state(int64_t r) const { return b_.read + r * b_.read_width + (s_.maxout ? 0 : s_.width); }

  static void copy(const float* from, float* to, int64_t count) {
    __builtin_memcpy(to, from, size_t(count) * sizeof(float));
  }

  template <class T>
  void embed_row(int64_t r) {
    float* input = b_.input + r * b_.input_width;
    const T* token = static_cast<const T*>(s_.token) + s_.ids[r] * s_.embedding;
    for_columns(s_.embedding, [&](int64_t c, auto part) { store(input + c, load(token + c, part), part); });
    if (s_.maxout)
      copy(input, read_state(r) + s_.width, s_.embedding);
    else if (s_.feed)
      copy(s_.feed + r * s_.readout.out, input + s_.embedding, s_.readout.out);
  }

  void embed() {
    team_.phase(rows_, 1, [&](int64_t r) {
      with_dtype(s_.token_dtype, [&](auto element) { embed_row<decltype(element)>(r); });
    });
  }

  // Writes the contexts for states `query` (rows, width) to read_context.
  void attend_from(const float* query) {
    int64_t stride = s_.width;
    if (s_.query.data) {
      linear(s_.query, query, stride, Finish{b_.query, s_.query.out});
      query = b_.query, stride = s_.query.out;
    }
    team_.phase(rows_, 1, [&](int64_t r) {
      const int64_t first = source(r) * s_.length;
      const float* values = s_.values + first * s_.width;
      float* context = read_context(r);
      if (s_.context == Context::given)
        copy(values, context, s_.width);
      else
        s_.context == Context::dot ? by_product(query + r * stride, first, values, context)
                                   : by_sum(query + r * stride, first, values, context);
      if (s_.maxout) copy(context, b_.input + r * b_.input_width + s_.embedding, s_.width);
    });
  }

  void by_product(const float* query, int64_t first, const float* values, float* context) const {
    const float* keys = s_.keys + first * s_.width;
    const bool* mask = s_.mask ? s_.mask + first : nullptr;
    attend<float>(
        query, s_.width, 1.f, s_.length, [&](int64_t j) { return keys + j * s_.width; },
        [&](int64_t j) { return values + j * s_.width; },
        [&](float* scores) {
          for (int64_t j = 0; mask && j < s_.length; ++j)
            if (!mask[j]) scores[j] = -INFINITY;
        },
        scratch<float>(0, round_up(s_.length, kWidth) + kWidth), context);
  }

  void by_sum(const float* query, int64_t first, const float* values, float* context) const {
    AdditiveAttentionForward a{};
    a.dtype = DType::f32;
    a.query = query;
    a.key = s_.keys + first * s_.score_width;
    a.value = values;
    a.key_strides[1] = s_.score_width;
    a.value_strides[1] = s_.width;
    a.score_weight = s_.score_weight;
    a.mask = s_.mask ? s_.mask + first : nullptr;
    a.mask_strides[2] = 1;
    a.batch = a.queries = 1;
    a.keys = s_.length;
    a.width = s_.score_width;
    a.value_width = s_.width;
    a.out = context;
    a.weights = scratch<float>(5, s_.length + kWidth);
    additive_attention_forward(a);
  }

  void cells(int64_t layer, const float* x, int64_t ldx) {
    const RecurrentCell& cell = s_.cells[layer];
    const int64_t gates = gates_of(s_.cell), h = s_.width, at = layer * plane();
    const int64_t panels = (h + kPanel - 1) / kPanel, blocks = (rows_ + kTogether - 1) / kTogether;
    team_.phase(panels * blocks, chunk_of(panels * blocks), [&](int64_t item) {
      const int64_t panel = item / blocks, row = item % blocks * kTogether;
      const int64_t rows = rows_ - row < kTogether ? rows_ - row : kTogether;
      alignas(64) float sums[2][4][kTogether * kPanel];
      for (int64_t g = 0; g < gates; ++g) {
        block(cell.input[g], panel, rows, x + row * ldx, ldx, sums[0][g]);
        block(cell.hidden[g], panel, rows, s_.hidden + at + row * h, h, sums[1][g]);
      }
      const int64_t first = panel * kPanel, columns = h - first < kPanel ? h - first : kPanel;
      for (int64_t r = 0; r < rows; ++r)
        for_columns(columns, [&](int64_t c, auto part) {
          Vec v[2][4];
          for (int of = 0; of < 2; ++of)
            for (int64_t g = 0; g < gates; ++g) {
              const StepWeight& w = of ? cell.hidden[g] : cell.input[g];
              v[of][g] = load(sums[of][g] + r * kPanel + c);
              if (w.bias) v[of][g] = v[of][g] + load(w.bias + first + c, part);
            }
          const int64_t place = at + (row + r) * h + first + c;
          const Vec state = s_.cell == Cell::lstm ? lstm(v, place, part) : gru(v, place, part);
          store(s_.next_hidden + place, state, part);
          if (b_.read_width && layer == s_.layers - 1) store(read_state(row + r) + first + c, state, part);
        });
    });
  }

  static void block(const StepWeight& w, int64_t panel, int64_t rows, const float* x, int64_t ldx, float* sums) {
    for (int64_t r = 0; r < rows; r += kRows)
      multiply(w, panel, int(rows - r < kRows ? rows - r : kRows), x + r * ldx, ldx, r == 0, sums + r * kPanel);
  }

  template <class Part>
  Vec lstm(const Vec (&v)[2][4], int64_t place, Part part) const {
    Vec gates[4];
    for (int g = 0; g < 4; ++g) gates[g] = v[0][g] + v[1][g];
    const Vec memory = lstm_memory(gates, load(s_.memory + place, part));
    store(s_.next_memory + place, memory, part);
    return gates[3] * tanh_accurate(memory);
  }

  template <class Part>
  Vec gru(const Vec (&v)[2][4], int64_t place, Part part) const {
    Vec gates[3] = {v[0][0], v[0][1], v[0][2]};
    const Vec products[3] = {v[1][0], v[1][1], v[1][2]};
    return gru_hidden(gates, products, load(s_.hidden + place, part));
  }

  void pair_maxima(const float* x, float* y) const {
    for (int64_t c = 0; c < b_.out_width; ++c) {
      const float a = x[2 * c], b = x[2 * c + 1];
      y[c] = a > b || a != a ? a : b;
    }
  }

  const RecurrentStep& s_;
  const Buffers& b_;
  const int64_t top_;
};

}  // namespace

void recurrent_step(const RecurrentStep& s) {
  const int64_t choice = Step::choice_floats(s);
  const Buffers b = buffers_of(s, scratch<float>(4, buffers_of(s, nullptr, choice).floats + kWidth), choice);
  const int64_t phases = kPhases + s.layers;
  PhaseCounter* counters = scratch<PhaseCounter>(3, phases);
  __builtin_memset(static_cast<void*>(counters), 0, size_t(phases) * sizeof(PhaseCounter));
  // Waking a thread costs as much as reading a few hundred kilobytes.
  int64_t threads = tf_num_threads(), useful = 1 + s.weight_bytes / (1 << 19);
  if (threads > useful) threads = useful;
  parallel_for(threads, 1, [&](int64_t index, int64_t) { Step(s, b, counters, index, threads).run(); });
}

}  // namespace tf::TF_ISA
