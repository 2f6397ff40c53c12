// Embedding sum + layer norm (+ dropout) in one pass, without intermediate tensors.
#include "embedding.hpp"

#include "column_sums.hpp"
#include "kernels.hpp"
#include "philox.hpp"

namespace tf::TF_ISA {
namespace {

template <class T>
void gather(const EmbeddingLayerNorm& a, int64_t r, float* row) {
  const T* source[3] = {};
  int count = 0;
  for (int k = 0; k < 3; ++k)
    if (a.tables[k]) source[count++] = static_cast<const T*>(a.tables[k]) + a.ids[k][r] * a.strides[k];
  for_columns(a.width, [&](int64_t c, auto part) {
    Vec v = load(source[0] + c, part);
    for (int k = 1; k < count; ++k) v = v + load(source[k] + c, part);
    store(row + c, v);
  });
}

template <class T>
void forward_rows(const EmbeddingLayerNormForward& a, int64_t begin, int64_t end) {
  const int64_t n = a.width;
  const float inverse = 1.f / float(n);
  float* row = scratch<float>(0, n + kWidth);
  alignas(64) float factors[128];
  for (int64_t r = begin; r < end; ++r) {
    gather<T>(a, r, row);
    float mean = inverse * sum(sum_columns(n, [&](int64_t c, auto part) { return load(row + c, part); }));
    Vec drift = broadcast(0.f);  // sum of deviations: the rounding error of the mean
    const float spread = sum(sum_columns(n, [&](int64_t c, auto part) {
      const Vec d = load(row + c, part, mean) - mean;
      drift = drift + d;
      return d * d;
    }));
    const float correction = inverse * sum(drift);
    const float variance = inverse * spread - correction * correction;
    mean += correction;
    const float rstd = 1.f / __builtin_sqrtf((variance < 0.f ? 0.f : variance) + a.eps);
    a.mean[r] = mean;
    a.rstd[r] = rstd;
    T* y = static_cast<T*>(a.y) + r * n;
    for_columns(n, [&](int64_t c, auto part) {
      Vec v = (load(row + c) - mean) * rstd;
      if (a.norm_weight) v = v * load(a.norm_weight + c, part);
      if (a.norm_bias) v = v + load(a.norm_bias + c, part);
      if (a.dropout.threshold) {
        if (c % 128 == 0) dropout_factors(a.dropout, 0, uint32_t(r), uint32_t(c / 128), factors);
        v = v * load(factors + c % 128);
      }
      store(y + c, v, part);
    });
  }
}

template <class T>
void backward_rows(const EmbeddingLayerNormBackward& a, int64_t begin, int64_t end, float* grad_weight,
                   float* grad_bias) {
  const int64_t n = a.width;
  float *xhat = scratch<float>(0, 2 * (n + kWidth)), *dy = xhat + n + kWidth;
  alignas(64) float factors[128];
  for (int64_t r = begin; r < end; ++r) {
    gather<T>(a, r, xhat);
    const T* grad = static_cast<const T*>(a.grad_y) + r * n;
    const float mean = a.mean[r], rstd = a.rstd[r];
    Vec s1 = broadcast(0.f), s2 = broadcast(0.f);
    for_columns(n, [&](int64_t c, auto part) {
      Vec g = load(grad + c, part);
      if (a.dropout.threshold) {
        if (c % 128 == 0) dropout_factors(a.dropout, 0, uint32_t(r), uint32_t(c / 128), factors);
        g = g * load(factors + c % 128);
      }
      const Vec x = (load(xhat + c) - mean) * rstd;
      store(dy + c, g);
      store(xhat + c, x);
      if (a.norm_weight) g = g * load(a.norm_weight + c, part);
      s1 = fma(g, x, s1);
      s2 = s2 + g;
    });
    const float along = sum(s1) / float(n), across = sum(s2) / float(n);
    float* dv = a.grad_v + r * n;
    for_columns(n, [&](int64_t c, auto part) {
      const Vec g = load(dy + c), x = load(xhat + c);
      if (grad_weight) store(grad_weight + c, fma(g, x, load(grad_weight + c, part)), part);
      if (grad_bias) store(grad_bias + c, load(grad_bias + c, part) + g, part);
      const Vec gw = a.norm_weight ? g * load(a.norm_weight + c, part) : g;
      store(dv + c, (gw - across - x * along) * rstd, part);
    });
  }
}

constexpr int64_t kBlock = 256;  // columns per item

// Adds up the rows of grad_v in the chain that starts at `row`, in ascending order, in short running sums.
template <class T>
void sum_chain(const float* grad_v, int64_t width, const int32_t* next, int32_t row, int64_t n, T* out) {
  alignas(64) float total[kBlock] = {}, run[kBlock] = {};
  int length = 0;
  for (; row >= 0; row = next[row]) {
    const float* g = grad_v + row * width;
    for_columns(n, [&](int64_t c, auto part) { store(run + c, load(run + c, part) + load(g + c, part), part); });
    if (++length % 32 == 0 || next[row] < 0)
      for_columns(n, [&](int64_t c, auto part) {
        store(total + c, load(total + c, part) + load(run + c, part), part);
        store(run + c, broadcast(0.f), part);
      });
  }
  for_columns(n, [&](int64_t c, auto part) { store(out + c, load(total + c, part), part); });
}

int64_t grain_of(int64_t width) { return 1 + 16384 / (width + 1); }

}  // namespace

void embedding_layer_norm_forward(const EmbeddingLayerNormForward& a) {
  parallel_for(a.rows, grain_of(a.width), [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto element) { forward_rows<decltype(element)>(a, begin, end); });
  });
}

void embedding_layer_norm_backward(const EmbeddingLayerNormBackward& a) {
  ColumnSums<2> sums(a.rows, a.width, {a.grad_weight, a.grad_bias});
  sums.run(grain_of(a.width), [&](int64_t begin, int64_t end, float* const* into) {
    with_dtype(a.dtype, [&](auto element) { backward_rows<decltype(element)>(a, begin, end, into[0], into[1]); });
  });
}

// Each entry of the table belongs to one thread: no atomic additions, and no pass that clears the table.
void embedding_gradient(const EmbeddingGradient& a) {
  int32_t *head = scratch<int32_t>(3, a.entries), *next = scratch<int32_t>(4, a.rows);
  __builtin_memset(head, 0xff, size_t(a.entries) * sizeof(int32_t));
  for (int64_t r = a.rows - 1; r >= 0; --r) {
    next[r] = head[a.ids[r]];
    head[a.ids[r]] = int32_t(r);
  }
  if (a.padding_idx >= 0) head[a.padding_idx] = -1;
  const int64_t blocks = (a.width + kBlock - 1) / kBlock;
  const int64_t grain = 1 + 16384 / (a.rows * kBlock / a.entries + kBlock);
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(a.entries * blocks, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last;) {
        const int64_t entry = i / blocks, c = i % blocks * kBlock, n = a.width - c < kBlock ? a.width - c : kBlock;
        T* out = static_cast<T*>(a.grad_table) + entry * a.width + c;
        int64_t unused = entry;  // most of a vocabulary is unused: memset writes long runs of zeros past the caches
        while (c == 0 && i + (unused + 1 - entry) * blocks <= last && head[unused] < 0) ++unused;
        if (unused > entry) {
          __builtin_memset(out, 0, size_t((unused - entry) * a.width) * sizeof(T));
          i += (unused - entry) * blocks;
          continue;
        }
        if (head[entry] < 0)
          __builtin_memset(out, 0, size_t(n) * sizeof(T));
        else
          sum_chain(a.grad_v + c, a.width, next, head[entry], n, out);
        ++i;
      }
    });
  });
}

}  // namespace tf::TF_ISA
