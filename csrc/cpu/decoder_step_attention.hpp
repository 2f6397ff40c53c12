// Attention of one query over keys and values found through a function of their position.
#pragma once
#include "attention_tile.hpp"

namespace tf::TF_ISA {

constexpr int64_t kAhead = 32;  // keys

// A row's keys and values lie far from the last row's, and too short a stretch for the processor to see them coming.
template <class T>
static inline void prefetch_row(const T* row, int64_t dim) {
  for (int64_t c = 0; c < dim; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + c);
}

// scores[0..kWidth) = the products of keys row(j).. row(j + kWidth - 1) with q; dim of q is padded with zeros.
template <class T, class Row>
static inline Vec dot_rows(const Row& row, int64_t j, int64_t keys, const float* q, int64_t dim) {
  const T* k[kWidth];
  for (int i = 0; i < kWidth; ++i) k[i] = row(j + i < keys ? j + i : keys - 1);
  Vec acc[kWidth];
  for (int i = 0; i < kWidth; ++i) acc[i] = Vec{};
  int64_t c = 0;
  for (; c + kWidth <= dim; c += kWidth) {
    const Vec x = load(q + c);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) acc[i] = fma(load(k[i] + c), x, acc[i]);
  }
  if (c < dim)
    for (int i = 0; i < kWidth; ++i) acc[i] = fma(load_partial(k[i] + c, int(dim - c)), load(q + c), acc[i]);
  transpose(acc);
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) acc[i] = acc[i] + acc[i + step];
  return acc[0];
}

// out[0..Vectors * kWidth) (+)= sum over [begin, end) of p[j] * row(j)[c..]
template <int Vectors, class T, class Row>
static inline void add_rows(const float* p, const Row& row, int64_t begin, int64_t end, int64_t c, float* out) {
  Vec acc[Vectors];
  for (int i = 0; i < Vectors; ++i) acc[i] = Vec{};
  for (int64_t j = begin; j < end; ++j) {
    const Vec x = broadcast(p[j]);
    const T* v = row(j) + c;
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) acc[i] = fma(x, load(v + i * kWidth), acc[i]);
  }
  for (int i = 0; i < Vectors; ++i) store(out + c + i * kWidth, begin ? load(out + c + i * kWidth) + acc[i] : acc[i]);
}

// out = softmax(scores) V, with scores = scale * K q, then adjust(scores). `scores` holds keys rounded up to kWidth.
template <class T, class KeyRow, class ValueRow, class Adjust>
static void attend(const float* query, int64_t dim, float scale, int64_t keys, const KeyRow& key, const ValueRow& value,
                   const Adjust& adjust, float* scores, float* out) {
  constexpr int64_t kNear = 256 + kWidth;
  alignas(64) float near[2 * kNear];
  float *q = near, *sum_v = near + kNear;
  if (dim > 256) q = scratch<float>(2, 2 * (dim + kWidth)), sum_v = q + dim + kWidth;
  for (int64_t c = 0; c < dim; c += kWidth) store(q + c, load_some(query + c, dim - c));
  for (int64_t j = 0; j < keys && j < kAhead; ++j) prefetch_row<T>(key(j), dim);
  for (int64_t j = 0; j < keys; j += kWidth) {
    for (int64_t i = j; i < keys && i < j + kWidth; ++i) {
      if (i + kAhead < keys) prefetch_row<T>(key(i + kAhead), dim);
      prefetch_row<T>(value(i), dim);
    }
    store(scores + j, dot_rows<T>(key, j, keys, q, dim) * scale);
  }
  adjust(scores);
  for (int64_t j = keys; j < round_up(keys, kWidth); ++j) scores[j] = -INFINITY;
  Vec highest = broadcast(-INFINITY), sums = Vec{};
  for (int64_t j = 0; j < keys; j += kWidth) highest = max(load(scores + j), highest);
  const float top = max_of(highest), finite = top == -INFINITY ? 0.f : top;
  for (int64_t j = 0; j < keys; j += kWidth) {
    const Vec p = exp(load(scores + j) - finite);
    store(scores + j, p);
    sums = sums + p;
  }
  const float total = sum(sums), inverse = total > 0.f ? 1.f / total : total == 0.f ? 0.f : total;
  for (int64_t begin = 0; begin < keys; begin += 64) {  // short sums first: a long float32 sum loses bits
    const int64_t end = begin + 64 < keys ? begin + 64 : keys;
    int64_t c = 0;
    for (; c + 4 * kWidth <= dim; c += 4 * kWidth) add_rows<4, T>(scores, value, begin, end, c, sum_v);
    for (; c + kWidth <= dim; c += kWidth) add_rows<1, T>(scores, value, begin, end, c, sum_v);
    if (c == dim) continue;
    Vec acc = Vec{};
    for (int64_t j = begin; j < end; ++j) acc = fma(broadcast(scores[j]), load_partial(value(j) + c, int(dim - c)), acc);
    store(sum_v + c, begin ? load(sum_v + c) + acc : acc);
  }
  for_columns(dim, [&](int64_t c, auto part) { store(out + c, keys ? load(sum_v + c) * inverse : Vec{}, part); });
}

}  // namespace tf::TF_ISA
