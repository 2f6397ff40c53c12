// Attention forward (Dao et al., "FlashAttention", 2022, on a CPU): a thread takes 64 queries of one head and walks
// over the keys 128 at a time with an online softmax. Scores, probabilities and output are transposed, see
// attention_scores.hpp. Nothing of size Sq x Sk is stored.
#include "attention_scores.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int64_t kDecodeQueries = 6;  // at most this many leave most lanes of a tile idle
constexpr int64_t kGroup = kHasBf16Tiles ? 16 : 4;  // tiles of one head that share the copies of its keys and values

struct Buffers {
  float *scores, *keys, *values, *correction;
  float *queries, *out, *top, *total;  // of kGroup tiles
};

Buffers take_buffers(const Attention& a) {
  const int64_t padded = round_up(a.dim, kPairColumns), tile = kKeys * kQueries;
  const int64_t rows = (kKeys + kPairColumns) * padded;  // gemm_bf16 may read past the last one
  Arena arena{static_cast<char*>(
      tf_scratch(0, 2 * kGroup * Arena::bytes(padded * kQueries) + Arena::bytes(tile) + 2 * Arena::bytes(rows) +
                        (1 + 2 * kGroup) * Arena::bytes(kQueries)))};
  Buffers s;
  s.scores = arena.take(tile);
  s.keys = arena.take(rows);
  s.values = arena.take(rows);
  s.correction = arena.take(kQueries);
  s.queries = arena.take(kGroup * padded * kQueries);
  s.out = arena.take(kGroup * padded * kQueries);
  s.top = arena.take(kGroup * kQueries);
  s.total = arena.take(kGroup * kQueries);
  return s;
}

// Updates the running maximum `top` and sum `total`; scores -> probabilities, in place. The maximum is subtracted
// before the factor to_log2 is applied: the largest score then has probability exp2(0) = 1 exactly.
void softmax_block(const Attention& a, const Tile& t, int64_t j0, int64_t keys, float to_log2, float* tops,
                   float* totals, const Buffers& s) {
  float offset[kQueries];
  for (int64_t c = 0; c < t.lanes; c += kWidth) {
    Vec top = load(s.scores + c);
    for (int64_t j = 1; j < keys; ++j) top = max(load(s.scores + j * t.lanes + c), top);
    const Vec before = load(tops + c), after = max(top, before);
    const Vec finite = after == broadcast(-INFINITY) ? broadcast(0.f) : after;
    store(tops + c, after);
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
    store(totals + c, fma(load(totals + c), load(s.correction + c), sum));
  }
  if (dropout)
    for_each_dropout(a, t, j0, keys, [&](int64_t row, int64_t c, Vec factor) {
      float* p = s.scores + row * t.lanes + c;
      store(p, load(p) * factor);
    });
}

// softmax_block and the pairs of its probabilities, in place, without dropout: for N vectors of queries.
template <int N>
void softmax_pairs(int64_t keys, int64_t lanes, float to_log2, float* scores, float* tops, float* totals,
                   float* correction) {
  Vec top[N], shift[N], sum[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) top[n] = load(tops + n * kWidth);
  for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) top[n] = max(load(scores + j * lanes + n * kWidth), top[n]);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    shift[n] = top[n] == broadcast(-INFINITY) ? broadcast(0.f) : top[n];
    store(correction + n * kWidth, exp2((load(tops + n * kWidth) - shift[n]) * to_log2));
    store(tops + n * kWidth, top[n]);
    sum[n] = Vec{};
  }
  const float* from = scores;
  float* to = scores;
  for (int64_t j = 0; j < keys; j += 32) {  // short sums first: a long float32 sum loses digits
    Vec part[N] = {};
    const int64_t pairs = (least(j + 32, keys) - j) / 2;
    for (int64_t r = 0; r < pairs; ++r, from += 2 * lanes, to += lanes) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Vec even = exp2_for_bf16((load(from + n * kWidth) - shift[n]) * to_log2);
        const Vec odd = exp2_for_bf16((load(from + lanes + n * kWidth) - shift[n]) * to_log2);
        part[n] = part[n] + (even + odd);
        store(to + n * kWidth, pair(even, odd));
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[n] = sum[n] + part[n];
  }
  for (int n = 0; keys % 2 && n < N; ++n) {
    const Vec last = exp2_for_bf16((load(from + n * kWidth) - shift[n]) * to_log2);
    sum[n] = sum[n] + last;
    store(to + n * kWidth, pair(last, Vec{}));
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
    store(totals + n * kWidth, fma(load(totals + n * kWidth), load(correction + n * kWidth), sum[n]));
}

// Fetches rows of the next item into the cache, a few at a time while this item is computed: they lie far apart, and
// the processor fetches nothing ahead by itself.
class Ahead {
 public:
  template <class T>
  void add(const T* rows, int64_t stride, int64_t count, int64_t dim) {
    const int64_t size = sizeof(T);
    parts_[count_++] = {reinterpret_cast<const char*>(rows), stride * size, count, dim * size};
  }
  void some() {
    const int64_t from = row_;
    row_ += kRows;
    for (int i = 0; i < count_; ++i)
      for (int64_t r = from; r < row_ && r < parts_[i].count; ++r)
        for (int64_t c = 0; c < parts_[i].bytes; c += 64)
          __builtin_prefetch(parts_[i].rows + r * parts_[i].stride + c, 0, 2);
  }

 private:
  static constexpr int64_t kRows = 24;
  struct Part {
    const char* rows;
    int64_t stride, count, bytes;
  };
  Part parts_[3];
  int count_ = 0;
  int64_t row_ = 0;
};

// share_out for work(item, next), where each thread first takes a run of neighbouring items, then helps with the
// others' runs. next: the item that this thread is likely to take after this one, or -1. taken: (threads, kRunStep),
// scratch.
constexpr int64_t kRunStep = 8;  // a cache line per counter
template <class Make>
void share_out_runs(int64_t items, int64_t threads, int64_t* taken, const Make& make) {
  if (threads > items) threads = items;
  for (int64_t run = 0; run < threads; ++run) taken[run * kRunStep] = items * run / threads;
  parallel_for(threads, 1, [&](int64_t own, int64_t) {
    auto work = make();
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t run = (own + i) % threads, past = items * (run + 1) / threads;
      for (;;) {
        const int64_t item = __atomic_fetch_add(taken + run * kRunStep, 1, __ATOMIC_RELAXED);
        if (item >= past) break;
        work(item, item + 1 < past ? item + 1 : -1);
      }
    }
  });
}

// Tiles [first, first + count) of head h of sequence b.
template <class T, bool Pairs>
class Group {
 public:
  Group(const AttentionForward& a, int64_t b, int64_t h, int64_t first, int64_t count, const Buffers& s)
      : a_(a), b_(b), hk_(h / (a.heads / a.key_heads)), count_(count), padded_(round_up(a.dim, kPairColumns)), s_(s),
        to_log2_(log2_factor(a)), fold_(folds_scale(a)) {
    for (int64_t i = 0; i < count; ++i) {
      tiles_[i] = make_tile(a, b, h, (first + i) * kQueries);
      key_range(a, tiles_[i], begin_[i], end_[i]);
      if (Pairs && begin_[i] > 0) begin_[i] -= begin_[i] % 2;  // pairs of keys start at an even one
    }
  }

  // What run() reads first.
  Ahead ahead() const {
    Ahead next;
    const int64_t queries = a_.query_starts[b_] + tiles_[0].q0, last = count_ - 1;
    next.add(row_of<const T>(a_.query, a_.query_strides, b_, tiles_[0].h, queries), a_.query_strides.row,
             last * kQueries + tiles_[last].count, a_.dim);
    if (end_[0] <= begin_[0]) return next;
    const int64_t keys = a_.key_starts[b_] + begin_[0], count = block_end(begin_[0], end_[last]) - begin_[0];
    next.add(row_of<const T>(a_.key, a_.key_strides, b_, hk_, keys), a_.key_strides.row, count, a_.dim);
    next.add(row_of<const T>(a_.value, a_.value_strides, b_, hk_, keys), a_.value_strides.row, count, a_.dim);
    return next;
  }

  void run(Ahead next) const {
    int64_t begin = INT64_MAX, end = 0;
    for (int64_t i = 0; i < count_; ++i) {
      if (end_[i] <= begin_[i]) continue;
      begin = least(begin, begin_[i]);
      end = end < end_[i] ? end_[i] : end;
      load_queries(i);
    }
    for (int64_t j = begin; j < end; j = block_end(j, end)) {
      const int64_t past = block_end(j, end);
      const Block block = load_block(j, past - j);
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t from = j > begin_[i] ? j : begin_[i], to = least(past, end_[i]);
        if (from < to) add_block(i, block, from, to - from, next);
      }
    }
    for (int64_t i = 0; i < count_; ++i) finish(i);
  }

 private:
  struct Block {
    int64_t start;
    Operand keys, values;
  };

  float* queries(int64_t i) const { return s_.queries + i * padded_ * kQueries; }
  float* out(int64_t i) const { return s_.out + i * padded_ * kQueries; }

  void load_queries(int64_t i) const {
    const Tile& t = tiles_[i];
    const T* q = row_of<const T>(a_.query, a_.query_strides, b_, t.h, a_.query_starts[b_] + t.q0);
    if constexpr (Pairs)
      load_pairs_transposed(q, a_.query_strides.row, t.count, a_.dim, queries(i), t.lanes);
    else
      load_transposed(q, a_.query_strides.row, t.count, a_.dim, queries(i), t.lanes);
    for (int64_t c = 0; c < t.lanes; c += kWidth) {
      store(s_.top + i * kQueries + c, broadcast(-INFINITY));
      store(s_.total + i * kQueries + c, Vec{});
    }
  }

  Block load_block(int64_t j, int64_t keys) const {
    const T* k = row_of<const T>(a_.key, a_.key_strides, b_, hk_, a_.key_starts[b_] + j);
    const T* v = row_of<const T>(a_.value, a_.value_strides, b_, hk_, a_.key_starts[b_] + j);
    if constexpr (sizeof(T) == 4) {
      return {j, {k, a_.key_strides.row * 4, 4}, {v, 4, a_.value_strides.row * 4}};
    } else if constexpr (Pairs) {
      const int64_t words = round_up((a_.dim + 1) / 2, kPairColumns);
      load_pair_rows(k, a_.key_strides.row, keys, a_.dim, s_.keys, words);
      const Operand copied{s_.keys, words * 4, 4};
      if constexpr (kHasBf16Tiles) {
        pair_rows_transposed(v, a_.value_strides.row, keys, a_.dim, s_.values, kKeys / 2);
        return {j, copied, {s_.values, kKeys / 2 * 4, 4}};
      } else {
        pair_rows(v, a_.value_strides.row, keys, a_.dim, s_.values, padded_);
        return {j, copied, {s_.values, 4, padded_ * 4}};
      }
    } else {
      load_rows(k, a_.key_strides.row, keys, a_.dim, s_.keys, padded_);
      load_rows(v, a_.value_strides.row, keys, a_.dim, s_.values, padded_);
    }
    return {j, {s_.keys, padded_ * 4, 4}, {s_.values, 4, padded_ * 4}};
  }

  // Keys [from, from + keys), which are in the block.
  void add_block(int64_t i, const Block& block, int64_t from, int64_t keys, Ahead& next) const {
    const Tile& t = tiles_[i];
    const Write write = from == begin_[i] ? Write::kStore : Write::kScaleAdd;
    const int64_t skip = from - block.start, lanes = t.lanes;
    Operand k = block.keys, v = block.values;
    k.data = static_cast<const char*>(k.data) + skip * k.row_bytes;
    v.data = static_cast<const char*>(v.data) + (Pairs ? skip / 2 : skip) * v.depth_bytes;
    next.some();
    if constexpr (Pairs)
      gemm_bf16(Write::kStore, keys, lanes, a_.dim, k, queries(i), lanes, s_.scores, lanes);
    else
      gemm(Write::kStore, keys, lanes, a_.dim, k, queries(i), lanes, s_.scores, lanes, nullptr,
           chain_of(least(keys, a_.query_lengths[b_])));
    if (!fold_) finish_scores(a_, t, from, keys, s_.scores, nullptr);
    mask_edges(a_, t, from, keys, s_.scores);
    next.some();
    float *tops = s_.top + i * kQueries, *totals = s_.total + i * kQueries;
    if constexpr (Pairs) {
      if (a_.dropout.threshold) {
        softmax_block(a_, t, from, keys, to_log2_, tops, totals, s_);
        for (int64_t r = 0; r < keys; r += 2)
          for (int64_t c = 0; c < lanes; c += kWidth) {
            const float* p = s_.scores + r * lanes + c;
            store(s_.scores + r / 2 * lanes + c, pair(load(p), r + 1 < keys ? load(p + lanes) : Vec{}));
          }
      } else {
        for_vectors(lanes, [&](int64_t c, auto n) {
          softmax_pairs<n.kCount>(keys, lanes, to_log2_, s_.scores + c, tops + c, totals + c, s_.correction + c);
        });
      }
      gemm_bf16(write, a_.dim, lanes, keys, v, s_.scores, lanes, out(i), lanes, s_.correction);
    } else {
      softmax_block(a_, t, from, keys, to_log2_, tops, totals, s_);
      gemm(write, a_.dim, lanes, keys, v, s_.scores, lanes, out(i), lanes, s_.correction);
    }
  }

  void finish(int64_t i) const {
    const Tile& t = tiles_[i];
    const int64_t row = a_.query_starts[b_] + t.q0;
    T* y = row_of<T>(a_.out, a_.out_strides, b_, t.h, row);
    float* lse = !a_.lse ? nullptr : a_.lse + b_ * a_.lse_batch + t.h * a_.lse_head + row;
    if (end_[i] <= begin_[i]) {
      zero_rows(y, a_.out_strides.row, t.count, a_.dim);
      for (int64_t r = 0; lse && r < t.count; ++r) lse[r] = -INFINITY;
      return;
    }
    const float *top = s_.top + i * kQueries, *total = s_.total + i * kQueries;
    for (int64_t c = 0; c < t.lanes; c += kWidth) {
      const Vec sum = load(total + c);
      store(s_.correction + c, sum == Vec{} ? broadcast(0.f) : 1.f / sum);
    }
    if constexpr (Pairs)
      store_pairs_transposed(out(i), t.lanes, s_.correction, y, a_.out_strides.row, t.count, a_.dim);
    else
      store_transposed(out(i), t.lanes, s_.correction, y, a_.out_strides.row, t.count, a_.dim);
    for (int64_t r = 0; lse && r < t.count; ++r)
      lse[r] = total[r] == 0.f ? -INFINITY : top[r] * (fold_ ? float(a_.scale) : 1.f) + __builtin_logf(total[r]);
  }

  const AttentionForward& a_;
  const int64_t b_, hk_, count_, padded_;
  const Buffers& s_;
  const float to_log2_;
  const bool fold_;
  Tile tiles_[kGroup];
  int64_t begin_[kGroup], end_[kGroup];  // keys that the tiles see
};

template <class T, bool Pairs>
void forward_all(const AttentionForward& a) {
  // first[b]: number of groups before sequence b, for one head.
  const int64_t threads = threads_for(a, 2e5);
  int64_t* first = scratch<int64_t>(1, a.batch + 1 + threads * kRunStep);
  const int64_t largest = !Pairs || !kHasBf16Tiles ? 4 : a.dim <= 128 ? kGroup : kGroup / 2;  // fits the second cache
  for (int64_t size = sizeof(T) == 4 ? 1 : largest;; size /= 2) {  // float32 is used in place
    first[0] = 0;
    for (int64_t b = 0; b < a.batch; ++b)
      first[b + 1] = first[b] + (a.query_lengths[b] + size * kQueries - 1) / (size * kQueries);
    const int64_t items = first[a.batch] * a.heads;
    if (size > 1 && items < 4 * threads) continue;
    const auto group_of = [&](int64_t item, const Buffers& s) {
      int64_t low = 0, high = a.batch;  // low becomes the sequence: first[low] * heads <= item < first[low + 1] * heads
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (first[middle] * a.heads <= item ? low : high) = middle;
      }
      const int64_t groups = first[low + 1] - first[low], within = item - first[low] * a.heads;
      const int64_t group = groups - 1 - within % groups;  // causal: the longest first
      const int64_t tiles = (a.query_lengths[low] + kQueries - 1) / kQueries - group * size;
      return Group<T, Pairs>(a, low, within / groups, group * size, least(tiles, size), s);
    };
    share_out_runs(items, threads, first + a.batch + 1, [&] {
      return [&, s = take_buffers(a), state = ProductState()](int64_t item, int64_t next) {
        group_of(item, s).run(next < 0 ? Ahead{} : group_of(next, s).ahead());
      };
    });
    return;
  }
}

}  // namespace

void attention_decode(const AttentionForward& a);  // attention_decode.cpp

void attention_forward(const AttentionForward& a) {
  int64_t queries = 0;
  for (int64_t b = 0; b < a.batch; ++b) queries = a.query_lengths[b] > queries ? a.query_lengths[b] : queries;
  if (!queries) return;
  if (queries <= kDecodeQueries && !a.dropout.threshold) return attention_decode(a);
  if (a.dtype == DType::f32)
    forward_all<float, false>(a);
  else if (a.dtype == DType::bf16)
    forward_all<bf16, kHasBf16Dot>(a);
  else
    forward_all<f16, false>(a);
}

}  // namespace tf::TF_ISA
