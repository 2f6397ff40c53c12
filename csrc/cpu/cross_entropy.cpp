// Cross entropy: one read of the logits forward, one read and one write backward. A row is cut into segments that stay
// in the L1 cache between the search for their largest logit and the sum of exponentials. Several threads may share the
// segments of a row; the result depends only on the length of the segments.
#include "cross_entropy.hpp"

#include "kernels.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int64_t kSegment = 4096;

struct Partial {
  double sum;      // of exp(x - base)
  double shifted;  // of w (x - base), for label smoothing
  double weight;   // of w
  float base;      // the largest logit, or 0 where all are -inf
};

static inline int64_t segments_of(const CrossEntropy& a) { return (a.classes + kSegment - 1) / kSegment; }

// Adds up the lanes in double: with few classes a float32 sum here would be the only one to lose digits.
static inline double wide_sum(Vec v) {
  double s = 0;
  for (int i = 0; i < kWidth; ++i) s += double(v[i]);
  return s;
}

template <class T>
float largest_of(const T* x, int64_t n) {
  Vec m[4];
  for (Vec& v : m) v = broadcast(-INFINITY);
  int64_t c = 0;
  for (; c + 4 * kWidth <= n; c += 4 * kWidth)
    for (int k = 0; k < 4; ++k) m[k] = max(m[k], load(x + c + k * kWidth));
  for_columns(n - c, [&](int64_t i, auto part) { m[0] = max(m[0], load(x + c + i, part, -INFINITY)); });
  return max_of(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <class T>
Partial reduce(const T* x, const float* weight, int64_t n, bool smooth) {
  Partial p{};
  const float largest = largest_of(x, n);
  p.base = largest == -INFINITY ? 0.f : largest;
  p.sum = wide_sum(sum_columns(n, [&](int64_t c, auto part) { return exp(load(x + c, part, -INFINITY) - p.base); }));
  if (!smooth) return p;
  p.weight = double(n);
  if (weight) p.weight = wide_sum(sum_columns(n, [&](int64_t c, auto part) { return load(weight + c, part); }));
  p.shifted = wide_sum(sum_columns(n, [&](int64_t c, auto part) {
    const Vec d = load(x + c, part, p.base) - p.base;
    return weight ? d * load(weight + c, part) : d;
  }));
  return p;
}

template <class T>
void finish_row(const CrossEntropyForward& a, int64_t r, const Partial* partials, int64_t segments) {
  const int64_t y = a.target[r];
  if (y == a.ignore_index) {
    a.losses[r] = a.largest[r] = a.total[r] = 0.f;
    return;
  }
  float largest = -INFINITY;
  for (int64_t s = 0; s < segments; ++s) {
    const float m = partials[s].sum == 0 ? -INFINITY : partials[s].base;
    largest = largest > m ? largest : m;
  }
  double total = 0;
  for (int64_t s = 0; s < segments; ++s)  // a sum of NaN is not skipped
    if (partials[s].sum != 0) total += partials[s].sum * __builtin_exp(double(partials[s].base) - largest);
  const double log_sum = __builtin_log(total);
  const float x = to_float(static_cast<const T*>(a.logits)[r * a.logits_stride + y]);
  double loss = (1.0 - a.label_smoothing) * (a.weight ? a.weight[y] : 1.f) * (log_sum - (double(x) - largest));
  if (a.label_smoothing > 0) {
    double uniform = 0;
    for (int64_t s = 0; s < segments; ++s)
      uniform += partials[s].weight * (double(largest) - partials[s].base + log_sum) - partials[s].shifted;
    loss += a.label_smoothing / double(a.classes) * uniform;
  }
  if (a.z_loss > 0) loss += a.z_loss * (largest + log_sum) * (largest + log_sum);
  a.losses[r] = float(loss);
  a.largest[r] = largest;
  a.total[r] = float(total);
}

// Columns [begin, end) of row r of the gradient; w_mean: mean of the class weights.
template <class T>
void backward_segment(const CrossEntropyBackward& a, int64_t r, int64_t begin, int64_t end, float w_mean) {
  const T* x = static_cast<const T*>(a.logits) + r * a.logits_stride + begin;
  T* grad = static_cast<T*>(a.grad) + r * a.grad_stride + begin;
  const float* weight = a.weight && a.label_smoothing > 0 ? a.weight + begin : nullptr;
  const int64_t n = end - begin, y = a.target[r];
  if (y == a.ignore_index) {
    __builtin_memset(grad, 0, size_t(n) * sizeof(T));
    return;
  }
  const float g = a.grad_losses[r], largest = a.largest[r], inverse = 1.f / a.total[r];
  const float smoothing = float(a.label_smoothing), share = smoothing / float(a.classes), uniform = g * share;
  const float hit = float(1.0 - a.label_smoothing) * (a.weight ? a.weight[y] : 1.f);
  const float z = a.z_loss > 0 ? float(2 * a.z_loss * (largest + __builtin_log(double(a.total[r])))) : 0.f;
  const float along = hit + smoothing * w_mean + z, factor = inverse * g * along;
  const bool here = begin <= y && y < end;
  const float x_y = here ? to_float(x[y - begin]) : 0.f;  // grad may be the logits themselves
  for_columns(n, [&](int64_t c, auto part) {
    Vec d = exp(load(x + c, part) - largest) * factor;
    if (weight)
      d = d - uniform * load(weight + c, part);
    else
      d = d - uniform;
    store(grad + c, d, part);
  });
  if (here) {
    const float p = __builtin_expf(x_y - largest) * inverse;
    const float against = hit + share * (weight ? weight[y - begin] : 1.f);
    from_float(grad[y - begin], (p * along - against) * g);  // exactly 0 where p is 1
  }
}

int64_t grain_of(const CrossEntropy& a) { return 1 + 32768 / least(a.classes, kSegment); }

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a) {
  const int64_t segments = segments_of(a);
  Partial* partials = scratch<Partial>(0, a.rows * segments);
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(a.rows * segments, grain_of(a), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t r = i / segments, begin = i % segments * kSegment;
        if (a.target[r] == a.ignore_index) continue;
        partials[i] = reduce(static_cast<const T*>(a.logits) + r * a.logits_stride + begin,
                             a.weight ? a.weight + begin : nullptr, least(kSegment, a.classes - begin),
                             a.label_smoothing > 0);
      }
    });
    parallel_for(a.rows, 1024, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) finish_row<T>(a, r, partials + r * segments, segments);
    });
  });
}

void cross_entropy_backward(const CrossEntropyBackward& a) {
  const int64_t segments = segments_of(a);
  float w_mean = 1.f;
  if (a.weight && a.label_smoothing > 0)
    w_mean = sum(sum_columns(a.classes, [&](int64_t c, auto part) { return load(a.weight + c, part); })) /
             float(a.classes);
  with_dtype(a.dtype, [&](auto element) {
    parallel_for(a.rows * segments, grain_of(a), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t r = i / segments, begin = i % segments * kSegment;
        backward_segment<decltype(element)>(a, r, begin, least(begin + kSegment, a.classes), w_mean);
      }
    });
  });
}

}  // namespace tf::TF_ISA
