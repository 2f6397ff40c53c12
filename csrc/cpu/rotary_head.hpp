// The rotation of one head's columns, see rotary.hpp.
#pragma once
#include "simd.hpp"

namespace tf::TF_ISA {

// Splits two vectors of pairs (x1, x2, x1, x2, ...) into x1 and x2, and joins them again.
static inline VecI lanes(int start, int step) {
  VecI v;
  for (int i = 0; i < kWidth; ++i) v[i] = start + i * step;
  return v;
}
static inline void split_pairs(Vec a, Vec b, Vec& first, Vec& second) {
  first = __builtin_shuffle(a, b, lanes(0, 2));
  second = __builtin_shuffle(a, b, lanes(1, 2));
}
static inline void join_pairs(Vec first, Vec second, Vec& a, Vec& b) {
  VecI low, high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i / 2 + (i % 2) * kWidth;
    high[i] = low[i] + kWidth / 2;
  }
  a = __builtin_shuffle(first, second, low);
  b = __builtin_shuffle(first, second, high);
}

// How the columns of a head are read: x as stored, or the norm weight * x * scale.
struct AsIs {
  template <class T, class Part>
  Vec operator()(const T* x, int64_t c, Part part) const {
    return load(x + c, part);
  }
  template <class T>
  float one(const T* x, int64_t c) const {
    return to_float(x[c]);
  }
};
struct Normed {
  const float* weight;
  float scale;
  template <class T, class Part>
  Vec operator()(const T* x, int64_t c, Part part) const {
    return load(x + c, part) * scale * load(weight + c, part);
  }
  template <class T>
  float one(const T* x, int64_t c) const {
    return to_float(x[c]) * scale * weight[c];
  }
};

template <class T, class Read>
static inline void rotate_halves(const T* x, T* y, const float* cos, const float* sin, int64_t half, float sign,
                                 const Read& read) {
  for_columns(half, [&](int64_t c, auto part) {
    const Vec x1 = read(x, c, part), x2 = read(x, half + c, part);
    const Vec k = load(cos + c, part), s = load(sin + c, part) * sign;
    store(y + c, x1 * k - x2 * s, part);
    store(y + half + c, x2 * k + x1 * s, part);
  });
}

template <class T, class Read>
static inline void rotate_interleaved(const T* x, T* y, const float* cos, const float* sin, int64_t half, float sign,
                                      const Read& read) {
  int64_t c = 0;
  for (; c + kWidth <= half; c += kWidth) {
    Vec x1, x2, a, b;
    split_pairs(read(x, 2 * c, Full{}), read(x, 2 * c + kWidth, Full{}), x1, x2);
    const Vec k = load(cos + c), s = load(sin + c) * sign;
    join_pairs(x1 * k - x2 * s, x2 * k + x1 * s, a, b);
    store(y + 2 * c, a);
    store(y + 2 * c + kWidth, b);
  }
  for (; c < half; ++c) {
    const float x1 = read.one(x, 2 * c), x2 = read.one(x, 2 * c + 1), s = sin[c] * sign;
    from_float(y[2 * c], x1 * cos[c] - x2 * s);
    from_float(y[2 * c + 1], x2 * cos[c] + x1 * s);
  }
}

// Rotates the first 2 * half columns of one head; y may be x.
template <class T, class Read = AsIs>
static inline void rotate_head(const T* x, T* y, const float* cos, const float* sin, int64_t half, bool interleaved,
                               float sign, const Read& read = {}) {
  if (interleaved)
    rotate_interleaved(x, y, cos, sin, half, sign, read);
  else
    rotate_halves(x, y, cos, sin, half, sign, read);
}

}  // namespace tf::TF_ISA
