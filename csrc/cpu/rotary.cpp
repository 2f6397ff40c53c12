// Rotary position embedding of queries and keys: one read and one write.
#include "kernels.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace tf::TF_ISA {
namespace {

// Two vectors of pairs (x1, x2, x1, x2, ...) apart, and together again.
inline VecI lanes(int start, int step) {
  VecI v;
  for (int i = 0; i < kWidth; ++i) v[i] = start + i * step;
  return v;
}
inline void split_pairs(Vec a, Vec b, Vec& first, Vec& second) {
  first = __builtin_shuffle(a, b, lanes(0, 2));
  second = __builtin_shuffle(a, b, lanes(1, 2));
}
inline void join_pairs(Vec first, Vec second, Vec& a, Vec& b) {
  VecI low, high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i / 2 + (i % 2) * kWidth;
    high[i] = low[i] + kWidth / 2;
  }
  a = __builtin_shuffle(first, second, low);
  b = __builtin_shuffle(first, second, high);
}

template <class T>
void rotate_halves(const T* x, T* y, const float* cos, const float* sin, int64_t half, float sign) {
  for_columns(half, [&](int64_t c, auto part) {
    const Vec x1 = load(x + c, part), x2 = load(x + half + c, part);
    const Vec k = load(cos + c, part), s = load(sin + c, part) * sign;
    store(y + c, x1 * k - x2 * s, part);
    store(y + half + c, x2 * k + x1 * s, part);
  });
}

template <class T>
void rotate_interleaved(const T* x, T* y, const float* cos, const float* sin, int64_t half, float sign) {
  int64_t c = 0;
  for (; c + kWidth <= half; c += kWidth) {
    Vec x1, x2, a, b;
    split_pairs(load(x + 2 * c), load(x + 2 * c + kWidth), x1, x2);
    const Vec k = load(cos + c), s = load(sin + c) * sign;
    join_pairs(x1 * k - x2 * s, x2 * k + x1 * s, a, b);
    store(y + 2 * c, a);
    store(y + 2 * c + kWidth, b);
  }
  for (; c < half; ++c) {
    const float x1 = to_float(x[2 * c]), x2 = to_float(x[2 * c + 1]), s = sin[c] * sign;
    from_float(y[2 * c], x1 * cos[c] - x2 * s);
    from_float(y[2 * c + 1], x2 * cos[c] + x1 * s);
  }
}

template <class T>
void rotate_tokens(const Rotary& a, int64_t begin, int64_t end) {
  const float sign = a.inverse ? -1.f : 1.f;
  const int64_t rotated = 2 * a.half;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / a.length, t = i % a.length;
    const int64_t position = a.positions ? a.positions[b * a.position_batch + t * a.position_token] : t;
    const float *cos = a.cos + position * a.half, *sin = a.sin + position * a.half;
    const T* x = static_cast<const T*>(a.x) + b * a.x_batch + t * a.x_token;
    T* y = static_cast<T*>(a.y) + b * a.y_batch + t * a.y_token;
    for (int64_t h = 0; h < a.heads; ++h, x += a.x_head, y += a.y_head) {
      if (a.interleaved)
        rotate_interleaved(x, y, cos, sin, a.half, sign);
      else
        rotate_halves(x, y, cos, sin, a.half, sign);
      if (y != x && a.width > rotated) __builtin_memcpy(y + rotated, x + rotated, (a.width - rotated) * sizeof(T));
    }
  }
}

}  // namespace

void rotary(const Rotary& a) {
  const int64_t row = a.heads * a.width;
  parallel_for(a.batch * a.length, 1 + 8192 / (row + 1), [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto element) { rotate_tokens<decltype(element)>(a, begin, end); });
  });
}

}  // namespace tf::TF_ISA
