// The table of kernels that each instruction set provides. Arguments are plain pointers and strides
// (norm.hpp, activation.hpp, ...); strides count elements.
#pragma once
#include "activation.hpp"
#include "attention.hpp"
#include "linear.hpp"
#include "norm.hpp"

namespace tf {

struct Kernels {
  void (*norm_forward)(const NormForward&);
  void (*norm_backward)(const NormBackward&);
  void (*bias_activation_forward)(const BiasActivationForward&);
  void (*bias_activation_backward)(const BiasActivationBackward&);
  void (*dropout_forward)(const DropoutForward&);
  void (*attention_forward)(const AttentionForward&);
  void (*attention_backward)(const AttentionBackward&);
  void (*column_sum)(const ColumnSum&);
  void (*pack_weight)(const PackWeight&);
  void (*packed_linear)(const PackedLinear&);
};

#ifdef TF_ISA
namespace TF_ISA {
void norm_forward(const NormForward&);
void norm_backward(const NormBackward&);
void bias_activation_forward(const BiasActivationForward&);
void bias_activation_backward(const BiasActivationBackward&);
void dropout_forward(const DropoutForward&);
void attention_forward(const AttentionForward&);
void attention_backward(const AttentionBackward&);
void column_sum(const ColumnSum&);
void pack_weight(const PackWeight&);
void packed_linear(const PackedLinear&);
}  // namespace TF_ISA
#endif

}  // namespace tf
