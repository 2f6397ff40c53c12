#include "tensors.hpp"

namespace tf {
namespace {

void rows_of(const Tensor& t, int64_t (&strides)[2]) {
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) <= 1, "transformer_fast: the last axis must be contiguous");
  strides[0] = t.stride(0);
  strides[1] = t.stride(1);
}

void fill(AdditiveAttention& a, const Tensor& query, const Tensor& key, const Tensor& value,
          const Tensor& score_weight, const OptionalTensor& bias, const OptionalTensor& mask,
          const OptionalTensor& key_lengths) {
  a.dtype = dtype_of(query);
  a.query = read(query);
  a.key = read(key);
  a.value = read(value);
  rows_of(query, a.query_strides);
  rows_of(key, a.key_strides);
  rows_of(value, a.value_strides);
  a.score_weight = read<float>(score_weight);
  a.bias = read<float>(bias);
  a.mask = read<bool>(mask);
  if (mask.has_value())
    for (int i = 0; i < 3; ++i) a.mask_strides[i] = mask->stride(i);
  a.key_lengths = read<int64_t>(key_lengths);
  a.batch = query.size(0);
  a.queries = query.size(1);
  a.keys = key.size(1);
  a.width = query.size(2);
  a.value_width = value.size(2);
}

void additive_attention_forward(Tensor query, Tensor key, Tensor value, Tensor score_weight, OptionalTensor bias,
                                OptionalTensor mask, OptionalTensor key_lengths, Tensor out, Tensor weights) {
  AdditiveAttentionForward a{};
  fill(a, query, key, value, score_weight, bias, mask, key_lengths);
  a.out = write(out);
  a.weights = write<float>(weights);
  kernels().additive_attention_forward(a);
}

void additive_attention_backward(Tensor grad_out, OptionalTensor grad_weights, Tensor weights, Tensor query,
                                 Tensor key, Tensor value, Tensor score_weight, OptionalTensor bias,
                                 OptionalTensor mask, OptionalTensor key_lengths, Tensor grad_query, Tensor grad_key,
                                 Tensor grad_value, Tensor grad_score_weight) {
  AdditiveAttentionBackward a{};
  fill(a, query, key, value, score_weight, bias, mask, key_lengths);
  a.grad_out = read(grad_out);
  a.grad_weights = read<float>(grad_weights);
  a.weights = read<float>(weights);
  a.grad_query = write<float>(grad_query);
  a.grad_key = write(grad_key);
  a.grad_value = write(grad_value);
  a.grad_score_weight = write<float>(grad_score_weight);
  kernels().additive_attention_backward(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_additive_attention_forward", TORCH_BOX(&tf::additive_attention_forward));
  m.impl("cpu_additive_attention_backward", TORCH_BOX(&tf::additive_attention_backward));
}
