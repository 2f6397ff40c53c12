// layer_norm, rms_norm and their residual + dropout fusions: one pass over the row held in cache.
#include "parallel.hpp"
#include "philox.hpp"
#include "simd.hpp"

namespace tf::TF_ISA {
namespace {

template <class T>
void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  const int64_t n = a.width;
  float* row = scratch<float>(0, n + kWidth);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + r * a.residual_stride : nullptr;
    T* sum_out = a.sum ? static_cast<T*>(a.sum) + r * n : nullptr;
    T* y = static_cast<T*>(a.y) + r * n;
    float factors[128];
    Vec total = broadcast(0.f), squares = broadcast(0.f);
    for (int64_t c = 0; c < n; c += kWidth) {
      const int count = n - c < kWidth ? int(n - c) : kWidth;
      const bool full = count == kWidth;
      Vec v = full ? load(x + c) : load_partial(x + c, count);
      if (a.dropout.threshold) {
        if (c % 128 == 0) dropout_factors(a.dropout, 0, uint32_t(r), uint32_t(c / 128), factors);
        v = v * load(factors + c % 128);
      }
      if (residual) v = v + (full ? load(residual + c) : load_partial(residual + c, count));
      if (sum_out) {
        full ? store(sum_out + c, v) : store_partial(sum_out + c, v, count);
        if constexpr (sizeof(T) == 2) v = full ? load(sum_out + c) : load_partial(sum_out + c, count);
      }
      store(row + c, v);
      total = total + v;
      squares = fma(v, v, squares);
    }
    float mean = a.rms ? 0.f : tf::TF_ISA::sum(total) / float(n);
    float variance;
    if (a.rms) {
      variance = tf::TF_ISA::sum(squares) / float(n);
    } else {  // second pass over the cached row: no cancellation
      Vec spread = broadcast(0.f);
      for (int64_t c = 0; c < n; c += kWidth) {
        const int count = n - c < kWidth ? int(n - c) : kWidth;
        Vec d = (count == kWidth ? load(row + c) : load_partial(row + c, count, mean)) - mean;
        spread = fma(d, d, spread);
      }
      variance = tf::TF_ISA::sum(spread) / float(n);
    }
    const float rstd = 1.f / __builtin_sqrtf(variance + a.eps);
    if (a.mean) a.mean[r] = mean;
    if (a.rstd) a.rstd[r] = rstd;
    for (int64_t c = 0; c < n; c += kWidth) {
      const int count = n - c < kWidth ? int(n - c) : kWidth;
      const bool full = count == kWidth;
      Vec v = (load(row + c) - mean) * rstd;
      if (a.weight) v = v * (full ? load(a.weight + c) : load_partial(a.weight + c, count));
      if (a.bias) v = v + (full ? load(a.bias + c) : load_partial(a.bias + c, count));
      full ? store(y + c, v) : store_partial(y + c, v, count);
    }
  }
}

}  // namespace

void norm_forward(const NormForward& a) {
  const int64_t grain = 1 + 16384 / (a.width + 1);
  parallel_for(a.rows, grain, [&](int64_t begin, int64_t end) {
    if (a.dtype == DType::f32)
      forward_rows<float>(a, begin, end);
    else if (a.dtype == DType::bf16)
      forward_rows<bf16>(a, begin, end);
    else
      forward_rows<f16>(a, begin, end);
  });
}

}  // namespace tf::TF_ISA
