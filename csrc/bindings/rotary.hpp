// Tensors -> the arguments of the rotary kernels, for the CPU and for CUDA.
#pragma once
#include "cpu/rotary.hpp"
#include "cpu/rotary_append.hpp"
#include "tensors.hpp"

namespace tf {

// x, y: (batch, length, heads, width); cos, sin: float32 (positions, half), contiguous; positions: int64 (batch,
// length).
inline Rotary rotary_of(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
                        bool interleaved, bool inverse, const Tensor& y) {
  Rotary a{};
  a.dtype = dtype_of(x);
  a.x = read(x);
  a.y = write(y);
  a.cos = read<float>(cos);
  a.sin = read<float>(sin);
  a.positions = read<int64_t>(positions);
  a.batch = x.size(0), a.length = x.size(1), a.heads = x.size(2), a.width = x.size(3), a.half = cos.size(1);
  a.x_batch = x.stride(0), a.x_token = x.stride(1), a.x_head = x.stride(2);
  a.y_batch = y.stride(0), a.y_token = y.stride(1), a.y_head = y.stride(2);
  if (positions.has_value()) a.position_batch = positions->stride(0), a.position_token = positions->stride(1);
  a.interleaved = interleaved;
  a.inverse = inverse;
  return a;
}

// query, key, value, y: (batch, length, heads, width); caches: (batch, key heads, capacity, width); last strides 1.
// lengths: int32 or int64 (batch,). Weights: (width,), contiguous, float32, or on CUDA also query's dtype. cos, sin,
// positions: as above.
inline RotaryAppend rotary_append_of(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const Tensor& key_cache, const Tensor& value_cache, const Tensor& lengths,
                                     const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
                                     const OptionalTensor& query_weight, const OptionalTensor& key_weight, double eps,
                                     bool interleaved, const Tensor& y) {
  const auto rows = [](const Tensor& t, const void* data) {
    return HeadRows{const_cast<void*>(data), t.stride(0), t.stride(1), t.stride(2)};
  };
  const auto cache = [](const Tensor& t) { return HeadRows{write(t), t.stride(0), t.stride(2), t.stride(1)}; };
  const auto norm = [](const OptionalTensor& t) {
    return HeadNorm{read(t), t.has_value() && t->scalar_type() == ScalarType::Float};
  };
  RotaryAppend a{};
  a.dtype = dtype_of(query);
  a.query = rows(query, read(query)), a.key = rows(key, read(key)), a.value = rows(value, read(value));
  a.y = rows(y, write(y)), a.key_cache = cache(key_cache), a.value_cache = cache(value_cache);
  a.cos = read<float>(cos);
  a.sin = read<float>(sin);
  a.positions = read<int64_t>(positions);
  if (positions.has_value()) a.position_batch = positions->stride(0), a.position_token = positions->stride(1);
  a.lengths = read(lengths);
  a.long_lengths = lengths.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(a.long_lengths || lengths.scalar_type() == ScalarType::Int,
                  "transformer_fast: cache_lengths must be int32 or int64");
  a.length_stride = lengths.stride(0);
  a.query_norm = norm(query_weight), a.key_norm = norm(key_weight);
  a.batch = query.size(0), a.length = query.size(1), a.heads = query.size(2), a.width = query.size(3);
  a.key_heads = key.size(2), a.capacity = key_cache.size(2), a.half = cos.size(1);
  a.eps = float(eps);
  a.interleaved = interleaved;
  return a;
}

}  // namespace tf
