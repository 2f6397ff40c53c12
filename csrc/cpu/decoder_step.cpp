// One token a row through a whole decoder: the phases of a step, shared out among threads that do not sleep in between.
#include "decoder_step.hpp"

#include "activation_math.hpp"
#include "decoder_step_attention.hpp"
#include "kernels.hpp"
#include "linear_direct.hpp"
#include "parallel.hpp"
#include "rotary_head.hpp"

namespace tf::TF_ISA {
namespace {

// Columns of a weight (in, out) that are gone through together, at most: their sums must stay near.
constexpr int64_t split_width(int64_t rows) { return rows < 4 ? 1024 : 256; }

struct Buffers {  // (rows, ...) each
  float *x, *normed, *qkv, *context, *inner, *split;
};

int64_t qkv_width(const DecoderPlan& p) { return (p.heads + 2 * p.key_heads) * p.head_dim; }

Buffers buffers_of(const DecoderPlan& p) {
  const int64_t heads = p.heads * p.head_dim;
  Buffers b;
  b.x = p.workspace;
  b.normed = b.x + p.rows * p.width;
  b.qkv = b.normed + p.rows * p.width;
  b.context = b.qkv + p.rows * qkv_width(p);
  b.inner = b.context + p.rows * heads;
  b.split = b.inner + p.rows * p.feed_forward;
  return b;
}

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
void finish_columns(const StepWeight& w, const Finish& f, int64_t row, int rows, int64_t column, const float* sums,
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

int64_t panels_of(const StepWeight& w) { return (w.out + kPanel - 1) / kPanel; }

// sums (kRows, 32): those of a panel. first: of the blocks of rows that it meets.
template <class W>
void multiply(const StepWeight& w, int64_t panel, int rows, const float* x, int64_t ldx, bool first, float* sums) {
  const W* data = static_cast<const W*>(w.data);
  if (w.layout == WeightLayout::panels)
    return multiply_rows(rows, x, ldx, data + panel * panel_slots<W>(w.in), w.in, first, sums);
  if constexpr (sizeof(W) > 1) {
    const int64_t begin = panel * kPanel, columns = w.out - begin < kPanel ? w.out - begin : kPanel;
    multiply_rows_of(rows, x, ldx, data + begin * w.stride, w.stride, columns, w.in, first, sums);
  }
}

void multiply(const StepWeight& w, int64_t panel, int rows, const float* x, int64_t ldx, bool first, float* sums) {
  if (w.storage == Storage::f32) return multiply<float>(w, panel, rows, x, ldx, first, sums);
  w.storage == Storage::i8 ? multiply<int8_t>(w, panel, rows, x, ldx, first, sums)
                         : multiply<bf16>(w, panel, rows, x, ldx, first, sums);
}

template <class C>  // element of the caches
class Walk {
 public:
  Walk(const DecoderStep& step, int threads)
      : s_(step), p_(*step.plan), b_(buffers_of(*step.plan)), team_(step.plan->counters), threads_(threads) {}

  void run() {
    embed();
    const int64_t heads = p_.heads * p_.head_dim, outer = qkv_width(p_);
    for (int64_t i = 0; i < p_.layers; ++i) {
      const DecoderLayer& l = layers_of(&p_)[i];
      const float* in = before(l.attention_norm);
      linear(l.qkv, 3, in, p_.width, Finish{b_.qkv, outer});
      self_attention(l);
      if (p_.parallel) in = before(l.output_norm);  // of x as it still is
      after(l.attention_norm, l.attention_after_norm, l.attention_output, b_.context, heads);
      if (l.cross_query.data) {
        linear(l.cross_query, before(l.cross_norm), p_.width, Finish{b_.qkv, outer});
        cross_attention(l);
        after(l.cross_norm, StepNorm{nullptr, nullptr, -1.f, false}, l.cross_output, b_.context, heads);
      }
      if (!p_.parallel) in = before(l.output_norm);
      Finish f{b_.inner, p_.feed_forward};
      f.has_activation = true;
      f.activation = p_.activation;
      f.gate = l.gate.data ? &l.gate : nullptr;
      linear(l.up, in, p_.width, f);
      after(l.output_norm, l.output_after_norm, l.down, b_.inner, p_.feed_forward);
    }
    const float* last = norm(p_.final_norm, b_.x, b_.normed);
    Finish f{s_.logits, p_.head.out};
    f.scale = p_.head_scale;
    f.softcap = p_.logits_softcap;
    linear(p_.head, last, p_.width, f);
  }

 private:
  // What a sublayer reads: norm(x), or x where norms come after the sum.
  const float* before(const StepNorm& n) { return p_.pre_norm ? norm(n, b_.x, b_.normed) : b_.x; }

  // x + [after norm](output(inner)), and the norm of that where norms come after the sum.
  void after(const StepNorm& n, const StepNorm& after_norm, const StepWeight& output, const float* inner, int64_t width) {
    if (after_norm.eps >= 0.f) {
      linear(output, inner, width, Finish{b_.normed, p_.width});
      team_.phase(s_.rows, 1, [&](int64_t r) {
        float *x = b_.x + r * p_.width, *y = b_.normed + r * p_.width;
        norm_row(after_norm, y, y, p_.width);
        for_columns(p_.width, [&](int64_t c, auto part) { store(x + c, load(x + c, part) + load(y + c, part), part); });
      });
    } else {
      Finish f{b_.x, p_.width};
      f.add = true;
      linear(output, inner, width, f);
    }
    if (!p_.pre_norm) norm(n, b_.x, b_.x);
  }

  void norm_row(const StepNorm& n, const float* x, float* y, int64_t width) {
    NormForward a{};
    a.dtype = DType::f32;
    a.x = x;
    a.y = y;
    a.weight = n.weight;
    a.bias = n.bias;
    a.eps = n.eps;
    a.rms = n.rms;
    a.rows = 1;
    a.width = width;
    norm_forward(a);
  }

  const float* norm(const StepNorm& n, const float* x, float* y) {
    if (n.eps < 0.f) return x;
    team_.phase(s_.rows, 1, [&](int64_t r) { norm_row(n, x + r * p_.width, y + r * p_.width, p_.width); });
    return y;
  }

  template <class T>
  void embed_row(int64_t r) {
    float* x = b_.x + r * p_.width;
    const T* token = static_cast<const T*>(p_.token) + s_.ids[r] * p_.width;
    const T* position = p_.position ? static_cast<const T*>(p_.position) + s_.positions[r] * p_.width : nullptr;
    for_columns(p_.width, [&](int64_t c, auto part) {
      const Vec v = load(token + c, part) * p_.embed_scale;
      store(x + c, position ? v + load(position + c, part) : v, part);
    });
    if (p_.embedding_norm.eps >= 0.f) norm_row(p_.embedding_norm, x, x, p_.width);
  }

  void embed() {
    team_.phase(s_.rows, 1, [&](int64_t r) {
      s_.table[r * p_.capacity + s_.length] = int32_t(r);
      p_.embedding_dtype == DType::f32 ? embed_row<float>(r) : embed_row<bf16>(r);
    });
  }

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
      return int8_linear(weights, count, x, ldx, f);
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
      for (int64_t r = 0; r < s_.rows; r += kRows) {
        const int rows = s_.rows - r < kRows ? int(s_.rows - r) : kRows;
        multiply(w, p, rows, x + r * ldx, ldx, r == 0, sums);
        if (f.gate) multiply(*f.gate, p, rows, x + r * ldx, ldx, r == 0, gates);
        finish(w, own, r, rows, p * kPanel, sums, f.gate ? gates : nullptr);
      }
    });
  }

  // In int8: the rows of x are quantised first.
  void int8_linear(const StepWeight* weights, int count, const float* x, int64_t ldx, const Finish& f) {
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
    rows.scale = b_.split;
    rows.zero = rows.scale + p_.rows * rows.groups;
    rows.values = reinterpret_cast<uint8_t*>(rows.zero + p_.rows * rows.groups);
    team_.phase(s_.rows, 1, [&](int64_t r) { s_.int8->quantize(x + r * ldx, parts[0].in, parts[0].group, rows, r); });
    team_.phase(panels, chunk_of(panels), [&](int64_t p) {
      int i = 0;
      Finish own = f;
      for (; p >= ends[i]; ++i) own.y += weights[i].out;
      p -= i ? ends[i - 1] : 0;
      constexpr int64_t kTogether = 24;
      alignas(64) float sums[kTogether * kPanel], gates[kTogether * kPanel];
      for (int64_t r = 0; r < s_.rows; r += kTogether) {
        const int64_t n = s_.rows - r < kTogether ? s_.rows - r : kTogether;
        s_.int8->product(parts[i], rows, r, n, p, sums);
        if (f.gate) s_.int8->product(gate, rows, r, n, p, gates);
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
    const int64_t cuts = (w.out + split_width(s_.rows) - 1) / split_width(s_.rows), width = (panels + cuts - 1) / cuts * kPanel;
    team_.phase(blocks * cuts, 1, [&](int64_t item) {
      const int64_t begin = item / cuts * kSplitDepth, column = item % cuts * width;
      const int64_t depth = w.in - begin < kSplitDepth ? w.in - begin : kSplitDepth;
      const int64_t columns = w.out - column < width ? w.out - column : width, at = begin * w.stride + column;
      for (int64_t r = 0; r < s_.rows && columns > 0; r += kRows) {
        const int rows = s_.rows - r < kRows ? int(s_.rows - r) : kRows;
        const float* from = x + r * ldx + begin;
        float* to = b_.split + (item / cuts * s_.rows + r) * ldo + column;
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
      for (int64_t r = 0; r < s_.rows; ++r) {
        for (int c = 0; c < kPanel; c += kWidth) {
          Vec sum = {};
          for (int64_t i = 0; i < blocks; ++i) sum = sum + load(b_.split + (i * s_.rows + r) * ldo + p * kPanel + c);
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

  // f(row, head) for all. Rows of one prompt are neighbours, and so one after the other here: the keys of a head that
  // they share (beams most of them, and those of their source all) are in the cache for the second.
  template <class F>
  void attention_phase(const F& f) {
    const int64_t items = s_.rows * p_.heads, share = items / (8 * threads_);
    team_.phase(items, share < 1 ? 1 : share > 4 ? 4 : share, [&](int64_t i) { f(i % s_.rows, i / s_.rows); });
  }

  // Where a head stands in a row of qkv.
  int64_t query_at(int64_t head) const { return (p_.qkv_by_head ? 3 * head : head) * p_.head_dim; }
  int64_t key_at(int64_t head) const { return (p_.qkv_by_head ? 3 * head + 1 : p_.heads + head) * p_.head_dim; }
  int64_t value_at(int64_t head) const {
    return (p_.qkv_by_head ? 3 * head + 2 : p_.heads + p_.key_heads + head) * p_.head_dim;
  }

  // This step's key and value of one head, into the caches.
  void append(const DecoderLayer& l, int64_t r, int64_t head, const float* key, const float* value) {
    const int64_t at = ((r * p_.key_heads + head) * p_.capacity + s_.length) * p_.head_dim;
    for_columns(p_.head_dim, [&](int64_t c, auto part) {
      store(static_cast<C*>(l.keys) + at + c, load(key + c, part), part);
      store(static_cast<C*>(l.values) + at + c, load(value + c, part), part);
    });
  }

  // Norm and rotation of a head of queries or keys, in place.
  void place_head(const StepNorm& n, float* x, int64_t r) {
    if (n.eps >= 0.f) norm_row(n, x, x, p_.head_dim);
    if (!p_.cos) return;
    const int64_t at = s_.positions[r] * p_.rotary_half;
    rotate_head(x, x, p_.cos + at, p_.sin + at, p_.rotary_half, p_.rotary_interleaved, 1.f);
  }

  // Where queries share keys or are changed on the way, keys are in the caches before anybody looks.
  void place_and_append(const DecoderLayer& l) {
    const int64_t group = p_.heads / p_.key_heads;
    team_.phase(s_.rows * p_.key_heads, 1, [&](int64_t i) {
      const int64_t r = i / p_.key_heads, g = i % p_.key_heads;
      float *row = b_.qkv + r * qkv_width(p_), *key = row + key_at(g);
      for (int64_t h = g * group; h < (g + 1) * group; ++h) place_head(l.query_norm, row + query_at(h), r);
      place_head(l.key_norm, key, r);
      append(l, r, g, key, row + value_at(g));
    });
  }

  void self_attention(const DecoderLayer& l) {
    const int64_t dim = p_.head_dim, heads = p_.heads, cap = p_.capacity, now = s_.length, row = p_.key_heads * cap * dim;
    const bool apart = p_.cos || l.query_norm.eps >= 0.f || l.key_norm.eps >= 0.f || p_.key_heads != heads;
    if (apart) place_and_append(l);
    attention_phase([&](int64_t r, int64_t h) {
      const float *in = b_.qkv + r * qkv_width(p_), *q = in + query_at(h);
      const int64_t head = h / (heads / p_.key_heads);
      if (!apart) append(l, r, h, in + key_at(h), in + value_at(h));
      const C* keys = static_cast<const C*>(l.keys) + head * cap * dim;
      const C* values = static_cast<const C*>(l.values) + head * cap * dim;
      const int64_t own = r * row + now * dim;
      const int32_t* table = s_.table + r * cap;
      int64_t first = l.window && now >= l.window ? now + 1 - l.window : 0;
      while (table[first] < 0) ++first;  // ends at this step's own key
      table += first;
      const int64_t count = now + 1 - first;
      int64_t* at = scratch<int64_t>(1, cap);  // of key j; this step's own stands in for those not to attend to
      for (int64_t j = 0; j < count; ++j) {
        const int64_t other = table[j] * row + (first + j) * dim;
        at[j] = table[j] < 0 ? own : other;
      }
      attend<C>(
          q, dim, l.scale, count, [&](int64_t j) { return keys + at[j]; }, [&](int64_t j) { return values + at[j]; },
          [&](float* scores) {
            if (p_.softcap > 0.f)
              for (int64_t j = 0; j < count; j += kWidth)
                store(scores + j, tanh_accurate(load(scores + j) * (1.f / p_.softcap)) * p_.softcap);
            if (l.relative) {
              const float* bias = l.relative + h * l.relative_count;
              for (int64_t j = 0; j < count; ++j) {
                const int64_t distance = count - 1 - j;
                scores[j] += bias[distance < l.relative_count ? distance : l.relative_count - 1];
              }
            }
            for (int64_t j = 0; j < count; ++j)
              if (table[j] < 0) scores[j] = -INFINITY;
          },
          scratch<float>(0, round_up(cap, kWidth)), b_.context + r * heads * dim + h * dim);
    });
  }

  void cross_attention(const DecoderLayer& l) {
    const int64_t dim = p_.head_dim, heads = p_.heads, cap = p_.cross_capacity;
    attention_phase([&](int64_t r, int64_t h) {
      const int64_t source = s_.sources[r];
      const int64_t base = (source * heads + h) * cap * dim;
      const C* keys = static_cast<const C*>(l.cross_keys) + base;
      const C* values = static_cast<const C*>(l.cross_values) + base;
      attend<C>(
          b_.qkv + r * qkv_width(p_) + h * dim, dim, l.cross_scale, s_.cross_lengths[source],
          [&](int64_t j) { return keys + j * dim; }, [&](int64_t j) { return values + j * dim; }, [](float*) {},
          scratch<float>(0, round_up(cap, kWidth)), b_.context + r * heads * dim + h * dim);
    });
  }

  const DecoderStep& s_;
  const DecoderPlan& p_;
  Buffers b_;
  Team team_;
  int64_t threads_;
};

}  // namespace

void decoder_step(const DecoderStep& s) {
  const DecoderPlan& p = *s.plan;
  __builtin_memset(p.counters, 0, sizeof(PhaseCounter) * size_t(kLayerPhases * p.layers + kStackPhases));
  // Waking a thread costs as much as reading some hundred kilobytes.
  int64_t threads = tf_num_threads(), useful = 1 + p.weight_bytes / (1 << 19);
  if (threads > useful) threads = useful;
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    p.cache_dtype == DType::f32 ? Walk<float>(s, int(threads)).run() : Walk<bf16>(s, int(threads)).run();
  });
}

}  // namespace tf::TF_ISA
