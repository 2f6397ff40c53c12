// Attention of one query over keys and values; a function gives the address of each.
#pragma once
#include "attention_tile.hpp"

namespace tf::TF_ISA {

constexpr int64_t kAhead = 32;  // keys to prefetch ahead

// Consecutive keys and values may be far apart, and each is too short for the hardware prefetcher.
template <class T>
static inline void prefetch_row(const T* row, int64_t dim) {
  for (int64_t c = 0; c < dim; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + c);
}

// Two vectors of a row, in an order that costs little: bfloat16 values are split into even and odd columns.
static inline void load_pair(const float* p, Vec& a, Vec& b) { a = load(p), b = load(p + kWidth); }
static inline void load_pair(const bf16* p, Vec& a, Vec& b) {
  VecU both;
  __builtin_memcpy(&both, p, sizeof both);
  a = bit_cast<Vec>(both << 16);
  b = bit_cast<Vec>(both & 0xffff0000u);
}

// Permutes x (dim,) into that order, or back.
template <class T>
static inline void order_pairs(float* x, int64_t dim, bool back) {
  if constexpr (sizeof(T) == sizeof(float)) return;
  VecI first, second;
  for (int i = 0; i < kWidth; ++i) {
    first[i] = back ? i / 2 + i % 2 * kWidth : 2 * i;
    second[i] = back ? first[i] + kWidth / 2 : 2 * i + 1;
  }
  for (int64_t c = 0; c + 2 * kWidth <= dim; c += 2 * kWidth) {
    const Vec a = load(x + c), b = load(x + c + kWidth);
    store(x + c, __builtin_shuffle(a, b, first));
    store(x + c + kWidth, __builtin_shuffle(a, b, second));
  }
}

// The products of keys row(j) .. row(j + kWidth - 1) with q. q is in the order of load_pair and padded with zeros.
template <class T, class Row>
static inline Vec dot_rows(const Row& row, int64_t j, int64_t keys, const float* q, int64_t dim) {
  const T* k[kWidth];
  for (int i = 0; i < kWidth; ++i) k[i] = row(j + i < keys ? j + i : keys - 1);
  Vec acc[kWidth];
  for (int i = 0; i < kWidth; ++i) acc[i] = Vec{};
  int64_t c = 0;
  for (; c + 2 * kWidth <= dim; c += 2 * kWidth) {
    const Vec x = load(q + c), y = load(q + c + kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      Vec a, b;
      load_pair(k[i] + c, a, b);
      acc[i] = fma(b, y, fma(a, x, acc[i]));
    }
  }
  for (; c + kWidth <= dim; c += kWidth) {
    const Vec x = load(q + c);
    for (int i = 0; i < kWidth; ++i) acc[i] = fma(load(k[i] + c), x, acc[i]);
  }
  if (c < dim)
    for (int i = 0; i < kWidth; ++i) acc[i] = fma(load_partial(k[i] + c, int(dim - c)), load(q + c), acc[i]);
  transpose(acc);
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) acc[i] = acc[i] + acc[i + step];
  return acc[0];
}

// out[0..2 Pairs * kWidth) (+)= sum over [begin, end) of p[j] * row(j)[c..], in the order of load_pair.
template <int Pairs, class T, class Row>
static inline void add_rows(const float* p, const Row& row, int64_t begin, int64_t end, int64_t c, float* out) {
  Vec acc[2][2 * Pairs];  // for even and odd keys: two chains of additions hide their latency
  for (int i = 0; i < 2 * Pairs; ++i) acc[0][i] = acc[1][i] = Vec{};
  const auto add = [&](int64_t j, Vec* to) {
    const Vec x = broadcast(p[j]);
    const T* v = row(j) + c;
#pragma GCC unroll 2
    for (int i = 0; i < Pairs; ++i) {
      Vec a, b;
      load_pair(v + 2 * i * kWidth, a, b);
      to[2 * i] = fma(x, a, to[2 * i]);
      to[2 * i + 1] = fma(x, b, to[2 * i + 1]);
    }
  };
  int64_t j = begin;
  for (; j + 1 < end; j += 2) {
    add(j, acc[0]);
    add(j + 1, acc[1]);
  }
  if (j < end) add(j, acc[0]);
  for (int i = 0; i < 2 * Pairs; ++i) {
    const Vec sum = acc[0][i] + acc[1][i];
    store(out + c + i * kWidth, begin ? load(out + c + i * kWidth) + sum : sum);
  }
}

// out = softmax(adjust(scale * K q)) V. `scores` has room for `keys` rounded up to kWidth.
template <class T, class KeyRow, class ValueRow, class Adjust>
static void attend(const float* query, int64_t dim, float scale, int64_t keys, const KeyRow& key, const ValueRow& value,
                   const Adjust& adjust, float* scores, float* out) {
  constexpr int64_t kNear = 256 + kWidth;
  alignas(64) float near[2 * kNear];
  float *q = near, *sum_v = near + kNear;
  if (dim > 256) q = scratch<float>(2, 2 * (dim + kWidth)), sum_v = q + dim + kWidth;
  for (int64_t c = 0; c < dim; c += kWidth) store(q + c, load_some(query + c, dim - c));
  order_pairs<T>(q, dim, false);
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
    for (; c + 4 * kWidth <= dim; c += 4 * kWidth) add_rows<2, T>(scores, value, begin, end, c, sum_v);
    for (; c + 2 * kWidth <= dim; c += 2 * kWidth) add_rows<1, T>(scores, value, begin, end, c, sum_v);
    for (; c < dim; c += kWidth) {
      Vec acc = Vec{};
      for (int64_t j = begin; j < end; ++j) acc = fma(broadcast(scores[j]), load_some(value(j) + c, dim - c), acc);
      store(sum_v + c, begin ? load(sum_v + c) + acc : acc);
    }
  }
  order_pairs<T>(sum_v, dim, true);
  for_columns(dim, [&](int64_t c, auto part) { store(out + c, keys ? load(sum_v + c) * inverse : Vec{}, part); });
}

}  // namespace tf::TF_ISA
