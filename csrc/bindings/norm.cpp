#include "norm.hpp"

namespace tf {
namespace {

void norm_forward(TF_NORM_FORWARD_PARAMETERS) {
  NormForward a{};
  a.width = take_forward(a, TF_NORM_FORWARD_ARGUMENTS, ScalarType::Float).width;
  a.weight = read<float>(weight);
  a.bias = read<float>(bias);
  a.dropout = philox_of(rng, dropout_p);
  kernels().norm_forward(a);
}

void norm_backward(TF_NORM_BACKWARD_PARAMETERS) {
  NormBackward a{};
  a.width = take_backward(a, TF_NORM_BACKWARD_ARGUMENTS, ScalarType::Float).width;
  a.weight = read<float>(weight);
  a.dropout = philox_of(rng, dropout_p);
  kernels().norm_backward(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_norm_forward", TORCH_BOX(&tf::norm_forward));
  m.impl("cpu_norm_backward", TORCH_BOX(&tf::norm_backward));
}
