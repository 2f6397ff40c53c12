#include "check.hpp"

namespace tf {
namespace {

Check take(CrossEntropy& a, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
           int64_t ignore_index, double label_smoothing, double z_loss) {
  const Check check(logits);
  check(logits, "logits").shape({kAny, kAny}).unit();
  check(target, "target").dtype(ScalarType::Long).shape({logits.size(0)}).contiguous();
  check(weight, "weight").dtype(ScalarType::Float).shape({logits.size(1)}).contiguous();
  STD_TORCH_CHECK(logits.size(1) > 0, "transformer_fast: logits: wanted at least one class, got none");
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
  for (int64_t r = 0; r < a.rows; ++r)
    STD_TORCH_CHECK((0 <= a.target[r] && a.target[r] < a.classes) || a.target[r] == ignore_index,
                    "transformer_fast: target: wanted classes in [0, ", a.classes, ") or ", ignore_index, ", got ",
                    a.target[r]);
  return check;
}

// losses, largest, total and the gradient of losses.
void check_per_row(const CrossEntropy& a, const Checked& rows) {
  rows.dtype(ScalarType::Float).shape({a.rows}).contiguous();
}

void cross_entropy_forward(Tensor logits, Tensor target, OptionalTensor weight, int64_t ignore_index,
                           double label_smoothing, double z_loss, Tensor losses, Tensor largest, Tensor total) {
  CrossEntropyForward a{};
  const Check check = take(a, logits, target, weight, ignore_index, label_smoothing, z_loss);
  check_per_row(a, check(losses, "losses"));
  check_per_row(a, check(largest, "largest"));
  check_per_row(a, check(total, "total"));
  a.losses = write<float>(losses);
  a.largest = write<float>(largest);
  a.total = write<float>(total);
  kernels().cross_entropy_forward(a);
}

void cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor target, OptionalTensor weight, Tensor largest,
                            Tensor total, int64_t ignore_index, double label_smoothing, double z_loss,
                            Tensor grad) {
  CrossEntropyBackward a{};
  const Check check = take(a, logits, target, weight, ignore_index, label_smoothing, z_loss);
  check_per_row(a, check(grad_losses, "grad_losses"));
  check_per_row(a, check(largest, "largest"));
  check_per_row(a, check(total, "total"));
  check(grad, "grad").dtype(logits.scalar_type()).shape_of(logits).unit().unshared();
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
