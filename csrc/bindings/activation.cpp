#include "activation.hpp"

namespace tf {
namespace {

void bias_activation_forward(Tensor x, OptionalTensor bias, OptionalTensor gate, int64_t activation, Tensor y) {
  BiasActivationForward a{};
  const RowArguments rows = take_rows(a, x, bias, gate, activation, ScalarType::Float);
  take_result(a, rows, y);
  a.bias = read<float>(bias);
  a.width = rows.matrix().width;
  kernels().bias_activation_forward(a);
}

void bias_activation_backward(Tensor grad, Tensor x, OptionalTensor bias, OptionalTensor gate, int64_t activation,
                              Tensor grad_x, OptionalTensor grad_bias, OptionalTensor grad_gate) {
  BiasActivationBackward a{};
  const RowArguments rows = take_rows(a, x, bias, gate, activation, ScalarType::Float);
  take_gradients(a, rows, gate, grad, grad_x, grad_bias, grad_gate);
  a.bias = read<float>(bias);
  a.width = rows.matrix().width;
  kernels().bias_activation_backward(a);
}

void dropout_forward(Tensor x, Tensor rng, double p, Tensor y) {
  DropoutForward a{};
  const RowArguments rows(x, "x");
  take_result(a, rows, y);
  a.dtype = dtype_of(x);
  a.x = read(x);
  a.rows = rows.matrix().rows;
  a.width = rows.matrix().width;
  a.x_stride = rows.matrix().stride;
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
