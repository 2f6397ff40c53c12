// Attention of a few queries over many keys (generation). Keys and values are read once, in place: lanes run along the
// head dim, and along keys in the softmax. Long sequences with few heads are split among threads and merged by their
// log-sum-exp (Dao et al., "Flash-Decoding", 2023); the split depends on shapes only.
#include "attention_scores.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int64_t kBlock = 256;           // keys per block
constexpr int64_t kSplitHeads = 16, kSplitKeys = 512;

struct State {  // per query: running maximum and sum, and the unnormalised output
  float *top, *total, *out;
};

// The products of q with kWidth keys; only the first `left` keys exist.
template <class T>
inline Vec dot_keys(const T* k, int64_t stride, int64_t left, const float* q, int64_t dim) {
  Vec acc[kWidth];
  for (int i = 0; i < kWidth; ++i) acc[i] = Vec{};
  if (left >= kWidth) {
    int64_t c = 0;
    for (; c + kWidth <= dim; c += kWidth) {
      const Vec x = load(q + c);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) acc[i] = fma(load(k + i * stride + c), x, acc[i]);
    }
    if (c < dim) {
      const Vec x = load(q + c);
      for (int i = 0; i < kWidth; ++i) acc[i] = fma(load_partial(k + i * stride + c, int(dim - c)), x, acc[i]);
    }
  } else {
    for (int64_t i = 0; i < left; ++i)
      for (int64_t c = 0; c < dim; c += kWidth)
        acc[i] = fma(load_some(k + i * stride + c, dim - c), load(q + c), acc[i]);
  }
  transpose(acc);
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) acc[i] = acc[i] + acc[i + step];
  return acc[0];
}

// out[0..Vectors * kWidth) = sum_j p[j] * v[j]
template <int Vectors, class T>
inline void add_values(const float* p, const T* v, int64_t stride, int64_t keys, float* out) {
  Vec acc[Vectors];
  for (int i = 0; i < Vectors; ++i) acc[i] = Vec{};
  for (int64_t j = 0; j < keys; ++j, v += stride) {
    const Vec x = broadcast(p[j]);
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) acc[i] = fma(x, load(v + i * kWidth), acc[i]);
  }
  for (int i = 0; i < Vectors; ++i) store(out + i * kWidth, acc[i]);
}

template <class T>
void weigh_part(const float* p, const T* v, int64_t stride, int64_t keys, int64_t dim, float* out) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= dim; c += 4 * kWidth) add_values<4>(p, v + c, stride, keys, out + c);
  for (; c + kWidth <= dim; c += kWidth) add_values<1>(p, v + c, stride, keys, out + c);
  if (c < dim) {
    Vec acc = Vec{};
    for (int64_t j = 0; j < keys; ++j) acc = fma(broadcast(p[j]), load_partial(v + j * stride + c, int(dim - c)), acc);
    store(out + c, acc);
  }
}

// out = out * correction + sum_j p[j] * v[j], in short sums first: a long float32 sum loses digits.
template <class T>
void weigh_values(const float* p, const T* v, int64_t stride, int64_t keys, int64_t dim, float correction,
                  float* out) {
  alignas(64) float part[256];
  for (int64_t j = 0; j < keys; j += 64) {
    weigh_part(p + j, v + j * stride, stride, keys - j < 64 ? keys - j : 64, dim, part);
    for (int64_t c = 0; c < dim; c += kWidth) {
      const Vec before = load(out + c), more = load(part + c);
      store(out + c, j == 0 ? fma(before, broadcast(correction), more) : before + more);
    }
  }
}

template <class T>
void add_row(const T* row, int64_t step, int64_t keys, float* scores) {
  for (int64_t j = 0; j < keys; ++j) scores[j] += to_float(row[j * step]);
}

// Products with keys j0.. -> scores, without a scale that folds into the exponential. The rest of the last vector is
// -inf.
void finish_row(const Attention& a, int64_t b, int64_t h, int64_t i, int64_t position, int64_t j0, int64_t keys,
                float* scores) {
  if (!folds_scale(a)) {
    const float factor = float(a.softcap != 0.f ? a.scale / a.softcap : a.scale);
    for (int64_t x = 0; x < keys; x += kWidth) {
      Vec v = load(scores + x) * factor;
      if (a.softcap != 0.f) v = tanh_accurate(v) * a.softcap;
      store(scores + x, v);
    }
    const int64_t* s = a.bias_strides;
    const int64_t at = b * s[0] + h * s[1] + i * s[2] + j0 * s[3];
    if (a.bias_type == BiasType::f32) add_row(static_cast<const float*>(a.bias) + at, s[3], keys, scores);
    if (a.bias_type == BiasType::bf16) add_row(static_cast<const bf16*>(a.bias) + at, s[3], keys, scores);
    if (a.bias_type == BiasType::f16) add_row(static_cast<const f16*>(a.bias) + at, s[3], keys, scores);
    if (a.relative_bias) {
      const float* row = a.relative_bias + h * a.relative_bias_stride + a.reach + j0 - position;
      for (int64_t j = 0; j < keys; ++j) scores[j] += row[j];
    }
    if (a.mask) {
      const uint8_t* mask = a.mask + b * a.mask_strides[0] + h * a.mask_strides[1] + i * a.mask_strides[2];
      for (int64_t j = 0; j < keys; ++j)
        if (!mask[(j0 + j) * a.mask_strides[3]]) scores[j] = -INFINITY;
    }
  }
  for (int64_t j = keys; j < round_up(keys, kWidth); ++j) scores[j] = -INFINITY;
}

// Attends to keys [begin, end) of the sequence for every query that shares key head hk.
template <class T>
void decode_part(const Attention& a, int64_t b, int64_t hk, int64_t begin, int64_t end, const State& state) {
  const int64_t padded = round_up(a.dim, kWidth), group = a.heads / a.key_heads, count = a.query_lengths[b];
  const int64_t rows = group * count, offset = a.bottom_right ? a.key_lengths[b] - count : 0;
  const float to_log2 = log2_factor(a);
  float* q = scratch<float>(0, rows * padded);
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = row_of<const T>(a.query, a.query_strides, b, hk * group + r / count, a.query_starts[b] + r % count);
    load_rows(row, 0, 1, a.dim, q + r * padded, padded);
    state.top[r] = -INFINITY;
    state.total[r] = 0.f;
    for (int64_t c = 0; c < padded; c += kWidth) store(state.out + r * padded + c, Vec{});
  }
  const T* k = row_of<const T>(a.key, a.key_strides, b, hk, a.key_starts[b]);
  const T* v = row_of<const T>(a.value, a.value_strides, b, hk, a.key_starts[b]);
  const int64_t k_step = a.key_strides.row, v_step = a.value_strides.row;
  alignas(64) float scores[kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t block_end = block + kBlock < end ? block + kBlock : end;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r % count, position = i + offset;
      int64_t from = block, to = block_end;
      if (a.window_left >= 0 && position - a.window_left > from) from = position - a.window_left;
      if (a.window_right >= 0 && position + a.window_right + 1 < to) to = position + a.window_right + 1;
      if (from >= to) continue;
      const int64_t keys = to - from;
      for (int64_t x = 0; x < keys; x += kWidth)
        store(scores + x, dot_keys(k + (from + x) * k_step, k_step, keys - x, q + r * padded, a.dim));
      finish_row(a, b, hk * group + r / count, i, position, from, keys, scores);
      Vec highest = load(scores), sums = Vec{};
      for (int64_t x = kWidth; x < keys; x += kWidth) highest = max(load(scores + x), highest);
      const float before = state.top[r], top = max_of(highest) > before ? max_of(highest) : before;
      const float finite = top == -INFINITY ? 0.f : top;
      for (int64_t x = 0; x < keys; x += kWidth) {
        const Vec p = exp2((load(scores + x) - finite) * to_log2);
        store(scores + x, p);
        sums = sums + p;
      }
      const float correction = exp2(broadcast((before - finite) * to_log2))[0];
      state.top[r] = top;
      state.total[r] = state.total[r] * correction + sum(sums);
      weigh_values(scores, v + from * v_step, v_step, keys, a.dim, correction, state.out + r * padded);
    }
  }
}

// Merges the parts of one key head, in order, and writes out and lse.
template <class T>
void write_rows(const AttentionForward& a, int64_t b, int64_t hk, const State& first, int64_t parts, int64_t stride) {
  const int64_t padded = round_up(a.dim, kWidth), group = a.heads / a.key_heads, count = a.query_lengths[b];
  const float to_log2 = log2_factor(a);
  for (int64_t r = 0; r < group * count; ++r) {
    float top = -INFINITY;
    for (int64_t part = 0; part < parts; ++part) {
      const float t = first.top[part * stride + r];
      top = t > top ? t : top;
    }
    const float finite = top == -INFINITY ? 0.f : top;
    float total = 0.f;
    float* out = first.out + r * padded;
    for (int64_t part = 0; part < parts; ++part) {
      const float factor = exp2(broadcast((first.top[part * stride + r] - finite) * to_log2))[0];
      const float* other = first.out + part * stride * padded + r * padded;
      total += first.total[part * stride + r] * factor;
      for (int64_t c = 0; c < padded; c += kWidth)
        store(out + c, part == 0 ? load(out + c) * factor : fma(load(other + c), broadcast(factor), load(out + c)));
    }
    const int64_t h = hk * group + r / count, row = a.query_starts[b] + r % count;
    T* to = row_of<T>(a.out, a.out_strides, b, h, row);
    store_rows(out, padded, total == 0.f ? 0.f : 1.f / total, to, 0, 1, a.dim);
    if (a.lse)
      a.lse[b * a.lse_batch + h * a.lse_head + row] =
          total == 0.f ? -INFINITY : top * (folds_scale(a) ? float(a.scale) : 1.f) + __builtin_logf(total);
  }
}

template <class T>
void decode_all(const AttentionForward& a) {
  const int64_t padded = round_up(a.dim, kWidth), group = a.heads / a.key_heads, heads = a.batch * a.key_heads;
  int64_t queries = 1, longest = 1;
  for (int64_t b = 0; b < a.batch; ++b) {
    queries = a.query_lengths[b] > queries ? a.query_lengths[b] : queries;
    longest = a.key_lengths[b] > longest ? a.key_lengths[b] : longest;
  }
  int64_t parts = heads >= kSplitHeads ? 1 : kSplitHeads / heads;
  if (parts * kSplitKeys > longest) parts = (longest + kSplitKeys - 1) / kSplitKeys;
  const int64_t rows = group * queries, items = heads * parts;
  float* states = scratch<float>(1, items * rows * (padded + 2));
  const auto state_of = [&](int64_t item) {
    float* top = states + item * rows;
    return State{top, top + items * rows, states + 2 * items * rows + item * rows * padded};
  };
  share_out(items, threads_for(a, 1e5), [&] {
    return [&](int64_t item) {
      const int64_t b = item / parts / a.key_heads, hk = item / parts % a.key_heads, part = item % parts;
      const int64_t size = round_up((a.key_lengths[b] + parts - 1) / parts, kBlock);
      const int64_t end = (part + 1) * size < a.key_lengths[b] ? (part + 1) * size : a.key_lengths[b];
      decode_part<T>(a, b, hk, part * size, end, state_of(item));
      if (parts == 1) write_rows<T>(a, b, hk, state_of(item), 1, rows);
    };
  });
  if (parts > 1)
    for (int64_t head = 0; head < heads; ++head)
      write_rows<T>(a, head / a.key_heads, head % a.key_heads, state_of(head * parts), parts, rows);
}

}  // namespace

void attention_decode(const AttentionForward& a) {
  with_dtype(a.dtype, [&](auto t) { decode_all<decltype(t)>(a); });
}

}  // namespace tf::TF_ISA
