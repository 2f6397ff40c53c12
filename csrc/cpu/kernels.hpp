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
#include "rotary.hpp"

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
  void (*rows_linear)(const RowsLinear&);
  void (*content_hash)(const ContentHash&);
  void (*cross_entropy_forward)(const CrossEntropyForward&);
  void (*cross_entropy_backward)(const CrossEntropyBackward&);
  void (*embedding_norm_forward)(const EmbeddingNormForward&);
  void (*embedding_norm_backward)(const EmbeddingNormBackward&);
  void (*embedding_gradient)(const EmbeddingGradient&);
  void (*decoder_step)(const DecoderStep&);
  void (*additive_attention_forward)(const AdditiveAttentionForward&);
  void (*additive_attention_backward)(const AdditiveAttentionBackward&);
  void (*rotary)(const Rotary&);
  void (*recurrence_forward)(const RecurrenceForward&);
  void (*recurrence_backward)(const RecurrenceBackward&);
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
void rows_linear(const RowsLinear&);
void content_hash(const ContentHash&);
void cross_entropy_forward(const CrossEntropyForward&);
void cross_entropy_backward(const CrossEntropyBackward&);
void embedding_norm_forward(const EmbeddingNormForward&);
void embedding_norm_backward(const EmbeddingNormBackward&);
void embedding_gradient(const EmbeddingGradient&);
void decoder_step(const DecoderStep&);
void additive_attention_forward(const AdditiveAttentionForward&);
void additive_attention_backward(const AdditiveAttentionBackward&);
void rotary(const Rotary&);
void recurrence_forward(const RecurrenceForward&);
void recurrence_backward(const RecurrenceBackward&);
}  // namespace TF_ISA
#endif

}  // namespace tf
