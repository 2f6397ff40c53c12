// Arguments of the CUDA kernels of y = act(x + bias) [* gate].
#pragma once
#include "cpu/activation.hpp"
#include "cuda/norm.hpp"

namespace tf::cuda {

struct BiasActivationForward {
  DType dtype;
  Activation activation;
  const void *x, *gate;  // gate may be null
  Parameter bias;
  void* y;  // contiguous
  int64_t rows;
  int32_t width;
  int64_t x_stride, gate_stride;
};

struct BiasActivationBackward {
  DType dtype;
  Activation activation;
  const void *grad, *x, *gate;  // gate may be null
  Parameter bias;
  void *grad_x, *grad_gate;  // contiguous; grad_gate is null if gate is
  float* grad_bias;          // may be null
  float* partial;            // (programs, width): sums over each program's rows; null if grad_bias is
  int64_t rows;
  int32_t width;
  int64_t grad_stride, x_stride, gate_stride;
};

void bias_activation_forward(const BiasActivationForward&, Stream);
// How many programs share the rows in bias_activation_backward on the current device: the first axis of `partial`.
int64_t bias_activation_programs(const BiasActivationBackward&);
void bias_activation_backward(const BiasActivationBackward&, Stream);

}  // namespace tf::cuda
