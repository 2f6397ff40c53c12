// Rotary position embedding of queries and keys: one read and one write.
#include "kernels.hpp"
#include "parallel.hpp"
#include "rotary_head.hpp"

namespace tf::TF_ISA {
namespace {

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
      rotate_head(x, y, cos, sin, a.half, a.interleaved, sign);
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
