// Additive attention: the hidden layer tanh(q_i + k_j + b) exists one vector at a time, forward and backward. Sums over
// positions run in short pieces in a fixed order, so results do not depend on the number of threads.
#include "additive_attention.hpp"

#include "kernels.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int64_t kRun = 32;  // terms per running sum
constexpr int kVectors = 4;   // of the hidden layer per task of the backward pass
constexpr int64_t kColumns = kVectors * kWidth;

template <class T>
static inline const T* row(const void* p, const int64_t (&strides)[2], int64_t b, int64_t i) {
  return static_cast<const T*>(p) + b * strides[0] + i * strides[1];
}
static inline int64_t keys_of(const AdditiveAttention& a, int64_t b) {
  const int64_t keys = a.key_lengths ? least(a.key_lengths[b], a.keys) : a.keys;
  return keys < 0 ? 0 : keys;
}
static inline bool takes_part(const AdditiveAttention& a, int64_t b, int64_t i, int64_t j) {
  return !a.mask || a.mask[b * a.mask_strides[0] + i * a.mask_strides[1] + j * a.mask_strides[2]];
}
// Rows that are worth a thread, at `work` hidden units per row.
static inline int64_t grain_of(int64_t work) { return 1 + 4096 / (work + 1); }

template <class T>
void forward_row(const AdditiveAttentionForward& a, int64_t b, int64_t i) {
  const int64_t n = keys_of(a, b), width = a.width;
  float* base = scratch<float>(0, width + kWidth);
  const T* query = row<T>(a.query, a.query_strides, b, i);
  for_columns(width, [&](int64_t c, auto part) {
    const Vec q = load(query + c, part);
    store(base + c, a.bias ? q + load(a.bias + c, part) : q);
  });
  float *weights = a.weights + (b * a.queries + i) * a.keys, largest = -INFINITY;
  bool alive = false;
  for (int64_t j = 0; j < n; ++j) {
    if (!takes_part(a, b, i, j)) {
      weights[j] = -INFINITY;
      continue;
    }
    const T* key = row<T>(a.key, a.key_strides, b, j);
    const float score = sum(sum_columns(width, [&](int64_t c, auto part) {
      return load(a.score_weight + c, part) * tanh_accurate(load(base + c) + load(key + c, part));
    }));
    weights[j] = score;
    largest = score > largest ? score : largest;
    alive = true;
  }
  for (int64_t j = n; j < a.keys; ++j) weights[j] = 0.f;
  T* out = static_cast<T*>(a.out) + (b * a.queries + i) * a.value_width;
  if (!alive) {
    for (int64_t j = 0; j < n; ++j) weights[j] = 0.f;
    __builtin_memset(out, 0, size_t(a.value_width) * sizeof(T));
    return;
  }
  Vec total = broadcast(0.f);
  for_columns(n, [&](int64_t j, auto part) {
    const Vec e = exp(load(weights + j, part, -INFINITY) - largest);
    store(weights + j, e, part);
    total = total + e;
  });
  const float inverse = 1.f / sum(total);
  float* mixed = scratch<float>(1, a.value_width + kWidth);
  __builtin_memset(mixed, 0, size_t(a.value_width + kWidth) * sizeof(float));
  for (int64_t j = 0; j < n; ++j) {
    const float w = weights[j] *= inverse;
    if (w == 0.f) continue;
    const T* value = row<T>(a.value, a.value_strides, b, j);
    for_columns(a.value_width, [&](int64_t c, auto part) {
      store(mixed + c, fma(load(value + c, part), broadcast(w), load(mixed + c)));
    });
  }
  for_columns(a.value_width, [&](int64_t c, auto part) { store(out + c, load(mixed + c), part); });
}

// Gradients of one query's scores: w_j (dw_j - sum_k w_k dw_k), dw_j = grad_out . value_j + grad_weights_j.
template <class T>
void score_gradients(const AdditiveAttentionBackward& a, int64_t b, int64_t i, float* ds) {
  const int64_t n = keys_of(a, b), at = b * a.queries + i;
  const T* grad = static_cast<const T*>(a.grad_out) + at * a.value_width;
  const float *weights = a.weights + at * a.keys, *extra = a.grad_weights ? a.grad_weights + at * a.keys : nullptr;
  double along = 0;
  for (int64_t j = 0; j < n; ++j) {
    ds[j] = 0.f;
    if (weights[j] == 0.f) continue;
    const T* value = row<T>(a.value, a.value_strides, b, j);
    ds[j] = sum(sum_columns(a.value_width, [&](int64_t c, auto part) {
      return load(grad + c, part) * load(value + c, part);
    }));
    if (extra) ds[j] += extra[j];
    along += double(weights[j]) * ds[j];
  }
  for (int64_t j = 0; j < n; ++j) ds[j] = weights[j] == 0.f ? 0.f : weights[j] * (ds[j] - float(along));
}

// Columns [c0, c0 + count) of the gradients to query, key and score_weight of sequence b. ds: (queries, keys).
template <class T>
void hidden_gradients(const AdditiveAttentionBackward& a, int64_t b, int64_t c0, int64_t count, const float* ds) {
  const int64_t n = keys_of(a, b);
  const auto vectors = [&](auto* p, Vec(&v)[kVectors]) {
    for (int k = 0; k < kVectors; ++k) {
      const int64_t left = count - k * kWidth;
      v[k] = left >= kWidth ? load(p + k * kWidth) : left > 0 ? load_partial(p + k * kWidth, int(left)) : Vec{};
    }
  };
  const auto put = [&](auto* p, const Vec(&v)[kVectors]) {
    for (int k = 0; k < kVectors; ++k) {
      const int64_t left = count - k * kWidth;
      if (left >= kWidth)
        store(p + k * kWidth, v[k]);
      else if (left > 0)
        store_partial(p + k * kWidth, v[k], int(left));
    }
  };
  float *dk = scratch<float>(0, n * kColumns), *run = scratch<float>(1, n * kColumns);
  __builtin_memset(dk, 0, size_t(n * kColumns) * sizeof(float));
  Vec v[kVectors], bias[kVectors] = {}, dv[kVectors] = {};
  vectors(a.score_weight + c0, v);
  if (a.bias) vectors(a.bias + c0, bias);
  for (int64_t first = 0; first < a.queries; first += kRun) {
    __builtin_memset(run, 0, size_t(n * kColumns) * sizeof(float));
    Vec dv_run[kVectors] = {};
    for (int64_t i = first; i < least(first + kRun, a.queries); ++i) {
      Vec base[kVectors], dq[kVectors] = {};
      vectors(row<T>(a.query, a.query_strides, b, i) + c0, base);
      for (int k = 0; k < kVectors; ++k) base[k] = base[k] + bias[k];
      for (int64_t begin = 0; begin < n; begin += kRun) {
        Vec dq_run[kVectors] = {}, dv_row[kVectors] = {};
        for (int64_t j = begin; j < least(begin + kRun, n); ++j) {
          const float d = ds[i * a.keys + j];
          if (d == 0.f) continue;
          Vec key[kVectors];
          vectors(row<T>(a.key, a.key_strides, b, j) + c0, key);
          float* sums = run + j * kColumns;
          for (int k = 0; k < kVectors; ++k) {
            const Vec t = tanh_accurate(base[k] + key[k]);
            dv_row[k] = fma(t, broadcast(d), dv_row[k]);
            const Vec g = (1.f - t * t) * (v[k] * d);
            dq_run[k] = dq_run[k] + g;
            store(sums + k * kWidth, load(sums + k * kWidth) + g);
          }
        }
        for (int k = 0; k < kVectors; ++k) {
          dq[k] = dq[k] + dq_run[k];
          dv_run[k] = dv_run[k] + dv_row[k];
        }
      }
      put(a.grad_query + (b * a.queries + i) * a.width + c0, dq);
    }
    for (int k = 0; k < kVectors; ++k) dv[k] = dv[k] + dv_run[k];
    for (int64_t x = 0; x < n * kColumns; x += kWidth) store(dk + x, load(dk + x) + load(run + x));
  }
  put(a.grad_score_weight + b * a.width + c0, dv);
  for (int64_t j = 0; j < a.keys; ++j) {
    Vec sums[kVectors] = {};
    for (int k = 0; k < kVectors && j < n; ++k) sums[k] = load(dk + j * kColumns + k * kWidth);
    put(static_cast<T*>(a.grad_key) + (b * a.keys + j) * a.width + c0, sums);
  }
}

template <class T>
void value_gradient(const AdditiveAttentionBackward& a, int64_t b, int64_t j) {
  const int64_t padded = a.value_width + kWidth;
  float *total = scratch<float>(0, padded), *run = scratch<float>(1, padded);
  __builtin_memset(total, 0, size_t(padded) * sizeof(float));
  for (int64_t first = 0; first < a.queries; first += kRun) {
    __builtin_memset(run, 0, size_t(padded) * sizeof(float));
    for (int64_t i = first; i < least(first + kRun, a.queries); ++i) {
      const int64_t at = b * a.queries + i;
      const float w = a.weights[at * a.keys + j];
      if (w == 0.f) continue;
      const T* grad = static_cast<const T*>(a.grad_out) + at * a.value_width;
      for_columns(a.value_width, [&](int64_t c, auto part) {
        store(run + c, fma(load(grad + c, part), broadcast(w), load(run + c)));
      });
    }
    for_columns(a.value_width, [&](int64_t c, auto) { store(total + c, load(total + c) + load(run + c)); });
  }
  T* out = static_cast<T*>(a.grad_value) + (b * a.keys + j) * a.value_width;
  for_columns(a.value_width, [&](int64_t c, auto part) { store(out + c, load(total + c), part); });
}

}  // namespace

void additive_attention_forward(const AdditiveAttentionForward& a) {
  with_dtype(a.dtype, [&](auto element) {
    const int64_t grain = grain_of(a.keys * (a.width + a.value_width / 8));
    parallel_for(a.batch * a.queries, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) forward_row<decltype(element)>(a, r / a.queries, r % a.queries);
    });
  });
}

void additive_attention_backward(const AdditiveAttentionBackward& a) {
  float* ds = scratch<float>(2, a.batch * a.queries * a.keys);
  const int64_t blocks = (a.width + kColumns - 1) / kColumns;
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(a.batch * a.queries, grain_of(a.keys * a.value_width / 8), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) score_gradients<T>(a, r / a.queries, r % a.queries, ds + r * a.keys);
    });
    parallel_for(a.batch * blocks, grain_of(a.queries * a.keys * kColumns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t b = r / blocks, c = r % blocks * kColumns;
        hidden_gradients<T>(a, b, c, least(kColumns, a.width - c), ds + b * a.queries * a.keys);
      }
    });
    parallel_for(a.batch * a.keys, grain_of(a.queries * a.value_width / 8), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) value_gradient<T>(a, r / a.keys, r % a.keys);
    });
  });
}

}  // namespace tf::TF_ISA
