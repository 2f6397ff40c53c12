// Compiled once per instruction set: the kernels of this one.
#include "kernels.hpp"

#define TF_CONCAT_(a, b) a##b
#define TF_CONCAT(a, b) TF_CONCAT_(a, b)

namespace tf {
extern const Kernels TF_CONCAT(kernels_, TF_ISA);
const Kernels TF_CONCAT(kernels_, TF_ISA) = {
    TF_ISA::norm_forward,
    TF_ISA::norm_backward,
    TF_ISA::bias_activation_forward,
    TF_ISA::bias_activation_backward,
    TF_ISA::dropout_forward,
    TF_ISA::attention_forward,
    TF_ISA::attention_backward,
    TF_ISA::column_sum,
    TF_ISA::pack_weight,
    TF_ISA::packed_linear,
    TF_ISA::rows_linear,
    TF_ISA::content_hash,
    TF_ISA::cross_entropy_forward,
    TF_ISA::cross_entropy_backward,
    TF_ISA::embedding_norm_forward,
    TF_ISA::embedding_norm_backward,
    TF_ISA::embedding_gradient,
    TF_ISA::decoder_step,
    TF_ISA::additive_attention_forward,
    TF_ISA::additive_attention_backward,
    TF_ISA::rotary,
    TF_ISA::recurrence_forward,
    TF_ISA::recurrence_backward,
};
}  // namespace tf
