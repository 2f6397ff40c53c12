// Tensors -> the arguments of the rotary kernels, for the CPU and for CUDA.
#pragma once
#include "cpu/rotary.hpp"
#include "cpu/rotary_append.hpp"
#include "check.hpp"

namespace tf {

// cos, sin: float32 (positions, half), contiguous; positions: int64 (batch, length).
inline void check_angles(const Check& check, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
                         int64_t batch, int64_t length, int64_t width) {
  check(cos, "cos").dtype(ScalarType::Float).shape({kAny, kAny}).contiguous();
  check(sin, "sin").dtype(ScalarType::Float).shape_of(cos).contiguous();
  check(positions, "positions").dtype(ScalarType::Long).shape({batch, length});
  STD_TORCH_CHECK(2 * cos.size(1) <= width, "transformer_fast: cos: wanted at most ", width / 2, " columns, got ",
                  cos.size(1));
}

// x, y: (batch, length, heads, width); cos, sin, positions: as above.
inline Rotary rotary_of(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
                        bool interleaved, bool inverse, const Tensor& y) {
  const Check check(x);
  check(x, "x").shape({kAny, kAny, kAny, kAny}).unit();
  check(y, "y").dtype(x.scalar_type()).shape_of(x).unit().unshared();
  check_angles(check, cos, sin, positions, x.size(0), x.size(1), x.size(3));
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
// lengths: int32 or int64 (batch,). Weights: (width,), contiguous, float32 or `parameters`. cos, sin, positions: as
// above.
inline RotaryAppend rotary_append_of(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const Tensor& key_cache, const Tensor& value_cache, const Tensor& lengths,
                                     const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
                                     const OptionalTensor& query_weight, const OptionalTensor& key_weight, double eps,
                                     bool interleaved, const Tensor& y, ScalarType parameters) {
  const Check check(query);
  const ScalarType dtype = query.scalar_type();
  check(query, "query").shape({kAny, kAny, kAny, kAny}).unit();
  const int64_t batch = query.size(0), length = query.size(1), width = query.size(3);
  check(key, "key").dtype(dtype).shape({batch, length, kAny, width}).unit();
  check(value, "value").dtype(dtype).shape_of(key).unit();
  check(key_cache, "key_cache").dtype(dtype).shape({batch, key.size(2), kAny, width}).unit().unshared();
  check(value_cache, "value_cache").dtype(dtype).shape_of(key_cache).unit().unshared();
  check(y, "y").dtype(dtype).shape_of(query).unit().unshared();
  check(lengths, "cache_lengths").shape({batch});
  check(query_weight, "query_weight").float_or(parameters).shape({width}).contiguous();
  check(key_weight, "key_weight").float_or(parameters).shape({width}).contiguous();
  check_angles(check, cos, sin, positions, batch, length, width);
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
  a.batch = batch, a.length = length, a.heads = query.size(2), a.width = width;
  a.key_heads = key.size(2), a.capacity = key_cache.size(2), a.half = cos.size(1);
  a.eps = float(eps);
  a.interleaved = interleaved;
  return a;
}

}  // namespace tf
