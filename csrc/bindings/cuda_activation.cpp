#include "cuda.hpp"

#if TF_CUDA_KERNELS
#include "cuda/activation.hpp"
#include "matrix.hpp"

namespace tf::cuda {
namespace {

// The arguments that forward and backward share.
template <class Arguments>
void fill(Arguments& a, const Tensor& x, const OptionalTensor& bias, const OptionalTensor& gate, int64_t activation) {
  a.dtype = dtype_of(x);
  a.activation = Activation(activation);
  a.x = read(x);
  a.gate = read(gate);
  a.bias = {read(bias), bias.has_value() && bias->scalar_type() == ScalarType::Float};
  const Matrix m = matrix_of(x);
  STD_TORCH_CHECK(m.width <= kWidestNorm, "transformer_fast: rows of ", m.width, " elements; wanted at most ",
                  kWidestNorm);
  a.rows = m.rows;
  a.width = int32_t(m.width);
  a.x_stride = m.stride;
  a.gate_stride = row_stride(gate);
}

void activation_forward_op(Tensor x, OptionalTensor bias, OptionalTensor gate, int64_t activation, Tensor y) {
  const Device device(x);
  BiasActivationForward a{};
  fill(a, x, bias, gate, activation);
  a.y = write(y);
  bias_activation_forward(a, device.stream());
}

void activation_backward_op(Tensor grad, Tensor x, OptionalTensor bias, OptionalTensor gate, int64_t activation,
                            Tensor grad_x, OptionalTensor grad_bias, OptionalTensor grad_gate) {
  const Device device(x);
  BiasActivationBackward a{};
  fill(a, x, bias, gate, activation);
  a.grad = read(grad);
  a.grad_stride = matrix_of(grad).stride;
  a.grad_x = write(grad_x);
  a.grad_gate = write(grad_gate);
  a.grad_bias = write<float>(grad_bias);
  OptionalTensor partial;
  if (grad_bias.has_value()) {
    partial = new_scratch(*grad_bias, {bias_activation_programs(a), int64_t(a.width)}, ScalarType::Float);
    a.partial = write<float>(*partial);
  }
  bias_activation_backward(a, device.stream());
}

}  // namespace
}  // namespace tf::cuda

TF_CUDA_IMPL(m) {
  m.impl("cuda_bias_activation_forward", TORCH_BOX(&tf::cuda::activation_forward_op));
  m.impl("cuda_bias_activation_backward", TORCH_BOX(&tf::cuda::activation_backward_op));
}
#endif

// Data is (rows, width) with last stride 1, results contiguous; bias: contiguous, float32 or of the data's dtype;
// grad_bias: float32. activation: of csrc/cpu/activation.hpp.
TF_CUDA_SCHEMA(m) {
  m.def("cuda_bias_activation_forward(Tensor x, Tensor? bias, Tensor? gate, int activation, Tensor(a!) y) -> ()");
  m.def(
      "cuda_bias_activation_backward(Tensor grad, Tensor x, Tensor? bias, Tensor? gate, int activation, "
      "Tensor(a!) grad_x, Tensor(b!)? grad_bias, Tensor(c!)? grad_gate) -> ()");
}
