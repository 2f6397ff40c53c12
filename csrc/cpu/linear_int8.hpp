// Arguments of products in int8: weights are quantised once, activations row by row at run time, sums are int32.
//
// Inputs are quantised in groups, one scale per group: weights w[n, k] = s[n, g] q[n, k] with q in -127..127,
// activations x[m, k] = t[m, g] (u[m, k] - z[m, g]) with u in 0..255. A group's sum of u q is exact in int32. Minus z
// times the sum of q it is also exact in float32 (group <= 256), and t s times that is the group's term of the product.
// So every instruction set gives the same bits.
#pragma once
#include "linear.hpp"

namespace tf {

constexpr int64_t kInt8Group = 256;  // the longest group; others divide it and are multiples of 32

// Panels of 32 columns. A panel is a sequence of groups: q (group / 4, 32, 4), then float32 scales (32,) and sums of q
// (32,). Inputs are padded with zeros to a multiple of four.
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

struct FromInt8Panels {  // the inverse of ToInt8Panels
  const int8_t* panels;
  int8_t* weight;
  float* scale;
  int64_t out, in, group;
};

struct QuantizeWeight {  // weight (out, in) -> q (out, in), scale (out, groups): max |w| / 127 per group
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

// Rows in u8: values (rows, stride), and scales and zero points (rows, groups).
struct Int8Rows {
  uint8_t* values;
  float *scale, *zero;
  int64_t stride, groups;
};
// Not a power of two: rows would map to the same cache sets. Leaves room to write one vector past the end.
static inline int64_t int8_row_stride(int64_t in) { return (in + 127) / 64 * 64; }
// Floats of memory per row.
static inline int64_t int8_row_floats(int64_t in, int64_t group) {
  return int8_row_stride(in) / 4 + 2 * int8_groups(in, group);
}

struct LinearInt8 {  // y = act(x W^T + bias); several weights share x, their outputs are side by side in y
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

// The part of a layer after attention. r = residual + context W_output^T and f(x) = down(act(up(x)) [* gate(x)]). With
// norms after the sums, x = norm1(r) and y = norm2(x + f(x)); with norms before, y = r + f(norm2(r)).
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
