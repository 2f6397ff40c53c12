// layer_norm, rms_norm and their residual + dropout fusions: one pass over memory, the row stays in cache.
#include "norm.hpp"

#include "column_sums.hpp"
#include "kernels.hpp"
#include "philox.hpp"

namespace tf::TF_ISA {
namespace {

// v = residual + dropout(x) of row r into `row` (float) and, rounded, into `sum` where there is one.
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
      if constexpr (sizeof(T) == 2) v = load(sum + c, part);  // what the backward pass will see
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
    } else {  // two passes and a correction for the mean's own rounding: no cancellation
      mean = inverse * sum(sum_columns(n, [&](int64_t c, auto part) { return load(v + c, part); }));
      Vec drift = broadcast(0.f);
      const char* next = static_cast<const char*>(a.x) + (r + 1) * a.x_stride * int64_t(sizeof(T));
      const float spread = sum(sum_columns(n, [&](int64_t c, auto part) {
        __builtin_prefetch(next + c * int64_t(sizeof(T)));  // memory would idle during this pass
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

// R rows together, so that the running sums of grad_weight and grad_bias are read and written once for all.
template <class T, int R>
void backward_rows(const NormBackward& a, int64_t first, float* grad_weight, float* grad_bias) {
  const int64_t n = a.width;
  const float* weight = a.weight;
  const bool has_sum = a.grad_sum != nullptr;
  const T *dy[R], *v[R], *dsum[R];
  T* dv[R];
  float mean[R], rstd[R], along[R], across[R];  // mean of g * xhat, mean of g, with g = weight * dy
  for (int k = 0; k < R; ++k) {
    const int64_t r = first + k;
    dy[k] = static_cast<const T*>(a.grad_y) + r * a.grad_y_stride;
    v[k] = static_cast<const T*>(a.v) + r * a.v_stride;
    dsum[k] = static_cast<const T*>(a.grad_sum) + r * a.grad_sum_stride;
    dv[k] = static_cast<T*>(a.grad_v) + r * n;
    mean[k] = a.mean ? a.mean[r] : 0.f;
    rstd[k] = a.rstd[r];
  }
  Vec s1[R] = {}, s2[R] = {};
  for_columns(n, [&](int64_t c, auto part) {
    const Vec w = weight ? load(weight + c, part) : broadcast(1.f);
    for (int k = 0; k < R; ++k) {
      const Vec g = load(dy[k] + c, part) * w;
      s1[k] = fma(g, (load(v[k] + c, part) - mean[k]) * rstd[k], s1[k]);
      s2[k] = s2[k] + g;
    }
  });
  for (int k = 0; k < R; ++k) {
    along[k] = sum(s1[k]) / float(n);
    across[k] = a.mean ? sum(s2[k]) / float(n) : 0.f;
  }
  for_columns(n, [&](int64_t c, auto part) {
    const Vec w = weight ? load(weight + c, part) : broadcast(1.f);
    Vec dw = broadcast(0.f), db = broadcast(0.f);
    for (int k = 0; k < R; ++k) {
      const Vec g = load(dy[k] + c, part), xhat = (load(v[k] + c, part) - mean[k]) * rstd[k];
      dw = fma(g, xhat, dw);
      db = db + g;
      Vec d = (g * w - across[k] - xhat * along[k]) * rstd[k];
      if (has_sum) d = d + load(dsum[k] + c, part);
      store(dv[k] + c, d, part);
    }
    if (grad_weight) store(grad_weight + c, load(grad_weight + c, part) + dw, part);
    if (grad_bias) store(grad_bias + c, load(grad_bias + c, part) + db, part);
  });
  if (!a.grad_x) return;
  alignas(64) float factors[128];
  for (int k = 0; k < R; ++k) {
    T* dx = static_cast<T*>(a.grad_x) + (first + k) * n;
    for_columns(n, [&](int64_t c, auto part) {
      if (c % 128 == 0) dropout_factors(a.dropout, 0, uint32_t(first + k), uint32_t(c / 128), factors);
      store(dx + c, load(dv[k] + c, part) * load(factors + c % 128), part);
    });
  }
}

template <class T>
void backward_chunk(const NormBackward& a, int64_t begin, int64_t end, float* grad_weight, float* grad_bias) {
  int64_t r = begin;
  for (; r + 4 <= end; r += 4) backward_rows<T, 4>(a, r, grad_weight, grad_bias);
  for (; r < end; ++r) backward_rows<T, 1>(a, r, grad_weight, grad_bias);
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
    with_dtype(a.dtype, [&](auto element) { backward_chunk<decltype(element)>(a, begin, end, into[0], into[1]); });
  });
}

}  // namespace tf::TF_ISA
