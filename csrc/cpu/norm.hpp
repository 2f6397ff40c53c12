// Arguments of the norm kernels: v = residual + dropout(x); y = weight * (v - mean) * rstd + bias.
#pragma once
#include "types.hpp"

namespace tf {

struct NormForward {
  DType dtype;
  const void *x, *residual;    // residual may be null
  const float *weight, *bias;  // may be null
  void *y, *sum;               // sum may be null: v
  float *mean, *rstd;          // may be null; mean unused for rms
  int64_t rows, width;
  int64_t x_stride, residual_stride;  // between rows; y and sum are contiguous
  float eps;
  bool rms;
  Philox dropout;
};

struct NormBackward {
  DType dtype;
  const void *grad_y, *grad_sum, *v;  // grad_sum may be null: the gradient of `sum`
  const float *weight, *mean, *rstd;  // weight may be null; mean is null for rms
  void *grad_v, *grad_x;              // contiguous; grad_x may be null: grad_v times the dropout factors
  float *grad_weight, *grad_bias;     // may be null
  int64_t rows, width;
  int64_t grad_y_stride, grad_sum_stride, v_stride;
  Philox dropout;
};

}  // namespace tf
