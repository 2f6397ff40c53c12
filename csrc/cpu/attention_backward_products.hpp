// The five matrix products of attention's backward pass, and their operands: in float32, or in bf16 by tiles (AMX).
//
// Scores S = K Q^T and gradients of probabilities D = V dO^T are tiles of (keys, lanes), as in attention_scores.hpp.
// From probabilities P and score gradients G of that shape follow dV += P dO, dK += G Q and dQ^T += K^T G.
#pragma once
#include "attention_scores.hpp"

namespace tf::TF_ISA {

// A mask or a bias may leave a row a single key with all the probability; its score has no gradient. With dropout the
// output is not that key's value but a scaled one, and its rounding would give the score a gradient.
static inline bool has_lone_keys(const Attention& a) {
  return a.dropout.threshold != 0 || a.mask || a.bias_type != BiasType::none || a.relative_bias;
}
// How many keys' scores are held at once, at most; beyond a thousand that takes up to a tenth more time.
static inline int64_t held_keys(const Attention& a) { return has_lone_keys(a) ? 8192 : 1024; }

struct GradientBuffers {
  float *queries_t, *grads_t, *queries, *grads, *dq;  // a tile of queries: (dim, lanes) and (lanes, padded dim)
  float *p, *ds, *slope, *factor;                     // scores: (keys, lanes); factor: of dropout
  float *lse, *lse_rest;      // in units of log2, rounded; 2^-(its rounding error)
  float *delta, *grad_lse;
  float* top;    // the largest scores
  float* scale;  // row sums of p, then their inverses, then the scale of the scores
  float *ds_sum, *slope_sum;  // row sums of ds and of p * slope
  float* seen;                // keys per row with a probability above zero
  float* centre;              // the mean key: (padded dim)
  float *keys, *values, *dk, *dv;  // a whole sequence: (keys, padded dim)
  // For products of tiles, in bf16: `keys` and `values` are words of two along the head dim, and so are `queries_t` and
  // `grads_t`, transposed; `queries` and `grads` are words of two queries.
  float* keys_t;             // (dim, pairs of keys)
  bf16 *p_rows, *ds_rows;    // (keys, lanes)
  float* ds_pairs;           // (pairs of keys, lanes)
};

static inline int64_t longest_keys(const Attention& a) {
  int64_t longest = 1;
  for (int64_t b = 0; b < a.batch; ++b) longest = a.key_lengths[b] > longest ? a.key_lengths[b] : longest;
  return longest;
}
// From row to row of keys_t: never a power of two lines, which would share few places in the cache.
static inline int64_t pairs_of_keys(const Attention& a) { return round_up(longest_keys(a), 64) / 2 + 16; }

template <bool ByTiles>
static GradientBuffers take_buffers(const Attention& a) {
  const int64_t padded = round_up(a.dim, kPairColumns), side = padded * kQueries, longest = longest_keys(a);
  const int64_t sequence = longest * padded, held = held_keys(a);
  const int64_t tile = round_up(longest < held ? longest : held, kKeys) * kQueries;
  const bool copies = a.dtype != DType::f32;
  const int64_t copy = ByTiles ? (longest + kPairColumns) * round_up((a.dim + 1) / 2, kPairColumns) : sequence;
  const int64_t keys_t = padded * pairs_of_keys(a);
  Arena arena{static_cast<char*>(
      tf_scratch(0, 5 * Arena::bytes(side) + 4 * Arena::bytes(tile) + 9 * Arena::bytes(kQueries) +
                        Arena::bytes(padded) + 2 * Arena::bytes(sequence) + (copies ? 2 * Arena::bytes(copy) : 0) +
                        (ByTiles ? Arena::bytes(keys_t) + 3 * Arena::bytes(tile / 2) : 0)))};
  GradientBuffers s{};
  float** const sides[] = {&s.queries_t, &s.grads_t, &s.queries, &s.grads, &s.dq};
  for (float** p : sides) *p = arena.take(side);
  float** const tiles[] = {&s.p, &s.ds, &s.slope, &s.factor};
  for (float** p : tiles) *p = arena.take(tile);
  float** const rows[] = {&s.lse, &s.lse_rest, &s.delta,     &s.grad_lse, &s.top,
                          &s.scale, &s.ds_sum, &s.slope_sum, &s.seen};
  for (float** p : rows) *p = arena.take(kQueries);
  s.centre = arena.take(padded);
  s.dk = arena.take(sequence);
  s.dv = arena.take(sequence);
  if (copies) {
    s.keys = arena.take(copy);
    s.values = arena.take(copy);
  }
  if (ByTiles) {
    s.keys_t = arena.take(keys_t);
    s.p_rows = reinterpret_cast<bf16*>(arena.take(tile / 2));
    s.ds_rows = reinterpret_cast<bf16*>(arena.take(tile / 2));
    s.ds_pairs = arena.take(tile / 2);
  }
  return s;
}

static inline Operand from_key(Operand rows, int64_t j) {
  return {static_cast<const char*>(rows.data) + j * rows.row_bytes, rows.row_bytes, rows.depth_bytes};
}

struct ProbabilityAndGradient {  // the probability times its dropout factor, and d loss / d score
  Vec p, ds;
};

// column(c)(x), for all elements x of a block, to p and ds.
template <class Column>
static inline void store_gradients(int64_t lanes, int64_t keys, const Column& column, float* p, float* ds) {
  for (int64_t c = 0; c < lanes; c += kWidth) {
    const auto value = column(c);
    for (int64_t x = c; x < keys * lanes; x += lanes) {
      const ProbabilityAndGradient v = value(x);
      store(p + x, v.p);
      store(ds + x, v.ds);
    }
  }
}

// The column of gradients that are stored already.
struct Stored {
  float *p, *ds;
  auto operator()(int64_t) const {
    return [p = p, ds = ds](int64_t x) { return ProbabilityAndGradient{load(p + x), load(ds + x)}; };
  }
};
static inline void store_gradients(int64_t, int64_t, const Stored&, float*, float*) {}

// A head of one sequence. k, v: its keys and values.
template <class T>
class FloatProducts {
 public:
  using Element = T;
  static constexpr bool kByTiles = false;
  struct State {};
  FloatProducts(const AttentionBackward& a, const T* k, const T* v, int64_t keys, const GradientBuffers& s)
      : a_(a), s_(s), padded_(round_up(a.dim, kPairColumns)), key_rows_{k, a.key_strides.row * 4, 4},
        value_rows_{v, a.value_strides.row * 4, 4} {
    if constexpr (sizeof(T) == 2) {
      load_rows(k, a.key_strides.row, keys, a.dim, s.keys, padded_);
      load_rows(v, a.value_strides.row, keys, a.dim, s.values, padded_);
      key_rows_ = {s.keys, padded_ * 4, 4};
      value_rows_ = {s.values, padded_ * 4, 4};
    }
  }

  void load_tile(const Tile& t, const T* q, const T* grad) const {
    load_transposed(q, a_.query_strides.row, t.count, a_.dim, s_.queries_t, t.lanes);
    load_transposed(grad, a_.grad_out_strides.row, t.count, a_.dim, s_.grads_t, t.lanes);
    load_rows(q, a_.query_strides.row, t.count, a_.dim, s_.queries, padded_);
    load_rows(grad, a_.grad_out_strides.row, t.count, a_.dim, s_.grads, padded_);
  }

  // delta = rowsum(grad * out), summed in the same order as gemm sums grad * value with this chain length: the score of
  // a row that attends to one key then has a gradient of exactly zero.
  void load_delta(const Tile& t, const T* out, int64_t chain) const {
    float* out_t = s_.dq;  // not yet in use
    load_transposed(out, a_.out_strides.row, t.count, a_.dim, out_t, t.lanes);
    for (int64_t c = 0; c < t.lanes; c += kWidth) {
      Vec dot = Vec{};
      for (int64_t d = 0; d < a_.dim; d += chain) {
        Vec part = Vec{};
        for (int64_t i = d; i < a_.dim && i < d + chain; ++i)
          part = fma(load(s_.grads_t + i * t.lanes + c), load(out_t + i * t.lanes + c), part);
        dot = dot + part;
      }
      store(s_.delta + c, dot);
    }
  }

  void scores(const Tile& t, int64_t j, int64_t keys, int64_t chain, float* to) const {
    gemm(Write::kStore, keys, t.lanes, a_.dim, from_key(key_rows_, j), s_.queries_t, t.lanes, to, t.lanes, nullptr,
         chain);
  }
  void value_gradients(const Tile& t, int64_t j, int64_t keys, int64_t chain, float* to) const {
    gemm(Write::kStore, keys, t.lanes, a_.dim, from_key(value_rows_, j), s_.grads_t, t.lanes, to, t.lanes, nullptr,
         chain);
  }
  // Of a block, from column(c)(x) for all its elements x, which may be in p and ds. `write`: to dq.
  template <class Column>
  void add_gradients(const Tile& t, int64_t j, int64_t keys, Write write, const Column& column, float* p,
                     float* ds) const {
    store_gradients(t.lanes, keys, column, p, ds);
    float *dk = s_.dk + j * padded_, *dv = s_.dv + j * padded_;
    gemm(Write::kAdd, keys, padded_, t.count, {p, t.lanes * 4, 4}, s_.grads, padded_, dv, padded_);
    gemm(Write::kAdd, keys, padded_, t.count, {ds, t.lanes * 4, 4}, s_.queries, padded_, dk, padded_);
    const Operand keys_t{from_key(key_rows_, j).data, 4, key_rows_.row_bytes};
    gemm(write, a_.dim, t.lanes, keys, keys_t, ds, t.lanes, s_.dq, t.lanes);
  }
  static Vec exp2_of(Vec x) { return exp2(x); }

 private:
  const AttentionBackward& a_;
  const GradientBuffers& s_;
  const int64_t padded_;
  Operand key_rows_, value_rows_;
};

#if defined(TF_TILES)
class TileProducts {
 public:
  using Element = bf16;
  static constexpr bool kByTiles = true;
  using State = Tiles;
  TileProducts(const AttentionBackward& a, const bf16* k, const bf16* v, int64_t keys, const GradientBuffers& s)
      : a_(a), s_(s), padded_(round_up(a.dim, kPairColumns)), words_((a.dim + 1) / 2),
        row_words_(round_up(words_, kPairColumns)), pairs_(pairs_of_keys(a)) {
    load_pair_rows(k, a.key_strides.row, keys, a.dim, s.keys, row_words_);
    load_pair_rows(v, a.value_strides.row, keys, a.dim, s.values, row_words_);
    pair_rows_transposed(k, a.key_strides.row, keys, a.dim, s.keys_t, pairs_);
  }

  void load_tile(const Tile& t, const bf16* q, const bf16* grad) const {
    load_pairs_transposed(q, a_.query_strides.row, t.count, a_.dim, s_.queries_t, t.lanes);
    load_pairs_transposed(grad, a_.grad_out_strides.row, t.count, a_.dim, s_.grads_t, t.lanes);
    pair_rows(q, a_.query_strides.row, t.count, a_.dim, s_.queries, padded_);
    pair_rows(grad, a_.grad_out_strides.row, t.count, a_.dim, s_.grads, padded_);
  }

  // As above: tiles sum 16 even and 16 odd products by themselves.
  void load_delta(const Tile& t, const bf16* out, int64_t) const {
    float* out_t = s_.dq;  // not yet in use
    load_pairs_transposed(out, a_.out_strides.row, t.count, a_.dim, out_t, t.lanes);
    for (int64_t c = 0; c < t.lanes; c += kWidth) {
      Vec dot = Vec{};
      for (int64_t d = 0; d < words_; d += 16) {
        Vec even = Vec{}, odd = Vec{};
        for (int64_t i = d; i < words_ && i < d + 16; ++i) {
          const VecU x = bit_cast<VecU>(load(s_.grads_t + i * t.lanes + c));
          const VecU y = bit_cast<VecU>(load(out_t + i * t.lanes + c));
          even = fma(bit_cast<Vec>(x << 16), bit_cast<Vec>(y << 16), even);
          odd = fma(bit_cast<Vec>(x & 0xffff0000u), bit_cast<Vec>(y & 0xffff0000u), odd);
        }
        dot = dot + (even + odd);
      }
      store(s_.delta + c, dot);
    }
  }

  void scores(const Tile& t, int64_t j, int64_t keys, int64_t, float* to) const {
    gemm_bf16(Write::kStore, keys, t.lanes, a_.dim, rows(s_.keys, j), s_.queries_t, t.lanes, to, t.lanes);
  }
  void value_gradients(const Tile& t, int64_t j, int64_t keys, int64_t, float* to) const {
    gemm_bf16(Write::kStore, keys, t.lanes, a_.dim, rows(s_.values, j), s_.grads_t, t.lanes, to, t.lanes);
  }
  // j is even.
  template <class Column>
  void add_gradients(const Tile& t, int64_t j, int64_t keys, Write write, const Column& column, float*, float*) const {
    round_all(t.lanes, keys, column);
    float *dk = s_.dk + j * padded_, *dv = s_.dv + j * padded_;
    gemm_bf16(Write::kAdd, keys, padded_, t.count, {s_.p_rows, t.lanes * 2, 4}, s_.grads, padded_, dv, padded_);
    gemm_bf16(Write::kAdd, keys, padded_, t.count, {s_.ds_rows, t.lanes * 2, 4}, s_.queries, padded_, dk, padded_);
    gemm_bf16(write, a_.dim, t.lanes, keys, {s_.keys_t + j / 2, pairs_ * 4, 4}, s_.ds_pairs, t.lanes, s_.dq,
              t.lanes);
  }
  static Vec exp2_of(Vec x) { return exp2_for_bf16(x); }

 private:
  Operand rows(const float* words, int64_t j) const { return {words + j * row_words_, row_words_ * 4, 4}; }

  // p and ds in bf16, two vectors of queries at a time: lanes is a multiple of kPairColumns.
  template <class Column>
  void round_all(int64_t lanes, int64_t keys, const Column& column) const {
    int64_t c = 0;
    for (; c + 2 * kWidth <= lanes; c += 2 * kWidth) {
      const auto low = column(c), high = column(c + kWidth);
      bf16 *p_rows = s_.p_rows + c, *ds_rows = s_.ds_rows + c;
      float* pairs = s_.ds_pairs + c;
      for (int64_t r = 0, x = c; r < keys; r += 2, x += 2 * lanes) {
        const ProbabilityAndGradient even = low(x), even_high = high(x + kWidth);
        ProbabilityAndGradient odd{}, odd_high{};
        store_two(p_rows, even.p, even_high.p);
        store_two(ds_rows, even.ds, even_high.ds);
        if (r + 1 < keys) {
          odd = low(x + lanes), odd_high = high(x + lanes + kWidth);
          store_two(p_rows + lanes, odd.p, odd_high.p);
          store_two(ds_rows + lanes, odd.ds, odd_high.ds);
        }
        store(pairs, pair(even.ds, odd.ds));
        store(pairs + kWidth, pair(even_high.ds, odd_high.ds));
        p_rows += 2 * lanes;
        ds_rows += 2 * lanes;
        pairs += lanes;
      }
    }
    if (c == lanes) return;
    const auto value = column(c);
    for (int64_t r = 0, x = c; r < keys; ++r, x += lanes) {
      const ProbabilityAndGradient v = value(x);
      store(s_.p_rows + x, v.p);
      store(s_.ds_rows + x, v.ds);
      if (r % 2 == 0) store(s_.ds_pairs + r / 2 * lanes + c, pair(v.ds, r + 1 < keys ? value(x + lanes).ds : Vec{}));
    }
  }

  const AttentionBackward& a_;
  const GradientBuffers& s_;
  const int64_t padded_, words_, row_words_, pairs_;
};
#endif

template <class T>
struct ProductsOf {
  using Type = FloatProducts<T>;
};
#if defined(TF_TILES)
template <>
struct ProductsOf<bf16> {
  using Type = TileProducts;
};
#endif

}  // namespace tf::TF_ISA
