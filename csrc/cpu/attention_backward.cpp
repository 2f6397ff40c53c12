// Attention backward: probabilities are recomputed from the saved log-sum-exp (Dao, "FlashAttention-2", 2023, algorithm
// 2). One work item is a key head of one sequence, so dK and dV have a single writer and a fixed order of addition; the
// result does not depend on the number of threads.
#include "attention_scores.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

struct Buffers {
  float *queries_t, *grads_t, *queries, *grads, *dq;  // a tile of queries: (dim, lanes) and (lanes, padded dim)
  float *p, *ds, *slope;                              // a tile of scores: (keys, lanes)
  float *lse, *lse_rest;  // in units of log2, and 2^-(what its rounding lost)
  float *delta, *grad_lse;
  float* scale;  // what a row's probabilities are short of summing to one, then the scale of the scores
  float *ds_sum, *slope_sum;  // sums of a row's ds and of its p * slope
  float* centre;              // the mean key: (padded dim)
  float *keys, *values, *dk, *dv;  // a whole sequence: (keys, padded dim)
};

Buffers take_buffers(const Attention& a) {
  const int64_t padded = round_up(a.dim, kWidth), side = padded * kQueries, tile = kKeys * kQueries;
  int64_t longest = 1;
  for (int64_t b = 0; b < a.batch; ++b) longest = a.k_count[b] > longest ? a.k_count[b] : longest;
  const int64_t sequence = longest * padded, copies = a.dtype == DType::f32 ? 2 : 4;
  Arena arena{static_cast<char*>(tf_scratch(
      0, 5 * Arena::bytes(side) + 3 * Arena::bytes(tile) + 7 * Arena::bytes(kQueries) + Arena::bytes(padded) +
             copies * Arena::bytes(sequence)))};
  Buffers s{};
  float** const sides[] = {&s.queries_t, &s.grads_t, &s.queries, &s.grads, &s.dq};
  for (float** p : sides) *p = arena.take(side);
  float** const tiles[] = {&s.p, &s.ds, &s.slope};
  for (float** p : tiles) *p = arena.take(tile);
  float** const rows[] = {&s.lse, &s.lse_rest, &s.delta, &s.grad_lse, &s.scale, &s.ds_sum, &s.slope_sum};
  for (float** p : rows) *p = arena.take(kQueries);
  s.centre = arena.take(padded);
  s.dk = arena.take(sequence);
  s.dv = arena.take(sequence);
  if (copies == 4) {
    s.keys = arena.take(sequence);
    s.values = arena.take(sequence);
  }
  return s;
}

// dbias += the tile's score gradients, summed over broadcast axes.
void add_bias_gradient(const AttentionBackward& a, const Tile& t, int64_t j0, int64_t keys, const float* ds) {
  const int64_t* s = a.dbias_stride;
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

// chain: how the product of values and grad_out is added up.
template <class T>
void load_tile(const AttentionBackward& a, const Tile& t, int64_t chain, const Buffers& s) {
  const int64_t row = a.q_start[t.b] + t.q0, padded = round_up(a.dim, kWidth);
  const auto at = [&](const void* data, const Rows& rows) {
    return static_cast<const T*>(data) + t.b * rows.batch + t.h * rows.head + row * rows.row;
  };
  const T* q = at(a.q, a.q_rows);
  const T* grad = at(a.grad_out, a.grad_out_rows);
  const T* out = at(a.out, a.out_rows);
  load_transposed(q, a.q_rows.row, t.count, a.dim, s.queries_t, t.lanes);
  load_transposed(grad, a.grad_out_rows.row, t.count, a.dim, s.grads_t, t.lanes);
  load_rows(q, a.q_rows.row, t.count, a.dim, s.queries, padded);
  load_rows(grad, a.grad_out_rows.row, t.count, a.dim, s.grads, padded);
  const float* lse = a.lse + t.b * a.lse_batch + t.h * a.lse_head + row;
  const float* grad_lse = a.grad_lse ? a.grad_lse + t.b * a.grad_lse_batch + t.h * a.grad_lse_head + row : nullptr;
  // delta = rowsum(grad * out), added up in the order in which gemm adds up grad * value: a row that attends to one
  // key then has a gradient of exactly zero, as it should.
  float* out_t = s.dq;  // not yet in use
  load_transposed(out, a.out_rows.row, t.count, a.dim, out_t, t.lanes);
  for (int64_t c = 0; c < t.lanes; c += kWidth) {
    Vec dot = Vec{};
    for (int64_t d = 0; d < a.dim; d += chain) {
      Vec part = Vec{};
      for (int64_t i = d; i < a.dim && i < d + chain; ++i)
        part = fma(load(s.grads_t + i * t.lanes + c), load(out_t + i * t.lanes + c), part);
      dot = dot + part;
    }
    store(s.delta + c, dot);
  }
  for (int64_t i = 0; i < t.lanes; ++i) {
    const bool dead = i >= t.count || lse[i] == -INFINITY;
    // exp2(score - inf) = 0: rows that attend to nothing, and lanes past the last query
    const double exact = dead ? double(INFINITY) : double(lse[i]) * kLog2e;
    s.lse[i] = float(exact);
    s.lse_rest[i] = dead ? 1.f : float(1. - 0.6931471805599453 * (exact - double(s.lse[i])));
    if (dead) s.delta[i] = 0.f;
    s.grad_lse[i] = dead || !grad_lse ? 0.f : grad_lse[i];
  }
}

constexpr float kPreciseLse = 24.f;  // in units of log2
constexpr int64_t kFewQueries = 16;

float largest_lse(const Buffers& s, int64_t lanes) {
  float largest = 0.f;
  for (int64_t i = 0; i < lanes; ++i) {
    const float size = __builtin_fabsf(s.lse[i]);
    if (size < INFINITY && size > largest) largest = size;
  }
  return largest;
}

// total[lane] += value(x) over the keys of a tile, a few at a time: one long chain of sums would lose digits.
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

// dq -= (sum of ds - grad_lse) * mean key. The ds of a row sum to grad_lse where delta is exact; an error of delta leaves
// -error * p in them, and -error * sum_j p_j k_j in dq: large where all keys share an offset, as the bias of their
// projection makes it. Against keys from which their mean was taken, that offset is gone (under a softcap, its share).
void centre_keys(const Attention& a, const Tile& t, const Buffers& s) {
  for (int64_t c = 0; c < t.lanes; c += kWidth) {
    Vec excess = load(s.ds_sum + c) - load(s.grad_lse + c);
    if (a.softcap != 0.f) excess = excess * load(s.slope_sum + c);
    for (int64_t d = 0; d < a.dim; ++d) {
      float* dq = s.dq + d * t.lanes + c;
      store(dq, fma(-excess, broadcast(s.centre[d]), load(dq)));
    }
  }
}

template <class T>
void backward_tile(const AttentionBackward& a, const Tile& t, Operand key_rows, Operand value_rows,
                   const Buffers& s) {
  const int64_t padded = round_up(a.dim, kWidth), lanes = t.lanes;
  T* dq = static_cast<T*>(a.dq) + t.b * a.dq_rows.batch + t.h * a.dq_rows.head +
          (a.q_start[t.b] + t.q0) * a.dq_rows.row;
  int64_t begin, end;
  key_range(a, t, begin, end);
  if (end <= begin) return zero_rows(dq, a.dq_rows.row, t.count, a.dim);
  const int64_t visible = end - begin, chain = chain_of(t.count < visible ? t.count : visible);
  load_tile<T>(a, t, chain, s);
  const bool fold = folds_scale(a), dropout = a.dropout.threshold != 0, one_block = visible <= kKeys;
  const float to_log2 = log2_factor(a);

  const auto next = [&](int64_t j) { return one_block ? end : block_end(j, end); };
  const auto from = [](Operand rows, int64_t j) {
    return Operand{static_cast<const char*>(rows.data) + j * rows.row_bytes, rows.row_bytes, rows.depth_bytes};
  };
  const auto probabilities = [&](int64_t j, int64_t keys) {
    gemm(Write::kStore, keys, lanes, a.dim, from(key_rows, j), s.queries_t, lanes, s.p, lanes, nullptr, chain);
    if (!fold) finish_scores(a, t, j, keys, s.p, a.softcap != 0.f ? s.slope : nullptr);
    mask_edges(a, t, j, keys, s.p);
    for (int64_t c = 0; one_block && c < lanes; c += kWidth) {
      Vec top = broadcast(-INFINITY);
      for (int64_t x = c; x < keys * lanes; x += lanes) top = max(load(s.p + x), top);
      top = top > -INFINITY ? top : Vec{};
      for (int64_t x = c; x < keys * lanes; x += lanes)
        store(s.p + x, exp2((load(s.p + x) - top) * to_log2));
    }
    for (int64_t c = 0; !one_block && c < lanes; c += kWidth) {
      const Vec shift = load(s.lse + c), rest = load(s.lse_rest + c);
      for (int64_t x = c; x < keys * lanes; x += lanes)
        store(s.p + x, exp2(fma(load(s.p + x), broadcast(to_log2), -shift)) * rest);
    }
  };
  // The saved log-sum-exp is rounded, and so is the output that delta was made from. Rows with one block of keys get both
  // anew for nothing, few queries for little; a large log-sum-exp is rounded so coarsely that rows would not sum to one.
  const bool exact_delta = one_block || t.count <= kFewQueries;
  const auto value_gradients = [&](int64_t j, int64_t keys) {
    gemm(Write::kStore, keys, lanes, a.dim, from(value_rows, j), s.grads_t, lanes, s.ds, lanes, nullptr, chain);
  };
  if (exact_delta || largest_lse(s, lanes) > kPreciseLse) {
    for (int64_t c = 0; c < lanes; c += kWidth) {
      store(s.scale + c, Vec{});
      if (exact_delta) store(s.delta + c, Vec{});
    }
    for (int64_t j = begin; j < end; j = next(j)) {
      const int64_t keys = next(j) - j;
      probabilities(j, keys);
      sum_rows(s.scale, lanes, keys, [&](int64_t x) { return load(s.p + x); });
      if (!exact_delta) continue;
      value_gradients(j, keys);
      if (dropout)  // the sign of p tells what was dropped
        for_each_dropout(a, t, j, keys, [&](int64_t row, int64_t c, Vec factor) {
          const int64_t x = row * lanes + c;
          const Vec p = load(s.p + x);
          store(s.ds + x, load(s.ds + x) * factor);
          store(s.p + x, factor > 0.f ? p : -p);
        });
      sum_rows(s.delta, lanes, keys, [&](int64_t x) { return abs(load(s.p + x)) * load(s.ds + x); });
    }
    for (int64_t i = 0; i < lanes; ++i) {
      const bool dead = i >= t.count || s.scale[i] == 0.f;
      s.scale[i] = dead ? 0.f : 1.f / s.scale[i];
      s.lse_rest[i] *= s.scale[i];
      if (exact_delta) s.delta[i] *= s.scale[i];
    }
  }
  for (int64_t c = 0; !exact_delta && c < lanes; c += kWidth) {
    store(s.ds_sum + c, Vec{});
    store(s.slope_sum + c, Vec{});
  }

  for (int64_t j = begin; j < end; j = next(j)) {
    const int64_t keys = next(j) - j;
    const Operand k = from(key_rows, j);
    // p: probabilities, with dropout's factors for dV. ds: d loss / d score.
    if (!one_block) {
      probabilities(j, keys);
      value_gradients(j, keys);
    }
    if (dropout && !one_block) {
      for_each_dropout(a, t, j, keys, [&](int64_t row, int64_t c, Vec factor) {
        const int64_t x = row * lanes + c;
        const Vec p = load(s.p + x);
        store(s.ds + x, p * (fma(load(s.ds + x), factor, -load(s.delta + c)) + load(s.grad_lse + c)));
        store(s.p + x, p * factor);
      });
    } else {
      for (int64_t c = 0; c < lanes; c += kWidth) {
        const Vec delta = load(s.delta + c), grad_lse = load(s.grad_lse + c), correction = load(s.scale + c);
        for (int64_t x = c; x < keys * lanes; x += lanes) {
          Vec p = load(s.p + x);
          if (one_block) {
            p = p * correction;
            store(s.p + x, dropout ? max(p, Vec{}) * a.dropout.keep_scale : p);
            p = abs(p);
          }
          store(s.ds + x, p * ((load(s.ds + x) - delta) + grad_lse));
        }
      }
    }
    if (!exact_delta) sum_rows(s.ds_sum, lanes, keys, [&](int64_t x) { return load(s.ds + x); });
    if (a.dbias) add_bias_gradient(a, t, j, keys, s.ds);
    if (a.drelative) {
      float* base = a.drelative + (t.b * a.heads + t.h) * a.relative_stride + a.relative_zero + t.q0 + t.offset - j;
      for (int64_t r = 0; r < keys; ++r)
        for (int64_t c = 0; c < lanes; c += kWidth)
          store(base - r + c, load(base - r + c) + load(s.ds + r * lanes + c));
    }
    if (a.softcap != 0.f && !exact_delta)
      sum_rows(s.slope_sum, lanes, keys, [&](int64_t x) { return load(s.p + x) * load(s.slope + x); });
    if (a.softcap != 0.f)
      for (int64_t x = 0; x < keys * lanes; x += kWidth) store(s.ds + x, load(s.ds + x) * load(s.slope + x));

    gemm(Write::kAdd, keys, padded, t.count, {s.p, lanes * 4, 4}, s.grads, padded, s.dv + j * padded, padded);
    gemm(Write::kAdd, keys, padded, t.count, {s.ds, lanes * 4, 4}, s.queries, padded, s.dk + j * padded, padded);
    gemm(j == begin ? Write::kStore : Write::kAdd, a.dim, lanes, keys, {k.data, 4, k.row_bytes}, s.ds, lanes, s.dq, lanes);
  }
  if (!exact_delta) centre_keys(a, t, s);
  for (int64_t c = 0; c < lanes; c += kWidth) store(s.scale + c, broadcast(float(a.scale)));
  store_transposed(s.dq, lanes, s.scale, dq, a.dq_rows.row, t.count, a.dim);
}

void mean_row(Operand rows, int64_t count, int64_t dim, float* mean) {
  const float* row = static_cast<const float*>(rows.data);
  for (int64_t c = 0; c < dim; ++c) mean[c] = 0.f;
  for (int64_t j = 0; j < count; ++j, row += rows.row_bytes / 4)
    for (int64_t c = 0; c < dim; ++c) mean[c] += row[c];
  for (int64_t c = 0; c < dim; ++c) mean[c] /= float(count);
}

template <class T>
void backward_key_head(const AttentionBackward& a, int64_t b, int64_t hk, const Buffers& s) {
  const int64_t padded = round_up(a.dim, kWidth), keys = a.k_count[b], group = a.heads / a.key_heads;
  const auto at = [&](auto* data, const Rows& rows) {
    return data + b * rows.batch + hk * rows.head + a.k_start[b] * rows.row;
  };
  const T* k = at(static_cast<const T*>(a.k), a.k_rows);
  const T* v = at(static_cast<const T*>(a.v), a.v_rows);
  Operand key_rows{k, a.k_rows.row * 4, 4}, value_rows{v, a.v_rows.row * 4, 4};
  if constexpr (sizeof(T) == 2) {
    load_rows(k, a.k_rows.row, keys, a.dim, s.keys, padded);
    load_rows(v, a.v_rows.row, keys, a.dim, s.values, padded);
    key_rows = {s.keys, padded * 4, 4};
    value_rows = {s.values, padded * 4, 4};
  }
  if (keys > kKeys) mean_row(key_rows, keys, a.dim, s.centre);
  __builtin_memset(s.dk, 0, size_t(keys * padded) * 4);
  __builtin_memset(s.dv, 0, size_t(keys * padded) * 4);
  for (int64_t h = hk * group; h < (hk + 1) * group; ++h)
    for (int64_t q0 = 0; q0 < a.q_count[b]; q0 += kQueries)
      backward_tile<T>(a, make_tile(a, b, h, q0), key_rows, value_rows, s);
  T* dk = at(static_cast<T*>(a.dk), a.dk_rows);
  T* dv = at(static_cast<T*>(a.dv), a.dv_rows);
  store_rows(s.dk, padded, float(a.scale), dk, a.dk_rows.row, keys, a.dim);
  store_rows(s.dv, padded, 1.f, dv, a.dv_rows.row, keys, a.dim);
  zero_rows(dk + keys * a.dk_rows.row, a.dk_rows.row, a.key_rows[b] - keys, a.dim);
  zero_rows(dv + keys * a.dv_rows.row, a.dv_rows.row, a.key_rows[b] - keys, a.dim);
}

template <class T>
void backward_all(const AttentionBackward& a) {
  // Items that add to the same slice of dbias are one item, in order.
  const bool join_batch = a.dbias && a.dbias_stride[0] == 0, join_heads = a.dbias && a.dbias_stride[1] == 0;
  const int64_t batches = join_batch ? 1 : a.batch, heads = join_heads ? 1 : a.key_heads, items = batches * heads;
  double work = 0;
  for (int64_t b = 0; b < a.batch; ++b) work += double(a.q_count[b]) * double(a.k_count[b]) * double(a.dim * a.heads);
  int64_t threads = tf_num_threads();
  if (work < 1e5) threads = 1;
  if (threads > items) threads = items;
  int64_t next = 0;
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    const Buffers s = take_buffers(a);
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= items) return;
      const int64_t b0 = item / heads, h0 = item % heads;
      for (int64_t b = b0; b < (join_batch ? a.batch : b0 + 1); ++b)
        for (int64_t h = h0; h < (join_heads ? a.key_heads : h0 + 1); ++h) backward_key_head<T>(a, b, h, s);
    }
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
