// Tensors -> the arguments of the norm kernels, for the CPU and for CUDA.
#pragma once
#include "matrix.hpp"

namespace tf {

// Data is (rows, width) with last stride 1, or contiguous (..., width). weight and bias are contiguous vectors, float32
// or, for CUDA, of the data's dtype. mean, rstd and the gradients of weight and bias are float32 vectors. Results are
// contiguous. rng: int64 {seed, offset}, on the device of the kernel.
struct NormForwardArguments {
  const Tensor& x;
  const OptionalTensor &residual, &weight, &bias, &rng;
  double eps;
  bool rms;
  double dropout_p;
  const Tensor& y;
  const OptionalTensor &sum, &mean, &rstd;
};
#define TF_NORM_FORWARD_SCHEMA                                                                                  \
  "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? rng, float eps, bool rms, "              \
  "float dropout_p, Tensor(a!) y, Tensor(b!)? sum, Tensor(c!)? mean, Tensor(d!)? rstd) -> ()"
#define TF_NORM_FORWARD_PARAMETERS                                                                              \
  Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, OptionalTensor rng, double eps, \
      bool rms, double dropout_p, Tensor y, OptionalTensor sum, OptionalTensor mean, OptionalTensor rstd
#define TF_NORM_FORWARD_ARGUMENTS \
  NormForwardArguments { x, residual, weight, bias, rng, eps, rms, dropout_p, y, sum, mean, rstd }

struct NormBackwardArguments {
  const Tensor& grad_y;
  const OptionalTensor& grad_sum;
  const Tensor& v;
  const OptionalTensor &weight, &mean;
  const Tensor& rstd;
  const OptionalTensor& rng;
  double dropout_p;
  const Tensor& grad_v;
  const OptionalTensor &grad_x, &grad_weight, &grad_bias;
};
#define TF_NORM_BACKWARD_SCHEMA                                                                                    \
  "(Tensor grad_y, Tensor? grad_sum, Tensor v, Tensor? weight, Tensor? mean, Tensor rstd, Tensor? rng, "           \
  "float dropout_p, Tensor(a!) grad_v, Tensor(b!)? grad_x, Tensor(c!)? grad_weight, Tensor(d!)? grad_bias) -> ()"
#define TF_NORM_BACKWARD_PARAMETERS                                                                                \
  Tensor grad_y, OptionalTensor grad_sum, Tensor v, OptionalTensor weight, OptionalTensor mean, Tensor rstd,       \
      OptionalTensor rng, double dropout_p, Tensor grad_v, OptionalTensor grad_x, OptionalTensor grad_weight,      \
      OptionalTensor grad_bias
#define TF_NORM_BACKWARD_ARGUMENTS                                                                                 \
  NormBackwardArguments {                                                                                          \
    grad_y, grad_sum, v, weight, mean, rstd, rng, dropout_p, grad_v, grad_x, grad_weight, grad_bias                \
  }

// All but weight, bias, width and dropout, whose types differ. parameters: the dtype that weight and bias may have
// instead of float32. Returns the data as a matrix.
template <class Call>
Matrix take_forward(Call& a, const NormForwardArguments& t, ScalarType parameters) {
  const RowArguments rows(t.x, "x");
  const Matrix m = rows.matrix();
  rows.per_column(t.weight, "weight", parameters);
  rows.per_column(t.bias, "bias", parameters);
  rows.result(t.y, "y");
  rows.result(t.sum, "sum");
  rows.per_row(t.mean, "mean");
  rows.per_row(t.rstd, "rstd");
  a.dtype = dtype_of(t.x);
  a.x = read(t.x);
  a.residual = read(t.residual);
  a.y = write(t.y);
  a.sum = write(t.sum);
  a.mean = write<float>(t.mean);
  a.rstd = write<float>(t.rstd);
  a.rows = m.rows;
  a.x_stride = m.stride;
  a.residual_stride = rows.stride(t.residual, "residual");
  a.eps = float(t.eps);
  a.rms = t.rms;
  return m;
}

// Likewise.
template <class Call>
Matrix take_backward(Call& a, const NormBackwardArguments& t, ScalarType parameters) {
  const RowArguments rows(t.v, "v");
  const Matrix m = rows.matrix();
  rows.per_column(t.weight, "weight", parameters);
  rows.per_row(t.mean, "mean");
  rows.per_row(t.rstd, "rstd");
  rows.result(t.grad_v, "grad_v");
  rows.result(t.grad_x, "grad_x");
  rows.per_column(t.grad_weight, "grad_weight");
  rows.per_column(t.grad_bias, "grad_bias");
  a.dtype = dtype_of(t.v);
  a.grad_y = read(t.grad_y);
  a.grad_sum = read(t.grad_sum);
  a.v = read(t.v);
  a.mean = read<float>(t.mean);
  a.rstd = read<float>(t.rstd);
  a.grad_v = write(t.grad_v);
  a.grad_x = write(t.grad_x);
  a.grad_weight = write<float>(t.grad_weight);
  a.grad_bias = write<float>(t.grad_bias);
  a.rows = m.rows;
  a.grad_y_stride = rows.stride(t.grad_y, "grad_y");
  a.grad_sum_stride = rows.stride(t.grad_sum, "grad_sum");
  a.v_stride = m.stride;
  return m;
}

}  // namespace tf
