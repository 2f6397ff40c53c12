// Arguments of the CUDA norm kernels: v = residual + dropout(x); y = weight * (v - mean) * rstd + bias.
#pragma once
#include "types.hpp"

namespace tf::cuda {

constexpr int64_t kWidestNorm = int64_t(1) << 30;  // so that columns fit int32

using Stream = void*;  // cudaStream_t

struct Parameter {  // (width,): float, or the dtype of the rows
  const void* data;  // may be null
  bool wide;         // float
};

struct RowDropout {
  const int64_t* rng;  // {seed, offset}, on the device
  uint32_t threshold;  // see types.hpp; 0: nothing is dropped
  float keep_scale;
};

struct NormForward {
  DType dtype;
  const void *x, *residual;  // residual may be null
  Parameter weight, bias;
  void *y, *sum;       // sum may be null: v
  float *mean, *rstd;  // may be null; mean unused for rms
  int64_t rows;
  int32_t width;
  int64_t x_stride, residual_stride;  // between rows; y and sum are contiguous
  float eps, inverse;  // inverse: 1 / width
  bool rms;
  RowDropout dropout;
};

struct NormBackward {
  DType dtype;
  const void *grad_y, *grad_sum, *v;  // grad_sum may be null: the gradient of `sum`
  Parameter weight;
  const float *mean, *rstd;  // mean is null for rms
  void *grad_v, *grad_x;     // contiguous; grad_x may be null: grad_v times the dropout factors
  float *grad_weight, *grad_bias;  // may be null
  float* partial;  // (wanted gradients, blocks, width): sums per block; null when neither is wanted
  int64_t rows;
  int32_t width;
  int64_t grad_y_stride, grad_sum_stride, v_stride;
  float inverse;  // 1 / width
  RowDropout dropout;
};

void norm_forward(const NormForward&, Stream);
// How many blocks norm_backward runs on the current device: the second axis of `partial`.
int64_t norm_backward_blocks(const NormBackward&);
void norm_backward(const NormBackward&, Stream);

}  // namespace tf::cuda
