// One token per row through a whole decoder: a step is a sequence of phases, whose threads do not sleep in between.
#include "decoder_step.hpp"

#include "decoder_step_argmax.hpp"
#include "decoder_step_attention.hpp"
#include "decoder_step_rank.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "rotary_head.hpp"

namespace tf::TF_ISA {
namespace {

struct Buffers {  // each (rows, ...)
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

template <class C>  // element type of the caches
class Walk : HeadArgmax {
 public:
  Walk(const DecoderStep& step, int64_t index, int64_t threads)
      : HeadArgmax(step.plan->counters, index, threads, step.rows, step.plan->rows, buffers_of(*step.plan).split,
                   step.int8),
        s_(step),
        p_(*step.plan),
        b_(buffers_of(*step.plan)) {}

  void run() {
    embed();
    const int64_t outer = qkv_width(p_);
    for (int64_t i = 0; i < p_.layers; ++i) {
      const DecoderLayer& l = layers_of(&p_)[i];
      StepInput in = before(l.attention_norm, l.qkv, 3);
      linear(l.qkv, 3, in, Finish{b_.qkv, outer});
      const StepInput context = self_attention(l);
      if (p_.parallel) in = before(l.output_norm);  // of x before attention is added
      after(l.attention_norm, l.attention_after_norm, l.attention_output, context);
      if (l.cross_query.data) {
        linear(l.cross_query, before(l.cross_norm, &l.cross_query), Finish{b_.qkv, outer});
        after(l.cross_norm, StepNorm{nullptr, nullptr, -1.f, false}, l.cross_output, cross_attention(l));
      }
      if (!p_.parallel) in = before(l.output_norm, &l.up);
      after(l.output_norm, l.output_after_norm, l.down, up(l, in));
    }
    Finish f{s_.logits, p_.head.out};
    f.scale = p_.head_scale;
    f.softcap = p_.logits_softcap;
    const StepInput in = normed(p_.final_norm, &p_.head);
    if (s_.choice.tokens && !s_.choice.values) return argmax(p_.head, s_.choice, in, f);
    linear(p_.head, in, f);
    if (s_.choice.values)
      team_.phase(s_.rows, 1, [&](int64_t r) { rank(s_.choice, s_.logits + r * p_.head.out, p_.head.out, r); });
  }

 private:
  // The input of a sublayer: norm(x), or x where norms come after the sum. Rows for int8 weights are quantised in the
  // same phase.
  StepInput before(const StepNorm& n, const StepWeight* weights = nullptr, int count = 1) {
    return normed(p_.pre_norm ? n : StepNorm{nullptr, nullptr, -1.f, false}, weights, count);
  }

  StepInput normed(const StepNorm& n, const StepWeight* weights = nullptr, int count = 1) {
    const bool changed = n.eps >= 0.f, int8 = weights && reads_int8(weights, count);
    StepInput in{changed ? b_.normed : b_.x, p_.width};
    const StepNorm* last = last_norm_;
    last_norm_ = nullptr;
    if (int8) {
      for_input_ = int8_room(weights[0]);
      in.int8 = &for_input_;
    }
    if (!changed && !int8 && !last) return in;
    team_.phase(s_.rows, 1, [&](int64_t r) {
      float *x = b_.x + r * p_.width, *y = changed ? b_.normed + r * p_.width : x;
      if (last) norm_row(*last, x, x, p_.width);
      if (changed) norm_row(n, x, y, p_.width);
      if (int8) quantize(weights[0].group, y, p_.width, for_input_, r, 0);
    });
    return in;
  }

  // x += [after norm](output(inner)). Where norms come after the sum, the next reader of x applies the norm.
  void after(const StepNorm& n, const StepNorm& after_norm, const StepWeight& output, const StepInput& inner) {
    if (after_norm.eps >= 0.f) {
      linear(output, inner, Finish{b_.normed, p_.width});
      team_.phase(s_.rows, 1, [&](int64_t r) {
        float *x = b_.x + r * p_.width, *y = b_.normed + r * p_.width;
        norm_row(after_norm, y, y, p_.width);
        for_columns(p_.width, [&](int64_t c, auto part) { store(x + c, load(x + c, part) + load(y + c, part), part); });
      });
    } else {
      Finish f{b_.x, p_.width};
      f.add = true;
      linear(output, inner, f);
    }
    if (!p_.pre_norm && n.eps >= 0.f) last_norm_ = &n;
  }

  // activation(up x) [* gate x], quantised in the same phase if down is int8 and all threads get a block.
  StepInput up(const DecoderLayer& l, const StepInput& in) {
    StepInput inner{b_.inner, p_.feed_forward};
    Finish f{b_.inner, p_.feed_forward};
    f.has_activation = true;
    f.activation = p_.activation;
    f.gate = l.gate.data ? &l.gate : nullptr;
    const bool enough = threads_ == 1 || l.up.out > (4 * threads_ - 1) * int8_columns(l.down.group);
    if (enough && reads_int8(&l.up, 1) && reads_int8(&l.down, 1)) {
      for_output_ = int8_room(l.down, &l.up);
      inner.int8 = f.int8 = &for_output_;
      f.int8_group = l.down.group;
    }
    linear(l.up, in, f);
    return inner;
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
      if (s_.choice.tokens) begin_argmax(s_.choice, r);
      p_.embedding_dtype == DType::f32 ? embed_row<float>(r) : embed_row<bf16>(r);
    });
  }

  // Calls f(row, head) for all, and returns the context for `output`, also in u8 if `output` is int8 and heads fill its
  // groups. Rows of one prompt are neighbours and run one after another: the keys of a head that they share (most keys
  // of beams, all cross keys) are then in the cache.
  template <class F>
  StepInput attention_phase(const StepWeight& output, const F& f) {
    const int64_t dim = p_.head_dim, width = p_.heads * dim;
    StepInput context{b_.context, width};
    int64_t together = 1;  // heads
    if (reads_int8(&output, 1)) {
      const int64_t wanted = output.group > dim ? output.group / dim : 1, blocks = (p_.heads + wanted - 1) / wanted;
      if (wanted * dim % output.group == 0 && (wanted == 1 || threads_ == 1 || s_.rows * blocks >= 2 * threads_)) {
        together = wanted;
        for_input_ = int8_room(output);
        context.int8 = &for_input_;
      }
    }
    const int64_t items = s_.rows * ((p_.heads + together - 1) / together), share = items / (8 * threads_);
    team_.phase(items, share < 1 ? 1 : share > 4 ? 4 : share, [&](int64_t i) {
      const int64_t r = i % s_.rows, first = i / s_.rows * together;
      const int64_t last = first + together < p_.heads ? first + together : p_.heads;
      for (int64_t h = first; h < last; ++h) f(r, h);
      if (context.int8)
        quantize(output.group, b_.context + r * width + first * dim, (last - first) * dim, for_input_, r, first * dim);
    });
    return context;
  }

  // Offsets of a head in a row of qkv.
  int64_t query_at(int64_t head) const { return (p_.qkv_by_head ? 3 * head : head) * p_.head_dim; }
  int64_t key_at(int64_t head) const { return (p_.qkv_by_head ? 3 * head + 1 : p_.heads + head) * p_.head_dim; }
  int64_t value_at(int64_t head) const {
    return (p_.qkv_by_head ? 3 * head + 2 : p_.heads + p_.key_heads + head) * p_.head_dim;
  }

  // Writes this step's key and value of one head to the caches.
  void append(const DecoderLayer& l, int64_t r, int64_t head, const float* key, const float* value) {
    const int64_t at = ((r * p_.key_heads + head) * p_.capacity + s_.length) * p_.head_dim;
    for_columns(p_.head_dim, [&](int64_t c, auto part) {
      store(static_cast<C*>(l.keys) + at + c, load(key + c, part), part);
      store(static_cast<C*>(l.values) + at + c, load(value + c, part), part);
    });
  }

  // Norms and rotates a head of queries or keys, in place.
  void place_head(const StepNorm& n, float* x, int64_t r) {
    if (n.eps >= 0.f) norm_row(n, x, x, p_.head_dim);
    if (!p_.cos) return;
    const int64_t at = s_.positions[r] * p_.rotary_half;
    rotate_head(x, x, p_.cos + at, p_.sin + at, p_.rotary_half, p_.rotary_interleaved, 1.f);
  }

  // Where query heads share keys, or heads are normed or rotated, a phase of its own fills the caches before attention.
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

  StepInput self_attention(const DecoderLayer& l) {
    const int64_t dim = p_.head_dim, heads = p_.heads, cap = p_.capacity, now = s_.length;
    const int64_t row = p_.key_heads * cap * dim;
    const bool apart = p_.cos || l.query_norm.eps >= 0.f || l.key_norm.eps >= 0.f || p_.key_heads != heads;
    if (apart) place_and_append(l);
    return attention_phase(l.attention_output, [&](int64_t r, int64_t h) {
      const float *in = b_.qkv + r * qkv_width(p_), *q = in + query_at(h);
      const int64_t head = h / (heads / p_.key_heads);
      if (!apart) append(l, r, h, in + key_at(h), in + value_at(h));
      const C* keys = static_cast<const C*>(l.keys) + head * cap * dim;
      const C* values = static_cast<const C*>(l.values) + head * cap * dim;
      const int64_t own = r * row + now * dim;
      const int32_t* table = s_.table + r * cap;
      int64_t first = l.window && now >= l.window ? now + 1 - l.window : 0;
      while (table[first] < 0) ++first;  // stops at this step's own key at the latest
      table += first;
      const int64_t count = now + 1 - first;
      int64_t* at = scratch<int64_t>(1, cap);  // offset of key j; for masked keys that of this step's own key
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

  StepInput cross_attention(const DecoderLayer& l) {
    const int64_t dim = p_.head_dim, heads = p_.heads, cap = p_.cross_capacity;
    return attention_phase(l.cross_output, [&](int64_t r, int64_t h) {
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
  const StepNorm* last_norm_ = nullptr;  // norm that x still needs, in place
  Int8Rows for_input_{}, for_output_{};  // input and output of the current product
};

}  // namespace

void decoder_step(const DecoderStep& s) {
  const DecoderPlan& p = *s.plan;
  __builtin_memset(p.counters, 0, sizeof(PhaseCounter) * size_t(kLayerPhases * p.layers + kStackPhases));
  // Waking a thread costs as much as reading a few hundred kilobytes.
  int64_t threads = tf_num_threads(), useful = 1 + p.weight_bytes / (1 << 19);
  if (threads > useful) threads = useful;
  parallel_for(threads, 1, [&](int64_t index, int64_t) {
    p.cache_dtype == DType::f32 ? Walk<float>(s, index, threads).run() : Walk<bf16>(s, index, threads).run();
  });
}

}  // namespace tf::TF_ISA
