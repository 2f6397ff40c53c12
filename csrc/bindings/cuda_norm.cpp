#include "cuda.hpp"

#if TF_CUDA_KERNELS
#include "cuda/norm.hpp"
#include "matrix.hpp"

namespace tf::cuda {
namespace {

// weight or bias: contiguous, float32 or of the rows' dtype.
Parameter parameter_of(const OptionalTensor& t) {
  return {read(t), t.has_value() && t->scalar_type() == ScalarType::Float};
}

RowDropout dropout_of(const OptionalTensor& rng, double dropout_p) {
  if (!rng.has_value() || dropout_p <= 0.) return {nullptr, 0, 1.f};
  const uint32_t threshold = dropout_threshold(dropout_p);
  return {read<int64_t>(rng), threshold, keep_scale_of(threshold)};
}

int32_t width_of(const Matrix& m) {
  STD_TORCH_CHECK(m.width <= kWidestNorm, "transformer_fast: rows of ", m.width, " elements; wanted at most ",
                  kWidestNorm);
  return int32_t(m.width);
}

void forward_op(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, OptionalTensor rng,
                double eps, bool rms, double dropout_p, Tensor y, OptionalTensor sum, OptionalTensor mean,
                OptionalTensor rstd) {
  const Device device(x);
  NormForward a{};
  a.dtype = dtype_of(x);
  a.x = read(x);
  a.residual = read(residual);
  a.weight = parameter_of(weight);
  a.bias = parameter_of(bias);
  a.y = write(y);
  a.sum = write(sum);
  a.mean = write<float>(mean);
  a.rstd = write<float>(rstd);
  const Matrix m = matrix_of(x);
  a.rows = m.rows;
  a.width = width_of(m);
  a.inverse = 1.f / float(m.width);
  a.x_stride = m.stride;
  a.residual_stride = row_stride(residual);
  a.eps = float(eps);
  a.rms = rms;
  a.dropout = dropout_of(rng, dropout_p);
  norm_forward(a, device.stream());
}

void backward_op(Tensor grad_y, OptionalTensor grad_sum, Tensor v, OptionalTensor weight, OptionalTensor mean,
                 Tensor rstd, OptionalTensor rng, double dropout_p, Tensor grad_v, OptionalTensor grad_x,
                 OptionalTensor grad_weight, OptionalTensor grad_bias) {
  const Device device(v);
  NormBackward a{};
  a.dtype = dtype_of(v);
  a.grad_y = read(grad_y);
  a.grad_sum = read(grad_sum);
  a.v = read(v);
  a.weight = parameter_of(weight);
  a.mean = read<float>(mean);
  a.rstd = read<float>(rstd);
  a.grad_v = write(grad_v);
  a.grad_x = write(grad_x);
  a.grad_weight = write<float>(grad_weight);
  a.grad_bias = write<float>(grad_bias);
  const Matrix m = matrix_of(v);
  a.rows = m.rows;
  a.width = width_of(m);
  a.inverse = 1.f / float(m.width);
  a.grad_y_stride = matrix_of(grad_y).stride;
  a.grad_sum_stride = row_stride(grad_sum);
  a.v_stride = m.stride;
  a.dropout = dropout_of(rng, dropout_p);
  const int64_t wanted = grad_weight.has_value() + grad_bias.has_value();
  OptionalTensor partial;
  if (wanted) {
    partial = new_scratch(rstd, {wanted, norm_backward_blocks(a), a.width}, ScalarType::Float);
    a.partial = write<float>(*partial);
  }
  norm_backward(a, device.stream());
}

}  // namespace
}  // namespace tf::cuda

TF_CUDA_IMPL(m) {
  m.impl("cuda_norm_forward", TORCH_BOX(&tf::cuda::forward_op));
  m.impl("cuda_norm_backward", TORCH_BOX(&tf::cuda::backward_op));
}
#endif

// Data is (rows, width) with last stride 1; weight and bias are contiguous, float32 or of the data's dtype; mean, rstd
// and the parameters' gradients are float32 vectors; results are contiguous. rng: int64 {seed, offset}, on the
// device.
TF_CUDA_SCHEMA(m) {
  m.def(
      "cuda_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? rng, float eps, bool rms, "
      "float dropout_p, Tensor(a!) y, Tensor(b!)? sum, Tensor(c!)? mean, Tensor(d!)? rstd) -> ()");
  m.def(
      "cuda_norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor v, Tensor? weight, Tensor? mean, Tensor rstd, "
      "Tensor? rng, float dropout_p, Tensor(a!) grad_v, Tensor(b!)? grad_x, Tensor(c!)? grad_weight, "
      "Tensor(d!)? grad_bias) -> ()");
}
