// Arguments of the kernel that rotates new queries and keys and appends keys and values to a cache, for CPU and CUDA.
#pragma once
#include "types.hpp"

namespace tf {

// A (batch, length or capacity, heads, width) tensor; the last stride is 1.
struct HeadRows {
  void* data;
  int64_t batch, token, head;
};

// The weight of a norm, (width,): float, or on CUDA also the dtype of the heads.
struct HeadNorm {
  const void* weight;  // null for no norm
  bool wide;           // float
};

// Each head x of query and key becomes R(position) norm(x), with norm(x) = weight * x / sqrt(mean(x^2) + eps) and R as
// in rotary.hpp. Token i of sequence b is row lengths[b] + i of the caches.
struct RotaryAppend {
  DType dtype;
  HeadRows query, key, value;       // inputs
  HeadRows y, key_cache, value_cache;  // outputs
  const float *cos, *sin;           // (positions, half), contiguous
  const int64_t* positions;         // (batch, length) by strides; null: the row of the caches
  int64_t position_batch, position_token;
  const void* lengths;              // (batch,), by stride
  bool long_lengths;                // int64, else int32
  int64_t length_stride;
  HeadNorm query_norm, key_norm;
  int64_t batch, length, heads, key_heads, width, half, capacity;
  float eps;
  bool interleaved;
};

// How many positions of the cache sequence b has used.
static inline int64_t used_of(const RotaryAppend& a, int64_t b) {
  const int64_t at = b * a.length_stride;
  return a.long_lengths ? static_cast<const int64_t*>(a.lengths)[at] : static_cast<const int32_t*>(a.lengths)[at];
}

}  // namespace tf
