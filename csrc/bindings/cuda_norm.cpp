#include "cuda.hpp"
#include "norm.hpp"

#if TF_CUDA_KERNELS
#include "cuda/norm.hpp"

namespace tf::cuda {
namespace {

// weight or bias: contiguous, float32 or of the rows' dtype.
Parameter parameter_of(const OptionalTensor& t) {
  return {read(t), t.has_value() && t->scalar_type() == ScalarType::Float};
}

RowDropout dropout_of(const Check& check, const OptionalTensor& rng, double dropout_p) {
  if (!rng.has_value() || dropout_p <= 0.) return {nullptr, 0, 1.f};
  check(*rng, "rng").dtype(ScalarType::Long).numel(2).contiguous();
  const uint32_t threshold = dropout_threshold(dropout_p);
  return {read<int64_t>(rng), threshold, keep_scale_of(threshold)};
}

int32_t width_of(const Matrix& m) {
  STD_TORCH_CHECK(m.width <= kWidestNorm, "transformer_fast: rows of ", m.width, " elements; wanted at most ",
                  kWidestNorm);
  return int32_t(m.width);
}

void forward_op(TF_NORM_FORWARD_PARAMETERS) {
  const Device device(x);
  check_some(x, "x");
  NormForward a{};
  a.width = width_of(take_forward(a, TF_NORM_FORWARD_ARGUMENTS, x.scalar_type()));
  a.inverse = 1.f / float(a.width);
  a.weight = parameter_of(weight);
  a.bias = parameter_of(bias);
  a.dropout = dropout_of(Check(x), rng, dropout_p);
  norm_forward(a, device.stream());
}

void backward_op(TF_NORM_BACKWARD_PARAMETERS) {
  const Device device(v);
  check_some(v, "v");
  NormBackward a{};
  a.width = width_of(take_backward(a, TF_NORM_BACKWARD_ARGUMENTS, v.scalar_type()));
  a.inverse = 1.f / float(a.width);
  a.weight = parameter_of(weight);
  a.dropout = dropout_of(Check(v), rng, dropout_p);
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

TF_CUDA_SCHEMA(m) {
  m.def("cuda_norm_forward" TF_NORM_FORWARD_SCHEMA);
  m.def("cuda_norm_backward" TF_NORM_BACKWARD_SCHEMA);
}
