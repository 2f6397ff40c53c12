// Arguments of the rotary position embedding.
#pragma once
#include "types.hpp"

namespace tf {

// y = R(position) x: each pair (x1, x2) of a head's first 2 * half columns becomes (x1 c - x2 s, x2 c + x1 s). Pairs
// are columns (i, half + i), or if interleaved (2 i, 2 i + 1). The other columns are copied.
struct Rotary {
  DType dtype;
  const void* x;             // (batch, length, heads, width), last stride 1
  void* y;                   // the same, last stride 1
  const float *cos, *sin;    // (positions, half), contiguous
  const int64_t* positions;  // (batch, length) by strides; null: 0, 1, 2 .. in every sequence
  int64_t batch, length, heads, width, half;
  int64_t x_batch, x_token, x_head;  // strides
  int64_t y_batch, y_token, y_head;
  int64_t position_batch, position_token;
  bool interleaved;
  bool inverse;  // rotate back
};

}  // namespace tf
