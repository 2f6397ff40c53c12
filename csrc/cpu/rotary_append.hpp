// Arguments of the rotation of new queries and keys with the append of keys and values to a cache, for the CPU and CUDA.
#pragma once
#include "types.hpp"

namespace tf {

// Heads of rows, (batch, length or capacity, heads, width) by strides; the last one is 1.
struct HeadRows {
  void* data;
  int64_t batch, token, head;
};

// A vector of the heads' width: float, or of the heads' dtype (CUDA alone).
struct HeadNorm {
  const void* weight;  // null for no norm
  bool wide;           // float
};

// Of each head of query and key: x' = R(position) norm(x), with norm(x) = weight * x / sqrt(mean(x^2) + eps), and R as in
// rotary.hpp. Token i of a sequence is row lengths[b] + i of the caches.
struct RotaryAppend {
  DType dtype;
  HeadRows query, key, value;       // read
  HeadRows y, key_cache, value_cache;  // written
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

}  // namespace tf
