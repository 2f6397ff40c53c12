// The table of kernels that each instruction set provides. Arguments are plain pointers and strides
// (norm.hpp, activation.hpp, ...); strides count elements.
#pragma once
#include "activation.hpp"
#include "additive_attention.hpp"
#include "attention.hpp"
#include "content_hash.hpp"
#include "linear.hpp"
#include "cross_entropy.hpp"
#include "decoder_step.hpp"
#include "embedding.hpp"
#include "norm.hpp"
#include "recurrence.hpp"
#include "recurrent_step.hpp"
#include "rotary.hpp"
#include "rotary_append.hpp"

namespace tf {

// Each kernel and its arguments. A new kernel is a line here, a function of that name in its own file, and a binding.
#define TF_KERNELS(X) \
  X(norm_forward, NormForward) \
  X(norm_backward, NormBackward) \
  X(bias_activation_forward, BiasActivationForward) \
  X(bias_activation_backward, BiasActivationBackward) \
  X(dropout_forward, DropoutForward) \
  X(attention_forward, AttentionForward) \
  X(attention_backward, AttentionBackward) \
  X(column_sum, ColumnSum) \
  X(to_panels, ToPanels) \
  X(linear_panel, LinearPanel) \
  X(linear_rows, LinearRows) \
  X(linear_long, LinearLong) \
  X(linear_bf16, LinearBf16) \
  X(weight_gradient, WeightGradient) \
  X(content_hash, ContentHash) \
  X(cross_entropy_forward, CrossEntropyForward) \
  X(cross_entropy_backward, CrossEntropyBackward) \
  X(embedding_layer_norm_forward, EmbeddingLayerNormForward) \
  X(embedding_layer_norm_backward, EmbeddingLayerNormBackward) \
  X(embedding_gradient, EmbeddingGradient) \
  X(decoder_step, DecoderStep) \
  X(additive_attention_forward, AdditiveAttentionForward) \
  X(additive_attention_backward, AdditiveAttentionBackward) \
  X(rotary, Rotary) \
  X(rotary_append, RotaryAppend) \
  X(recurrence_forward, RecurrenceForward) \
  X(recurrence_backward, RecurrenceBackward) \
  X(recurrent_step, RecurrentStep)

#define TF_MEMBER(name, Arguments) void (*name)(const Arguments&);
struct Kernels {
  TF_KERNELS(TF_MEMBER)
};
#undef TF_MEMBER

#ifdef TF_ISA
#define TF_FUNCTION(name, Arguments) void name(const Arguments&);
namespace TF_ISA {
TF_KERNELS(TF_FUNCTION)
}
#undef TF_FUNCTION
#endif

}  // namespace tf
