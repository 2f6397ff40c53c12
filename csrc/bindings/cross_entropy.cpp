#include "tensors.hpp"

namespace tf {
namespace {

void fill(CrossEntropy& a, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
          int64_t ignore_index, double label_smoothing, double z_loss) {
  a.dtype = dtype_of(logits);
  a.logits = read(logits);
  a.target = read<int64_t>(target);
  a.weight = read<float>(weight);
  a.rows = logits.size(0);
  a.classes = logits.size(1);
  a.logits_stride = logits.stride(0);
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.z_loss = z_loss;
}

void cross_entropy_forward(Tensor logits, Tensor target, OptionalTensor weight, int64_t ignore_index,
                           double label_smoothing, double z_loss, Tensor losses, Tensor largest, Tensor total) {
  CrossEntropyForward a{};
  fill(a, logits, target, weight, ignore_index, label_smoothing, z_loss);
  a.losses = write<float>(losses);
  a.largest = write<float>(largest);
  a.total = write<float>(total);
  kernels().cross_entropy_forward(a);
}

void cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor target, OptionalTensor weight, Tensor largest,
                            Tensor total, int64_t ignore_index, double label_smoothing, double z_loss,
                            Tensor grad) {
  CrossEntropyBackward a{};
  fill(a, logits, target, weight, ignore_index, label_smoothing, z_loss);
  a.grad_losses = read<float>(grad_losses);
  a.largest = read<float>(largest);
  a.total = read<float>(total);
  a.grad = write(grad);
  a.grad_stride = grad.stride(0);
  kernels().cross_entropy_backward(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_cross_entropy_forward", TORCH_BOX(&tf::cross_entropy_forward));
  m.impl("cpu_cross_entropy_backward", TORCH_BOX(&tf::cross_entropy_backward));
}
