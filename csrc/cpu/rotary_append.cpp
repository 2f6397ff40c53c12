// New queries and keys of a decoder are normed and rotated, keys and values appended to the cache, all in one pass.
#include "rotary_append.hpp"

#include "kernels.hpp"
#include "parallel.hpp"
#include "rotary_head.hpp"

namespace tf::TF_ISA {
namespace {

template <class T>
T* head_of(const HeadRows& rows, int64_t b, int64_t token, int64_t h) {
  return static_cast<T*>(rows.data) + b * rows.batch + token * rows.token + h * rows.head;
}

template <class T>
struct Append {
  const RotaryAppend& a;

  void place(const T* x, T* y, const HeadNorm& norm, int64_t position) const {
    const float *cos = a.cos + position * a.half, *sin = a.sin + position * a.half;
    const int64_t rotated = 2 * a.half;
    if (!norm.weight) {
      rotate_head(x, y, cos, sin, a.half, a.interleaved, 1.f);
      if (a.width > rotated) __builtin_memcpy(y + rotated, x + rotated, (a.width - rotated) * sizeof(T));
      return;
    }
    const float square = sum(sum_columns(a.width, [&](int64_t c, auto part) {
      const Vec v = load(x + c, part);
      return v * v;
    }));
    const Normed read{static_cast<const float*>(norm.weight), 1.f / __builtin_sqrtf(square / float(a.width) + a.eps)};
    rotate_head(x, y, cos, sin, a.half, a.interleaved, 1.f, read);
    for_columns(a.width - rotated, [&](int64_t c, auto part) {
      store(y + rotated + c, read(x, rotated + c, part), part);
    });
  }

  void tokens(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / a.length, t = i % a.length, stored = used_of(a, b) + t;
      const int64_t position = a.positions ? a.positions[b * a.position_batch + t * a.position_token] : stored;
      for (int64_t h = 0; h < a.heads; ++h)
        place(head_of<T>(a.query, b, t, h), head_of<T>(a.y, b, t, h), a.query_norm, position);
      for (int64_t h = 0; h < a.key_heads; ++h) {
        place(head_of<T>(a.key, b, t, h), head_of<T>(a.key_cache, b, stored, h), a.key_norm, position);
        __builtin_memcpy(head_of<T>(a.value_cache, b, stored, h), head_of<T>(a.value, b, t, h), a.width * sizeof(T));
      }
    }
  }
};

}  // namespace

void rotary_append(const RotaryAppend& a) {
  const int64_t row = (a.heads + 2 * a.key_heads) * a.width;
  parallel_for(a.batch * a.length, 1 + 8192 / (row + 1), [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto element) { Append<decltype(element)>{a}.tokens(begin, end); });
  });
}

}  // namespace tf::TF_ISA
