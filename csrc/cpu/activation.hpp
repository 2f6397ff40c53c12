// Arguments of the elementwise kernels: y = act(x + bias) [* gate], and dropout.
#pragma once
#include "types.hpp"

namespace tf {

enum class Activation : int32_t { gelu = 0, gelu_tanh = 1, relu = 2, silu = 3 };

struct BiasActivationForward {
  DType dtype;
  Activation activation;
  const void *x, *gate;  // gate may be null
  const float* bias;     // may be null
  void* y;               // contiguous
  int64_t rows, width;
  int64_t x_stride, gate_stride;
};

struct BiasActivationBackward {
  DType dtype;
  Activation activation;
  const void *grad, *x, *gate;  // gate may be null
  const float* bias;            // may be null
  void *grad_x, *grad_gate;     // contiguous; grad_gate is null if gate is
  float* grad_bias;             // may be null
  int64_t rows, width;
  int64_t grad_stride, x_stride, gate_stride;
};

struct DropoutForward {
  DType dtype;
  const void* x;
  void* y;  // contiguous
  int64_t rows, width;
  int64_t x_stride;
  Philox dropout;
};

}  // namespace tf
