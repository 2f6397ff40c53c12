// Arguments of the kernels of linear layers, other than torch's GEMMs.
#pragma once
#include "activation.hpp"

namespace tf {

struct ColumnSum {  // out[c] = sum over r of x[r, c]
  DType dtype;
  const void* x;
  float* out;
  int64_t rows, width, x_stride;
};

// A weight laid out for few rows: panels of 32 output columns, each (in, 32), so that a product reads memory once, in
// order. In bfloat16, 32-bit word i holds column i in its low half and column 16 + i in its high half: widening is a
// shift and a mask. In int8 the values are round(w / scale), and the panel's 32 float32 scales, max |w| / 127 per
// column, follow its inputs; they take the space of four more inputs.
enum class Storage : int32_t { f32, bf16, i8 };
constexpr int64_t kPanel = 32;
constexpr int64_t kScaleSlots = kPanel * int64_t(sizeof(float));  // int8 values that hold a panel's scales

struct ToPanels {
  DType dtype;         // of the weight
  Storage storage;     // of the panels
  const void* weight;  // (out, in), one of the strides 1
  void* panels;        // (ceil(out / 32), in, 32), in i8 (ceil(out / 32), in + 4, 32)
  int64_t out, in, out_stride, in_stride;
};

struct RowsWeight {
  const float *weight, *bias;  // (out, in), rows `stride` apart; bias may be null
  float* y;                    // (rows, out), contiguous
  int64_t out, stride;
};

struct LinearRows {  // y_i = act(x W_i^T + bias_i), float32
  const float* x;
  int64_t rows, in, x_stride, count;
  const RowsWeight* weights;
  bool has_activation;
  Activation activation;
};

struct LinearLong {  // y = act(x W^T + bias), float32
  const float *x, *weight, *bias;  // weight (out, in), one of the strides 1; bias may be null
  float* y;                        // (rows, out), contiguous
  int64_t rows, in, out, x_stride, out_stride, in_stride;
  bool has_activation;
  Activation activation;
};

struct LinearBf16 {  // y = act(x W^T + bias) in bfloat16, summed in float32; for few rows
  const void *x, *weight, *bias;  // (rows, in) and (out, in), last strides 1; bias (out,), may be null
  void* y;                        // (rows, out), contiguous
  int64_t rows, in, out, x_stride, out_stride;
  bool has_activation;
  Activation activation;
};

struct WeightGradient {  // y = g^T x, float32, and the sum of g over rows
  const float *g, *x;  // (rows, out), (rows, in), last strides 1
  float *y, *sums;     // (out, in) contiguous, (out,); sums may be null
  int64_t rows, in, out, g_stride, x_stride;
};

struct LinearPanel {  // y = act(x W^T + bias), summed in float32
  DType dtype;
  Storage storage;
  const void *x, *panels;
  const float* bias;  // may be null
  void* y;            // contiguous
  int64_t rows, out, in, x_stride;
  bool has_activation;
  Activation activation;
};

}  // namespace tf
