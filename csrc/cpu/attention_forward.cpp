// Attention forward (Dao et al., "FlashAttention", 2022, on a CPU): a thread takes 64 queries of one head and walks
// over the keys 128 at a time with an online softmax. Scores, probabilities and output are transposed, see
// attention_scores.hpp. Nothing of size Sq x Sk is stored.
#include "attention_scores.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int64_t kDecodeQueries = 6;  // at most this many leave most lanes of a tile idle

struct Buffers {
  float *queries, *scores, *extra, *keys, *values, *out, *top, *total, *correction;
};

Buffers take_buffers(const Attention& a) {
  const int64_t padded = round_up(a.dim, kWidth), tile = kKeys * kQueries, rows = kKeys * padded;
  Arena arena{static_cast<char*>(
      tf_scratch(0, 2 * Arena::bytes(padded * kQueries) + 2 * Arena::bytes(tile) + 2 * Arena::bytes(rows) +
                        3 * Arena::bytes(kQueries)))};
  Buffers s;
  s.queries = arena.take(padded * kQueries);
  s.out = arena.take(padded * kQueries);
  s.scores = arena.take(tile);
  s.extra = arena.take(tile);
  s.keys = arena.take(rows);
  s.values = arena.take(rows);
  s.top = arena.take(kQueries);
  s.total = arena.take(kQueries);
  s.correction = arena.take(kQueries);
  return s;
}

// Updates the running maximum `top` and sum `total`; scores -> probabilities, in place. The maximum is subtracted
// before the factor to_log2 is applied: the largest score then has probability exp2(0) = 1 exactly.
void softmax_block(const Attention& a, const Tile& t, int64_t j0, int64_t keys, float to_log2, const Buffers& s) {
  float offset[kQueries];
  for (int64_t c = 0; c < t.lanes; c += kWidth) {
    Vec top = load(s.scores + c);
    for (int64_t j = 1; j < keys; ++j) top = max(load(s.scores + j * t.lanes + c), top);
    const Vec before = load(s.top + c), after = max(top, before);
    const Vec finite = after == broadcast(-INFINITY) ? broadcast(0.f) : after;
    store(s.top + c, after);
    store(offset + c, finite);
    store(s.correction + c, exp2((before - finite) * to_log2));
  }
  const bool dropout = a.dropout.threshold != 0;
  for (int64_t c = 0; c < t.lanes; c += kWidth) {
    const Vec shift = load(offset + c);
    Vec sum = Vec{};
    float* p = s.scores + c;
    for (int64_t j = 0; j < keys; j += 32) {  // short sums first: a long float32 sum loses digits
      Vec part = Vec{};
      for (int64_t r = j; r < keys && r < j + 32; ++r, p += t.lanes) {
        const Vec e = exp2((load(p) - shift) * to_log2);
        store(p, e);
        part = part + e;
      }
      sum = sum + part;
    }
    store(s.total + c, fma(load(s.total + c), load(s.correction + c), sum));
  }
  if (dropout)
    for_each_dropout(a, t, j0, keys, [&](int64_t row, int64_t c, Vec factor) {
      float* p = s.scores + row * t.lanes + c;
      store(p, load(p) * factor);
    });
}

template <class T, bool Pairs>
void forward_tile(const AttentionForward& a, const Tile& t, const Buffers& s) {
  const int64_t hk = t.h / (a.heads / a.key_heads), padded = round_up(a.dim, kWidth), lanes = t.lanes;
  T* out = row_of<T>(a.out, a.out_strides, t.b, t.h, a.query_starts[t.b] + t.q0);
  float* lse = !a.lse ? nullptr : a.lse + t.b * a.lse_batch + t.h * a.lse_head + a.query_starts[t.b] + t.q0;
  int64_t begin, end;
  key_range(a, t, begin, end);
  if (end <= begin) {
    zero_rows(out, a.out_strides.row, t.count, a.dim);
    for (int64_t i = 0; lse && i < t.count; ++i) lse[i] = -INFINITY;
    return;
  }
  const T* q = row_of<const T>(a.query, a.query_strides, t.b, t.h, a.query_starts[t.b] + t.q0);
  if constexpr (Pairs)
    load_pairs_transposed(q, a.query_strides.row, t.count, a.dim, s.queries, lanes);
  else
    load_transposed(q, a.query_strides.row, t.count, a.dim, s.queries, lanes);
  for (int64_t c = 0; c < lanes; c += kWidth) {
    store(s.top + c, broadcast(-INFINITY));
    store(s.total + c, Vec{});
  }
  const bool fold = folds_scale(a);
  const float to_log2 = log2_factor(a);

  for (int64_t j = begin; j < end; j = block_end(j, end)) {
    const int64_t keys = block_end(j, end) - j;
    const Write write = j == begin ? Write::kStore : Write::kScaleAdd;
    const T* k = row_of<const T>(a.key, a.key_strides, t.b, hk, a.key_starts[t.b] + j);
    const T* v = row_of<const T>(a.value, a.value_strides, t.b, hk, a.key_starts[t.b] + j);
    if constexpr (Pairs) {
      Operand rows{k, a.key_strides.row * 2, 4};
      if (a.dim % 2) {  // a pair would reach into the next row
        load_pair_rows(k, a.key_strides.row, keys, a.dim, s.keys, padded);
        rows = {s.keys, padded * 4, 4};
      }
      gemm_bf16(Write::kStore, keys, lanes, (a.dim + 1) / 2, rows, s.queries, lanes, s.scores, lanes);
      pair_rows(v, a.value_strides.row, keys, a.dim, s.values, padded);
    } else {
      Operand rows{k, a.key_strides.row * int64_t(sizeof(T)), 4};
      if constexpr (sizeof(T) == 2) {
        load_rows(k, a.key_strides.row, keys, a.dim, s.keys, padded);
        load_rows(v, a.value_strides.row, keys, a.dim, s.values, padded);
        rows = {s.keys, padded * 4, 4};
      }
      gemm(Write::kStore, keys, lanes, a.dim, rows, s.queries, lanes, s.scores, lanes, nullptr, chain_of(keys));
    }
    if (!fold) finish_scores(a, t, j, keys, s.scores, nullptr);
    mask_edges(a, t, j, keys, s.scores);
    softmax_block(a, t, j, keys, to_log2, s);
    if constexpr (Pairs) {
      for (int64_t r = 0; r < keys; r += 2)
        for (int64_t c = 0; c < lanes; c += kWidth)
          store(s.extra + r / 2 * lanes + c,
                pair(load(s.scores + r * lanes + c), r + 1 < keys ? load(s.scores + (r + 1) * lanes + c) : Vec{}));
      gemm_bf16(write, a.dim, lanes, (keys + 1) / 2, {s.values, 4, padded * 4}, s.extra, lanes, s.out,
                lanes, s.correction);
    } else {
      const Operand columns = sizeof(T) == 2 ? Operand{s.values, 4, padded * 4}
                                             : Operand{v, 4, a.value_strides.row * 4};
      gemm(write, a.dim, lanes, keys, columns, s.scores, lanes, s.out, lanes, s.correction);
    }
  }

  for (int64_t c = 0; c < lanes; c += kWidth) {
    const Vec total = load(s.total + c);
    store(s.correction + c, total == Vec{} ? broadcast(0.f) : 1.f / total);
  }
  store_transposed(s.out, lanes, s.correction, out, a.out_strides.row, t.count, a.dim);
  for (int64_t i = 0; i < t.count; ++i)
    if (lse)
      lse[i] =
          s.total[i] == 0.f ? -INFINITY : s.top[i] * (fold ? float(a.scale) : 1.f) + __builtin_logf(s.total[i]);
}

template <class T, bool Pairs>
void forward_all(const AttentionForward& a) {
  // first[b]: number of tiles before sequence b, for one head.
  int64_t* first = scratch<int64_t>(1, a.batch + 1);
  first[0] = 0;
  for (int64_t b = 0; b < a.batch; ++b) first[b + 1] = first[b] + (a.query_lengths[b] + kQueries - 1) / kQueries;
  const int64_t items = first[a.batch] * a.heads;
  share_out(items, threads_for(a, 2e5), [&] {
    return [&, s = take_buffers(a)](int64_t item) {
      int64_t low = 0, high = a.batch;  // low becomes the sequence: first[low] * heads <= item < first[low + 1] * heads
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (first[middle] * a.heads <= item ? low : high) = middle;
      }
      const int64_t tiles = first[low + 1] - first[low], within = item - first[low] * a.heads;
      const int64_t tile = tiles - 1 - within % tiles;  // causal: the longest first
      forward_tile<T, Pairs>(a, make_tile(a, low, within / tiles, tile * kQueries), s);
    };
  });
}

}  // namespace

void attention_decode(const AttentionForward& a);  // attention_decode.cpp

void attention_forward(const AttentionForward& a) {
  int64_t queries = 0;
  for (int64_t b = 0; b < a.batch; ++b) queries = a.query_lengths[b] > queries ? a.query_lengths[b] : queries;
  if (queries <= kDecodeQueries && !a.dropout.threshold) return attention_decode(a);
  if (a.dtype == DType::f32)
    forward_all<float, false>(a);
  else if (a.dtype == DType::bf16)
    forward_all<bf16, kHasBf16Dot>(a);
  else
    forward_all<f16, false>(a);
}

}  // namespace tf::TF_ISA
