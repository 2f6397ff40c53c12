// Arguments of products in int8: weights quantised once, activations row by row as they come, int32 sums.
//
// Inputs are quantised in groups, `group` of them to a scale: a weight w[n, k] = s[n, g] q[n, k] with q in -127..127, an
// activation x[m, k] = t[m, g] (u[m, k] - z[m, g]) with u in 0..255. A group's sum of u q is exact in int32; less z times
// the sum of q it is exact in float32 too (group <= 128), and t s times that is what the group adds to the product. So
// every instruction set gives the same bits.
#pragma once
#include "linear.hpp"

namespace tf {

constexpr int64_t kInt8Group = 128;  // the longest; others divide it and are multiples of 32

// Panels of 32 columns. In a panel group follows group: the inputs four by four, for each four 32 columns of 4 bytes, then
// float32 scales of the 32 columns, and the sums of their q. Inputs are filled up with zeros to a multiple of four.
static inline int64_t int8_depth(int64_t in) { return (in + 3) / 4 * 4; }
static inline int64_t int8_groups(int64_t in, int64_t group) { return (in + group - 1) / group; }
static inline int64_t int8_panel_bytes(int64_t in, int64_t group) {
  return int8_depth(in) * kPanel + int8_groups(in, group) * 2 * kScaleSlots;
}

struct ToInt8Panels {  // weight (out, in) contiguous, scale (out, groups) -> panels (ceil(out / 32), int8_panel_bytes)
  const int8_t* weight;
  const float* scale;
  int8_t* panels;
  int64_t out, in, group;
};

struct FromInt8Panels {  // the way back
  const int8_t* panels;
  int8_t* weight;
  float* scale;
  int64_t out, in, group;
};

struct QuantizeWeight {  // weight (out, in) -> q (out, in), scale (out, groups): max |w| / 127 of a group
  DType dtype;
  const void* weight;
  int8_t* q;
  float* scale;
  int64_t out, in, group, out_stride, in_stride;
};

struct Int8Weight {  // absent when panels is null
  const int8_t* panels;
  const float* bias;  // may be null
  int64_t out, in, group;
};

// Rows in u8: values (rows, stride), and of each row's groups scale and zero point (rows, groups).
struct Int8Rows {
  uint8_t* values;
  float *scale, *zero;
  int64_t stride, groups;
};
// A stride that is no power of two: rows would meet in one set of the cache. A vector may be written past the end.
static inline int64_t int8_row_stride(int64_t in) { return (in + 127) / 64 * 64; }
// Floats of memory that a row takes.
static inline int64_t int8_row_floats(int64_t in, int64_t group) {
  return int8_row_stride(in) / 4 + 2 * int8_groups(in, group);
}

struct LinearInt8 {  // y = act(x W^T + bias), several weights of one input side by side
  DType x_dtype, y_dtype;
  const void* x;
  void* y;
  int64_t rows, x_stride, y_stride;
  const Int8Weight* weights;
  int64_t count;
  bool has_activation;
  Activation activation;
};

struct Int8Norm {  // absent when eps is negative
  const float *weight, *bias;  // may be null
  float eps;
  bool rms;
};

// What follows attention in a layer: r = residual + context W_output^T; then with norms after, x = norm1(r) and
// y = norm2(x + f(x)), with norms before, y = r + f(norm2(r)); f(x) = down(act(up(x)) [* gate(x)]).
struct Int8Block {
  DType dtype, context_dtype;  // of residual and y
  const void *context, *residual;
  void* y;
  int64_t rows, width, context_stride, residual_stride;
  Int8Weight output, up, gate, down;  // gate may be absent
  Int8Norm attention_norm, output_norm;  // the first is absent with norms before
  Activation activation;
};

}  // namespace tf
