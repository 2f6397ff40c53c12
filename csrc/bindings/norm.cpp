#include "matrix.hpp"

namespace tf {
namespace {

void norm_forward(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, OptionalTensor rng,
                  double eps, bool rms, double dropout_p, Tensor y, OptionalTensor sum, OptionalTensor mean,
                  OptionalTensor rstd) {
  NormForward a{};
  a.dtype = dtype_of(x);
  a.x = read(x);
  a.residual = read(residual);
  a.weight = read<float>(weight);
  a.bias = read<float>(bias);
  a.y = write(y);
  a.sum = write(sum);
  a.mean = write<float>(mean);
  a.rstd = write<float>(rstd);
  const Matrix m = matrix_of(x);
  a.rows = m.rows;
  a.width = m.width;
  a.x_stride = m.stride;
  a.residual_stride = row_stride(residual);
  a.eps = float(eps);
  a.rms = rms;
  a.dropout = philox_of(rng, dropout_p);
  kernels().norm_forward(a);
}

void norm_backward(Tensor grad_y, OptionalTensor grad_sum, Tensor v, OptionalTensor weight, OptionalTensor mean,
                   Tensor rstd, OptionalTensor rng, double dropout_p, Tensor grad_v, OptionalTensor grad_x,
                   OptionalTensor grad_weight, OptionalTensor grad_bias) {
  NormBackward a{};
  a.dtype = dtype_of(v);
  a.grad_y = read(grad_y);
  a.grad_sum = read(grad_sum);
  a.v = read(v);
  a.weight = read<float>(weight);
  a.mean = read<float>(mean);
  a.rstd = read<float>(rstd);
  a.grad_v = write(grad_v);
  a.grad_x = write(grad_x);
  a.grad_weight = write<float>(grad_weight);
  a.grad_bias = write<float>(grad_bias);
  const Matrix m = matrix_of(v);
  a.rows = m.rows;
  a.width = m.width;
  a.grad_y_stride = matrix_of(grad_y).stride;
  a.grad_sum_stride = row_stride(grad_sum);
  a.v_stride = m.stride;
  a.dropout = philox_of(rng, dropout_p);
  kernels().norm_backward(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_norm_forward", TORCH_BOX(&tf::norm_forward));
  m.impl("cpu_norm_backward", TORCH_BOX(&tf::norm_backward));
}
