#include "matrix.hpp"

namespace tf {
namespace {

void bias_activation_forward(Tensor x, OptionalTensor bias, OptionalTensor gate, int64_t activation, Tensor y) {
  BiasActivationForward a{};
  a.dtype = dtype_of(x);
  a.activation = Activation(activation);
  a.x = read(x);
  a.gate = read(gate);
  a.bias = read<float>(bias);
  a.y = write(y);
  const Matrix m = matrix_of(x);
  a.rows = m.rows;
  a.width = m.width;
  a.x_stride = m.stride;
  a.gate_stride = row_stride(gate);
  kernels().bias_activation_forward(a);
}

void bias_activation_backward(Tensor grad, Tensor x, OptionalTensor bias, OptionalTensor gate, int64_t activation,
                              Tensor grad_x, OptionalTensor grad_bias, OptionalTensor grad_gate) {
  BiasActivationBackward a{};
  a.dtype = dtype_of(x);
  a.activation = Activation(activation);
  a.grad = read(grad);
  a.x = read(x);
  a.gate = read(gate);
  a.bias = read<float>(bias);
  a.grad_x = write(grad_x);
  a.grad_gate = write(grad_gate);
  a.grad_bias = write<float>(grad_bias);
  const Matrix m = matrix_of(x);
  a.rows = m.rows;
  a.width = m.width;
  a.grad_stride = matrix_of(grad).stride;
  a.x_stride = m.stride;
  a.gate_stride = row_stride(gate);
  kernels().bias_activation_backward(a);
}

void dropout_forward(Tensor x, Tensor rng, double p, Tensor y) {
  DropoutForward a{};
  a.dtype = dtype_of(x);
  a.x = read(x);
  a.y = write(y);
  const Matrix m = matrix_of(x);
  a.rows = m.rows;
  a.width = m.width;
  a.x_stride = m.stride;
  a.dropout = philox_of(rng, p);
  kernels().dropout_forward(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_bias_activation_forward", TORCH_BOX(&tf::bias_activation_forward));
  m.impl("cpu_bias_activation_backward", TORCH_BOX(&tf::bias_activation_backward));
  m.impl("cpu_dropout_forward", TORCH_BOX(&tf::dropout_forward));
}
