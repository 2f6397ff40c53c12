// layer_norm, rms_norm and their residual + dropout fusions: one pass over memory, the row stays in cache.
#include "norm.hpp"

#include "column_sums.hpp"
#include "kernels.hpp"
#include "philox.hpp"

namespace tf::TF_ISA {
namespace {

// v = residual + dropout(x) of row r, into `row` (float) and, rounded, into `sum` if there is one.
template <class T, bool kDropout>
void combine_row(const NormForward& a, int64_t r, float* row) {
  const int64_t n = a.width;
  const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + r * a.residual_stride : nullptr;
  T* sum = a.sum ? static_cast<T*>(a.sum) + r * n : nullptr;
  alignas(64) float factors[128];
  for_columns(n, [&](int64_t c, auto part) {
    Vec v = load(x + c, part);
    if constexpr (kDropout) {
      if (c % 128 == 0) dropout_factors(a.dropout, 0, uint32_t(r), uint32_t(c / 128), factors);
      v = v * load(factors + c % 128);
    }
    if (residual) v = v + load(residual + c, part);
    if (sum) {
      store(sum + c, v, part);
      if constexpr (sizeof(T) == 2) v = load(sum + c, part);  // the rounded value, which the backward pass reads
    }
    if (sizeof(T) == 2 || !sum) store(row + c, v);
  });
}

template <class T, bool kDropout>
void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  const int64_t n = a.width;
  const float inverse = 1.f / float(n);
  const float *weight = a.weight, *bias = a.bias;
  const bool plain = sizeof(T) == 4 && !kDropout && !a.residual && !a.sum;
  float* row = scratch<float>(0, n + kWidth);
  for (int64_t r = begin; r < end; ++r) {
    const float* v = row;
    if (plain) {
      v = static_cast<const float*>(a.x) + r * a.x_stride;
    } else {
      combine_row<T, kDropout>(a, r, row);
      if (sizeof(T) == 4 && a.sum) v = static_cast<const float*>(a.sum) + r * n;
    }
    float mean = 0.f, variance;
    if (a.rms) {
      variance = inverse * sum(sum_columns(n, [&](int64_t c, auto part) {
                   const Vec x = load(v + c, part);
                   return x * x;
                 }));
    } else {  // two passes, corrected for the rounding error of the mean: no cancellation
      mean = inverse * sum(sum_columns(n, [&](int64_t c, auto part) { return load(v + c, part); }));
      Vec drift = broadcast(0.f);
      const char* next = static_cast<const char*>(a.x) + (r + 1) * a.x_stride * int64_t(sizeof(T));
      const float spread = sum(sum_columns(n, [&](int64_t c, auto part) {
        __builtin_prefetch(next + c * int64_t(sizeof(T)));  // this pass leaves memory idle otherwise
        const Vec d = load(v + c, part, mean) - mean;
        drift = drift + d;
        return d * d;
      }));
      const float correction = inverse * sum(drift);
      variance = inverse * spread - correction * correction;
      variance = variance < 0.f ? 0.f : variance;
      mean += correction;
    }
    const float rstd = 1.f / __builtin_sqrtf(variance + a.eps);
    if (a.mean) a.mean[r] = mean;
    if (a.rstd) a.rstd[r] = rstd;
    T* y = static_cast<T*>(a.y) + r * n;
    for_columns(n, [&](int64_t c, auto part) {
      Vec x = (load(v + c, part) - mean) * rstd;
      if (weight) x = x * load(weight + c, part);
      if (bias) x = x + load(bias + c, part);
      store(y + c, x, part);
    });
  }
}

// Row r: the gradient of v, and the row's terms of the gradients of weight and bias. With g = weight * dy,
// dv = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum.
template <class T>
void backward_row(const NormBackward& a, int64_t r, float* grad_weight, float* grad_bias) {
  const int64_t n = a.width;
  const T* dy = static_cast<const T*>(a.grad_y) + r * a.grad_y_stride;
  const T* v = static_cast<const T*>(a.v) + r * a.v_stride;
  const T* dsum = a.grad_sum ? static_cast<const T*>(a.grad_sum) + r * a.grad_sum_stride : nullptr;
  T* dv = static_cast<T*>(a.grad_v) + r * n;
  const float* weight = a.weight;
  const float mean = a.mean ? a.mean[r] : 0.f, rstd = a.rstd[r];
  Vec s1[2] = {}, s2[2] = {};
  auto add = [&](int64_t c, int i, auto part) {
    Vec g = load(dy + c, part);
    if (weight) g = g * load(weight + c, part);
    s1[i] = fma(g, (load(v + c, part) - mean) * rstd, s1[i]);
    s2[i] = s2[i] + g;
  };
  int64_t done = 0;
  for (; done + 2 * kWidth <= n; done += 2 * kWidth) {
    add(done, 0, Full{});
    add(done + kWidth, 1, Full{});
  }
  for_columns(n - done, [&](int64_t c, auto part) { add(done + c, 0, part); });
  const float along = sum(s1[0] + s1[1]) / float(n), across = a.mean ? sum(s2[0] + s2[1]) / float(n) : 0.f;
  const T *next_dy = dy + a.grad_y_stride, *next_v = v + a.v_stride;
  for_columns(n, [&](int64_t c, auto part) {
    __builtin_prefetch(next_dy + c);  // this pass leaves memory idle otherwise
    __builtin_prefetch(next_v + c);
    const Vec dy_c = load(dy + c, part), xhat = (load(v + c, part) - mean) * rstd;
    const Vec g = weight ? dy_c * load(weight + c, part) : dy_c;
    Vec d = (g - across - xhat * along) * rstd;
    if (dsum) d = d + load(dsum + c, part);
    store(dv + c, d, part);
    if (grad_weight) store(grad_weight + c, fma(dy_c, xhat, load(grad_weight + c, part)), part);
    if (grad_bias) store(grad_bias + c, load(grad_bias + c, part) + dy_c, part);
  });
  if (!a.grad_x) return;
  T* dx = static_cast<T*>(a.grad_x) + r * n;
  alignas(64) float factors[128];
  for_columns(n, [&](int64_t c, auto part) {
    if (c % 128 == 0) dropout_factors(a.dropout, 0, uint32_t(r), uint32_t(c / 128), factors);
    store(dx + c, load(dv + c, part) * load(factors + c % 128), part);
  });
}

int64_t grain_of(int64_t width) { return 1 + 16384 / (width + 1); }

}  // namespace

void norm_forward(const NormForward& a) {
  parallel_for(a.rows, grain_of(a.width), [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto element) {
      using T = decltype(element);
      if (a.dropout.threshold)
        forward_rows<T, true>(a, begin, end);
      else
        forward_rows<T, false>(a, begin, end);
    });
  });
}

void norm_backward(const NormBackward& a) {
  ColumnSums<2> sums(a.rows, a.width, {a.grad_weight, a.grad_bias});
  sums.run(grain_of(a.width), [&](int64_t begin, int64_t end, float* const* into) {
    with_dtype(a.dtype, [&](auto element) {
      for (int64_t r = begin; r < end; ++r) backward_row<decltype(element)>(a, r, into[0], into[1]);
    });
  });
}

}  // namespace tf::TF_ISA
