// Tensors -> the arguments of the activation kernels, for the CPU and for CUDA.
#pragma once
#include "matrix.hpp"

namespace tf {

// x, gate and the incoming gradient are (rows, width) with last stride 1, or contiguous (..., width). bias is float32
// or `parameters`; its gradient is float32. Results are contiguous. Sets all but bias and width, whose types differ.
template <class Call>
RowArguments take_rows(Call& a, const Tensor& x, const OptionalTensor& bias, const OptionalTensor& gate,
                       int64_t activation, ScalarType parameters) {
  const RowArguments rows(x, "x");
  rows.per_column(bias, "bias", parameters);
  a.dtype = dtype_of(x);
  a.activation = activation_of(activation);
  a.x = read(x);
  a.gate = read(gate);
  a.rows = rows.matrix().rows;
  a.x_stride = rows.matrix().stride;
  a.gate_stride = rows.stride(gate, "gate");
  return rows;
}

template <class Call>
void take_result(Call& a, const RowArguments& rows, const Tensor& y) {
  rows.result(y, "y");
  a.y = write(y);
}

template <class Call>
void take_gradients(Call& a, const RowArguments& rows, const OptionalTensor& gate, const Tensor& grad,
                    const Tensor& grad_x, const OptionalTensor& grad_bias, const OptionalTensor& grad_gate) {
  rows.result(grad_x, "grad_x");
  rows.result(grad_gate, "grad_gate");
  rows.per_column(grad_bias, "grad_bias");
  STD_TORCH_CHECK(gate.has_value() == grad_gate.has_value(),
                  "transformer_fast: grad_gate: wanted one with gate, else none");
  a.grad = read(grad);
  a.grad_stride = rows.stride(grad, "grad");
  a.grad_x = write(grad_x);
  a.grad_gate = write(grad_gate);
  a.grad_bias = write<float>(grad_bias);
}

}  // namespace tf
