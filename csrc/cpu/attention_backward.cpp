// Attention backward: probabilities are recomputed from the saved log-sum-exp (Dao, "FlashAttention-2", 2023, algorithm
// 2). One work item is one key head of one sequence: dK and dV have a single writer and a fixed order of addition, so
// the result does not depend on the number of threads.
#include "attention_backward_products.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

// dbias += score gradients of the tile, summed over broadcast axes.
void add_bias_gradient(const AttentionBackward& a, const Tile& t, int64_t j0, int64_t keys, const float* ds) {
  const int64_t* s = a.dbias_strides;
  float* out = a.dbias + t.b * s[0] + t.h * s[1] + t.q0 * s[2] + j0 * s[3];
  if (s[2] == 0) {
    for (int64_t j = 0; j < keys; ++j) {
      Vec total = load(ds + j * t.lanes);
      for (int64_t c = kWidth; c < t.lanes; c += kWidth) total = total + load(ds + j * t.lanes + c);
      out[j * s[3]] += sum(total);
    }
    return;
  }
  for (int64_t c = 0; c < t.lanes; c += kWidth) {
    const int64_t rows = t.count - c < kWidth ? t.count - c : kWidth;
    if (s[3] == 0) {
      Vec total = load(ds + c);
      for (int64_t j = 1; j < keys; ++j) total = total + load(ds + j * t.lanes + c);
      for (int64_t i = 0; i < rows; ++i) out[(c + i) * s[2]] += total[i];
      continue;
    }
    for (int64_t j = 0; j < keys; j += kWidth) {
      Vec tile[kWidth];
      for (int i = 0; i < kWidth; ++i) tile[i] = j + i < keys ? load(ds + (j + i) * t.lanes + c) : Vec{};
      transpose(tile);
      if (rows == kWidth && j + kWidth <= keys) {
        for (int64_t i = 0; i < kWidth; ++i) {
          float* row = out + (c + i) * s[2] + j;
          store(row, load(row) + tile[i]);
        }
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* row = out + (c + i) * s[2] + j;
        store_some(row, load_some(row, keys - j) + tile[i], keys - j);
      }
    }
  }
}

const float* lse_of(const AttentionBackward& a, const Tile& t) {
  return a.lse + t.b * a.lse_batch + t.h * a.lse_head + a.query_starts[t.b] + t.q0;
}
// True for rows that attend to nothing and for lanes past the last query.
bool is_dead(const AttentionBackward& a, const Tile& t, int64_t i) {
  return i >= t.count || lse_of(a, t)[i] == -INFINITY;
}

void load_lse(const AttentionBackward& a, const Tile& t, const GradientBuffers& s) {
  const int64_t row = a.query_starts[t.b] + t.q0;
  const float* lse = lse_of(a, t);
  const float* grad_lse = a.grad_lse ? a.grad_lse + t.b * a.grad_lse_batch + t.h * a.grad_lse_head + row : nullptr;
  for (int64_t i = 0; i < t.lanes; ++i) {
    const bool dead = is_dead(a, t, i);
    const double exact = dead ? double(INFINITY) : double(lse[i]) * kLog2e;  // exp2(score - inf) = 0
    s.lse[i] = float(exact);
    s.lse_rest[i] = dead ? 1.f : float(1. - 0.6931471805599453 * (exact - double(s.lse[i])));
    s.grad_lse[i] = dead || !grad_lse ? 0.f : grad_lse[i];
  }
}

// dq -= (sum of ds - grad_lse) * mean key. If delta is exact, the ds of a row sum to grad_lse. An error of delta adds
// -error * p to ds and -error * sum_j p_j k_j to dq, which is large where all keys share an offset, such as the bias of
// their projection. Keys minus their mean have no offset. With a softcap the sum is weighted by its slope.
void centre_keys(const Attention& a, const Tile& t, const GradientBuffers& s) {
  for (int64_t c = 0; c < t.lanes; c += kWidth) {
    Vec excess = load(s.ds_sum + c) - load(s.grad_lse + c);
    if (a.softcap != 0.f) excess = excess * load(s.slope_sum + c);
    for (int64_t d = 0; d < a.dim; ++d) {
      float* dq = s.dq + d * t.lanes + c;
      store(dq, fma(-excess, broadcast(s.centre[d]), load(dq)));
    }
  }
}

constexpr float kPreciseLse = 24.f;  // in units of log2
constexpr int64_t kFewQueries = 16;

float largest_lse(const GradientBuffers& s, int64_t lanes) {
  float largest = 0.f;
  for (int64_t i = 0; i < lanes; ++i) {
    const float size = __builtin_fabsf(s.lse[i]);
    if (size < INFINITY && size > largest) largest = size;
  }
  return largest;
}

void clear(float* row, int64_t lanes) {
  for (int64_t c = 0; c < lanes; c += kWidth) store(row + c, Vec{});
}

// total[lane] += value(x) over the keys of a tile, in short running sums: one long sum would lose digits.
template <class F>
void sum_rows(float* total, int64_t lanes, int64_t keys, const F& value) {
  for (int64_t c = 0; c < lanes; c += kWidth) {
    Vec sum = Vec{};
    for (int64_t j = 0; j < keys; j += kShortChain) {
      Vec part = Vec{};
      for (int64_t i = j; i < keys && i < j + kShortChain; ++i) part = part + value(i * lanes + c);
      sum = sum + part;
    }
    store(total + c, load(total + c) + sum);
  }
}

// The gradients of one tile of queries over keys [begin, end), in one of three ways. The saved log-sum-exp is rounded,
// and so is the output in delta = rowsum(grad * out). Where it costs little, row sums and delta are computed again:
//
//   whole_rows   the scores of all keys are held: row sums and delta come from these
//   two_passes   more keys, with few queries, lone keys, or an lse so large and coarsely rounded that rows do not sum
//                to one: one more pass over the keys
//   one_pass     lse and delta as saved; centring the keys removes the error of delta from dQ
template <class Products>
class TileGradients {
 public:
  using T = typename Products::Element;
  TileGradients(const AttentionBackward& a, const Tile& t, const Products& products, const GradientBuffers& s)
      : a_(a), t_(t), products_(products), s_(s), lanes_(t.lanes), to_log2_(log2_factor(a)),
        softcap_(a.softcap != 0.f), dropout_(a.dropout.threshold != 0) {
    key_range(a, t, begin_, end_);
    if (Products::kByTiles) begin_ -= begin_ % 2;  // pairs of keys start at an even one
    const int64_t visible = end_ - begin_;
    chain_ = chain_of(t.count < visible ? t.count : visible);
  }

  void run() const {
    T* dq = row_of<T>(a_.dq, a_.dq_strides, t_.b, t_.h, a_.query_starts[t_.b] + t_.q0);
    if (end_ <= begin_) return zero_rows(dq, a_.dq_strides.row, t_.count, a_.dim);
    const int64_t row = a_.query_starts[t_.b] + t_.q0;
    products_.load_tile(t_, row_of<const T>(a_.query, a_.query_strides, t_.b, t_.h, row),
                        row_of<const T>(a_.grad_out, a_.grad_out_strides, t_.b, t_.h, row));
    load_lse(a_, t_, s_);
    if (end_ - begin_ <= held_keys(a_))
      whole_rows();
    else if (t_.count <= kFewQueries || has_lone_keys(a_) || largest_lse(s_, lanes_) > kPreciseLse)
      two_passes();
    else
      one_pass();
    for (int64_t c = 0; c < lanes_; c += kWidth) store(s_.scale + c, broadcast(float(a_.scale)));
    store_transposed(s_.dq, lanes_, s_.scale, dq, a_.dq_strides.row, t_.count, a_.dim);
  }

 private:
  // Part of a tile of scores: `keys` keys from j on, and where they are.
  struct Block {
    int64_t j, keys;
    float *p, *ds, *slope, *factor;
  };

  void whole_rows() const {
    for (int64_t c = 0; c < lanes_; c += kWidth) store(s_.top + c, broadcast(-INFINITY));
    for_each_block(true, [&](const Block& b) {
      scores(b);
      for_vectors(lanes_, [&](int64_t c, auto n) { add_top(b, c, n); });
    });
    for (int64_t c = 0; c < lanes_; c += kWidth) {
      const Vec top = load(s_.top + c);
      store(s_.top + c, top > -INFINITY ? top : Vec{});
    }
    clear(s_.scale, lanes_);
    clear(s_.delta, lanes_);
    for_each_block(true, [&](const Block& b) {
      value_gradients(b);
      if (dropout_)
        for_each_dropout(a_, t_, b.j, b.keys, [&](int64_t row, int64_t c, Vec factor) {
          const int64_t x = row * lanes_ + c;
          store(b.ds + x, load(b.ds + x) * factor);
          store(b.factor + x, factor);
        });
      for_vectors(lanes_, [&](int64_t c, auto n) { exponentials(b, c, n); });
    });
    normalise();
    for_each_block(true, [&](const Block& b) {
      const float *p = b.p, *ds = b.ds, *factor = dropout_ ? b.factor : nullptr;
      add_gradients(b, [&](int64_t c) {
        const Vec delta = load(s_.delta + c), grad_lse = load(s_.grad_lse + c), scale = load(s_.scale + c);
        return [=](int64_t x) {
          const Vec y = load(p + x) * scale;
          return ProbabilityAndGradient{factor ? y * load(factor + x) : y, y * ((load(ds + x) - delta) + grad_lse)};
        };
      });
    });
  }

  template <int N>
  void add_top(const Block& b, int64_t c, Vectors<N>) const {
    Vec top[N];
    for (int n = 0; n < N; ++n) top[n] = load(s_.top + c + n * kWidth);
    for (int64_t x = c; x < b.keys * lanes_; x += lanes_)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) top[n] = max(load(b.p + x + n * kWidth), top[n]);
    for (int n = 0; n < N; ++n) store(s_.top + c + n * kWidth, top[n]);
  }

  // p: from scores to exponentials; their row sums are added to scale, and those of p * ds to delta.
  template <int N>
  void exponentials(const Block& b, int64_t c, Vectors<N>) const {
    const int64_t lanes = lanes_;
    const float to_log2 = to_log2_, *ds = b.ds;
    float* p = b.p;
    Vec top[N], total[N], delta[N];
    for (int n = 0; n < N; ++n) {
      top[n] = load(s_.top + c + n * kWidth);
      total[n] = load(s_.scale + c + n * kWidth);
      delta[n] = load(s_.delta + c + n * kWidth);
    }
    for (int64_t j = 0; j < b.keys; j += kShortChain) {  // short sums first: a long float32 sum loses digits
      Vec part[N] = {}, product[N] = {};
      const int64_t past = least(j + kShortChain, b.keys) * lanes;
      for (int64_t x = j * lanes + c; x < past; x += lanes) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          const int64_t at = x + n * kWidth;
          const Vec y = Products::exp2_of((load(p + at) - top[n]) * to_log2);
          store(p + at, y);
          part[n] = part[n] + y;
          product[n] = fma(y, load(ds + at), product[n]);
        }
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        total[n] = total[n] + part[n];
        delta[n] = delta[n] + product[n];
      }
    }
    for (int n = 0; n < N; ++n) {
      store(s_.scale + c + n * kWidth, total[n]);
      store(s_.delta + c + n * kWidth, delta[n]);
    }
  }

  void two_passes() const {
    clear(s_.scale, lanes_);
    clear(s_.delta, lanes_);
    clear(s_.seen, lanes_);
    for_each_block(false, [&](const Block& b) {
      probabilities(b);
      value_gradients(b);
      if (dropout_)
        for_each_dropout(a_, t_, b.j, b.keys, [&](int64_t row, int64_t c, Vec factor) {
          const int64_t x = row * lanes_ + c;
          store(b.ds + x, load(b.ds + x) * factor);
        });
      sum_rows(s_.scale, lanes_, b.keys, [&](int64_t x) { return load(b.p + x); });
      sum_rows(s_.delta, lanes_, b.keys, [&](int64_t x) { return load(b.p + x) * load(b.ds + x); });
      sum_rows(s_.seen, lanes_, b.keys, [&](int64_t x) { return load(b.p + x) > Vec{} ? broadcast(1.f) : Vec{}; });
    });
    normalise();
    const bool alone = a_key_alone();
    for_each_block(false, [&](const Block& b) {
      probabilities(b);
      value_gradients(b);
      if (alone) forget_lone_keys(b);
      score_gradients(b);
      add_gradients(b, Stored{b.p, b.ds});
    });
  }

  // A key that is alone in its row has probability 1 whatever its score: the score's gradient is exactly zero.
  bool a_key_alone() const {
    bool found = false;
    for (int64_t i = 0; i < lanes_; ++i)
      if (s_.seen[i] == 1.f) {
        found = true;
        s_.delta[i] = 0.f;
      }
    return found;
  }
  void forget_lone_keys(const Block& b) const {
    for (int64_t c = 0; c < lanes_; c += kWidth) {
      const Vec seen = load(s_.seen + c);
      for (int64_t x = c; x < b.keys * lanes_; x += lanes_)
        store(b.ds + x, seen == broadcast(1.f) ? Vec{} : load(b.ds + x));
    }
  }

  void one_pass() const {
    const T* out = row_of<const T>(a_.out, a_.out_strides, t_.b, t_.h, a_.query_starts[t_.b] + t_.q0);
    products_.load_delta(t_, out, chain_);
    for (int64_t i = 0; i < lanes_; ++i)
      if (is_dead(a_, t_, i)) s_.delta[i] = 0.f;
    clear(s_.ds_sum, lanes_);
    clear(s_.slope_sum, lanes_);
    for_each_block(false, [&](const Block& b) {
      scores(b);
      value_gradients(b);
      for_vectors(lanes_, [&](int64_t c, auto n) { saved_probabilities(b, c, n); });
      if (softcap_)
        sum_rows(s_.slope_sum, lanes_, b.keys, [&](int64_t x) { return load(b.p + x) * load(b.slope + x); });
      add_gradients(b, Stored{b.p, b.ds});
    });
    centre_keys(a_, t_, s_);
  }

  // p and ds of a block, from the saved lse and delta; the sums of ds are added to ds_sum.
  template <int N>
  void saved_probabilities(const Block& b, int64_t c, Vectors<N>) const {
    const int64_t lanes = lanes_;
    const float to_log2 = to_log2_;
    float *p = b.p, *ds = b.ds;
    Vec shift[N], rest[N], delta[N], sum[N];
    const float* grad_lse = s_.grad_lse + c;
    for (int n = 0; n < N; ++n) {
      shift[n] = load(s_.lse + c + n * kWidth);
      rest[n] = load(s_.lse_rest + c + n * kWidth);
      delta[n] = load(s_.delta + c + n * kWidth);
      sum[n] = load(s_.ds_sum + c + n * kWidth);
    }
    for (int64_t j = 0; j < b.keys; j += kShortChain) {
      Vec part[N] = {};
      const int64_t past = least(j + kShortChain, b.keys) * lanes;
      for (int64_t x = j * lanes + c; x < past; x += lanes) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          const int64_t at = x + n * kWidth;
          const Vec y = probability(load(p + at), to_log2, shift[n], rest[n]);
          const Vec g = y * ((load(ds + at) - delta[n]) + load(grad_lse + n * kWidth));
          store(p + at, y);
          store(ds + at, g);
          part[n] = part[n] + g;
        }
      }
      for (int n = 0; n < N; ++n) sum[n] = sum[n] + part[n];
    }
    for (int n = 0; n < N; ++n) store(s_.ds_sum + c + n * kWidth, sum[n]);
  }

  // held: whether all keys have their own place.
  template <class F>
  void for_each_block(bool held, const F& f) const {
    for (int64_t j = begin_, past; j < end_; j = past) {
      past = block_end(j, end_);
      const int64_t x = held ? (j - begin_) * lanes_ : 0;
      f(Block{j, past - j, s_.p + x, s_.ds + x, s_.slope + x, s_.factor + x});
    }
  }

  void scores(const Block& b) const {  // into p
    products_.scores(t_, b.j, b.keys, chain_, b.p);
    if (!folds_scale(a_)) finish_scores(a_, t_, b.j, b.keys, b.p, softcap_ ? b.slope : nullptr);
    mask_edges(a_, t_, b.j, b.keys, b.p);
  }

  void probabilities(const Block& b) const {  // into p, from the saved lse
    scores(b);
    for (int64_t c = 0; c < lanes_; c += kWidth) {
      const Vec shift = load(s_.lse + c), rest = load(s_.lse_rest + c);
      for (int64_t x = c; x < b.keys * lanes_; x += lanes_)
        store(b.p + x, probability(load(b.p + x), to_log2_, shift, rest));
    }
  }
  static Vec probability(Vec score, float to_log2, Vec shift, Vec rest) {
    return Products::exp2_of(fma(score, broadcast(to_log2), -shift)) * rest;
  }

  void value_gradients(const Block& b) const {  // d loss / d (probability times dropout factor), into ds
    products_.value_gradients(t_, b.j, b.keys, chain_, b.ds);
  }

  void normalise() const {  // scale: from row sums of p to their inverses; delta and lse_rest are multiplied by these
    for (int64_t i = 0; i < lanes_; ++i) {
      const bool dead = i >= t_.count || s_.scale[i] == 0.f;
      s_.scale[i] = dead ? 0.f : 1.f / s_.scale[i];
      s_.lse_rest[i] *= s_.scale[i];
      s_.delta[i] *= s_.scale[i];
    }
  }

  void score_gradients(const Block& b) const {  // ds -> d loss / d score; p -> p times dropout factors
    if (dropout_) {
      for_each_dropout(a_, t_, b.j, b.keys, [&](int64_t row, int64_t c, Vec factor) {
        const int64_t x = row * lanes_ + c;
        const Vec p = load(b.p + x);
        store(b.ds + x, p * (fma(load(b.ds + x), factor, -load(s_.delta + c)) + load(s_.grad_lse + c)));
        store(b.p + x, p * factor);
      });
      return;
    }
    for (int64_t c = 0; c < lanes_; c += kWidth) {
      const Vec delta = load(s_.delta + c), grad_lse = load(s_.grad_lse + c);
      for (int64_t x = c; x < b.keys * lanes_; x += lanes_)
        store(b.ds + x, load(b.p + x) * ((load(b.ds + x) - delta) + grad_lse));
    }
  }

  // column(c)(x): the gradients of the elements from x on, in the columns from c on.
  template <class Column>
  void add_gradients(const Block& b, const Column& column) const {
    const Write write = b.j == begin_ ? Write::kStore : Write::kAdd;
    if (a_.dbias || a_.drelative_bias || softcap_) {
      store_gradients(lanes_, b.keys, column, b.p, b.ds);
      add_other_gradients(b);
      products_.add_gradients(t_, b.j, b.keys, write, Stored{b.p, b.ds}, b.p, b.ds);
    } else {
      products_.add_gradients(t_, b.j, b.keys, write, column, b.p, b.ds);
    }
  }

  void add_other_gradients(const Block& b) const {
    if (a_.dbias) add_bias_gradient(a_, t_, b.j, b.keys, b.ds);
    if (a_.drelative_bias) {
      float* row = a_.drelative_bias + (t_.b * a_.heads + t_.h) * a_.relative_bias_stride;
      for (int64_t r = 0; r < b.keys; ++r) {
        float* to = relative_row(a_, t_, b.j + r, row);
        for (int64_t c = 0; c < lanes_; c += kWidth)
          store(to - c, load(to - c) + reversed(load(b.ds + r * lanes_ + c)));
      }
    }
    if (softcap_)
      for (int64_t x = 0; x < b.keys * lanes_; x += kWidth) store(b.ds + x, load(b.ds + x) * load(b.slope + x));
  }

  const AttentionBackward& a_;
  const Tile t_;
  const Products& products_;
  const GradientBuffers& s_;
  int64_t begin_, end_, chain_;  // chain_: of gemm
  const int64_t lanes_;
  const float to_log2_;
  const bool softcap_, dropout_;
};

template <class T>
void mean_row(const T* row, int64_t stride, int64_t count, int64_t dim, float* mean) {
  for (int64_t c = 0; c < dim; ++c) mean[c] = 0.f;
  for (int64_t j = 0; j < count; ++j, row += stride)
    for (int64_t c = 0; c < dim; ++c) mean[c] += to_float(row[c]);
  for (int64_t c = 0; c < dim; ++c) mean[c] /= float(count);
}

template <class T>
void backward_key_head(const AttentionBackward& a, int64_t b, int64_t hk, const GradientBuffers& s) {
  const int64_t padded = round_up(a.dim, kPairColumns), keys = a.key_lengths[b], group = a.heads / a.key_heads;
  const T* k = row_of<const T>(a.key, a.key_strides, b, hk, a.key_starts[b]);
  const T* v = row_of<const T>(a.value, a.value_strides, b, hk, a.key_starts[b]);
  using Products = typename ProductsOf<T>::Type;
  const Products products(a, k, v, keys, s);
  if (keys > held_keys(a)) mean_row(k, a.key_strides.row, keys, a.dim, s.centre);
  __builtin_memset(s.dk, 0, size_t(keys * padded) * 4);
  __builtin_memset(s.dv, 0, size_t(keys * padded) * 4);
  for (int64_t h = hk * group; h < (hk + 1) * group; ++h)
    for (int64_t q0 = 0; q0 < a.query_lengths[b]; q0 += kQueries)
      TileGradients<Products>(a, make_tile(a, b, h, q0), products, s).run();
  T* dk = row_of<T>(a.dk, a.dk_strides, b, hk, a.key_starts[b]);
  T* dv = row_of<T>(a.dv, a.dv_strides, b, hk, a.key_starts[b]);
  store_rows(s.dk, padded, float(a.scale), dk, a.dk_strides.row, keys, a.dim);
  store_rows(s.dv, padded, 1.f, dv, a.dv_strides.row, keys, a.dim);
  zero_rows(dk + keys * a.dk_strides.row, a.dk_strides.row, a.key_rows[b] - keys, a.dim);
  zero_rows(dv + keys * a.dv_strides.row, a.dv_strides.row, a.key_rows[b] - keys, a.dim);
}

template <class T>
void backward_all(const AttentionBackward& a) {
  // Heads and sequences that add to the same slice of dbias are one item, in order.
  const bool join_batch = a.dbias && a.dbias_strides[0] == 0, join_heads = a.dbias && a.dbias_strides[1] == 0;
  const int64_t batches = join_batch ? 1 : a.batch, heads = join_heads ? 1 : a.key_heads, items = batches * heads;
  using Products = typename ProductsOf<T>::Type;
  share_out(items, threads_for(a, 1e5), [&] {
    return [&, s = take_buffers<Products::kByTiles>(a), state = typename Products::State()](int64_t item) {
      const int64_t b0 = item / heads, h0 = item % heads;
      for (int64_t b = b0; b < (join_batch ? a.batch : b0 + 1); ++b)
        for (int64_t h = h0; h < (join_heads ? a.key_heads : h0 + 1); ++h) backward_key_head<T>(a, b, h, s);
    };
  });
}

}  // namespace

void attention_backward(const AttentionBackward& a) {
  if (a.dtype == DType::f32)
    backward_all<float>(a);
  else if (a.dtype == DType::bf16)
    backward_all<bf16>(a);
  else
    backward_all<f16>(a);
}

}  // namespace tf::TF_ISA
