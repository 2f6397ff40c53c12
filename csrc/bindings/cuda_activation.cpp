#include "cuda.hpp"

#if TF_CUDA_KERNELS
#include "activation.hpp"
#include "cuda/activation.hpp"

namespace tf::cuda {
namespace {

// bias: float32 or of the rows' dtype.
template <class Call>
void take_columns(Call& a, const RowArguments& rows, const OptionalTensor& bias) {
  const int64_t width = rows.matrix().width;
  STD_TORCH_CHECK(width <= kWidestNorm, "transformer_fast: rows of ", width, " elements; wanted at most ", kWidestNorm);
  a.bias = {read(bias), bias.has_value() && bias->scalar_type() == ScalarType::Float};
  a.width = int32_t(width);
}

void activation_forward_op(Tensor x, OptionalTensor bias, OptionalTensor gate, int64_t activation, Tensor y) {
  const Device device(x);
  check_some(x, "x");
  BiasActivationForward a{};
  const RowArguments rows = take_rows(a, x, bias, gate, activation, x.scalar_type());
  take_columns(a, rows, bias);
  take_result(a, rows, y);
  bias_activation_forward(a, device.stream());
}

void activation_backward_op(Tensor grad, Tensor x, OptionalTensor bias, OptionalTensor gate, int64_t activation,
                            Tensor grad_x, OptionalTensor grad_bias, OptionalTensor grad_gate) {
  const Device device(x);
  check_some(x, "x");
  BiasActivationBackward a{};
  const RowArguments rows = take_rows(a, x, bias, gate, activation, x.scalar_type());
  take_columns(a, rows, bias);
  take_gradients(a, rows, gate, grad, grad_x, grad_bias, grad_gate);
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
