// Arguments of the cross entropy kernels. With p = softmax(x), w the class weights, e the label smoothing, the
// loss of a row is (1 - e) w[y] (-log p[y]) + e / classes * sum_j w[j] (-log p[j]) + z_loss * logsumexp(x)^2.
#pragma once
#include "types.hpp"

namespace tf {

struct CrossEntropy {
  DType dtype;
  const void* logits;
  const int64_t* target;
  const float* weight;  // null: ones
  int64_t rows, classes, logits_stride, ignore_index;
  double label_smoothing, z_loss;
};

struct CrossEntropyForward : CrossEntropy {
  float *losses, *largest, *total;  // total: sum of exp(x - largest)
};

struct CrossEntropyBackward : CrossEntropy {
  const float *grad_losses, *largest, *total;
  void* grad;  // may be the logits themselves
  int64_t grad_stride;
};

}  // namespace tf
