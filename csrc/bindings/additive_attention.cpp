#include "check.hpp"

namespace tf {
namespace {

void rows_of(const Tensor& t, int64_t (&strides)[2]) {
  strides[0] = t.stride(0);
  strides[1] = t.stride(1);
}

Check take(AdditiveAttention& a, const Tensor& query, const Tensor& key, const Tensor& value,
           const Tensor& score_weight, const OptionalTensor& bias, const OptionalTensor& mask,
           const OptionalTensor& key_lengths) {
  const Check check(query);
  check(query, "query").shape({kAny, kAny, kAny}).unit();
  const int64_t batch = query.size(0), width = query.size(2);
  check(key, "key").dtype(query.scalar_type()).shape({batch, kAny, width}).unit();
  const int64_t keys = key.size(1);
  check(value, "value").dtype(query.scalar_type()).shape({batch, keys, kAny}).unit();
  check(score_weight, "score_weight").dtype(ScalarType::Float).shape({width}).contiguous();
  check(bias, "bias").dtype(ScalarType::Float).shape({width}).contiguous();
  check(mask, "mask").dtype(ScalarType::Bool).shape({batch, query.size(1), keys});
  check(key_lengths, "key_lengths").dtype(ScalarType::Long).shape({batch}).contiguous();
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
  return check;
}

void additive_attention_forward(Tensor query, Tensor key, Tensor value, Tensor score_weight, OptionalTensor bias,
                                OptionalTensor mask, OptionalTensor key_lengths, Tensor out, Tensor weights) {
  AdditiveAttentionForward a{};
  const Check check = take(a, query, key, value, score_weight, bias, mask, key_lengths);
  check(out, "out").dtype(query.scalar_type()).shape({a.batch, a.queries, a.value_width}).contiguous();
  check(weights, "weights").dtype(ScalarType::Float).shape({a.batch, a.queries, a.keys}).contiguous();
  a.out = write(out);
  a.weights = write<float>(weights);
  kernels().additive_attention_forward(a);
}

void additive_attention_backward(Tensor grad_out, OptionalTensor grad_weights, Tensor weights, Tensor query,
                                 Tensor key, Tensor value, Tensor score_weight, OptionalTensor bias,
                                 OptionalTensor mask, OptionalTensor key_lengths, Tensor grad_query, Tensor grad_key,
                                 Tensor grad_value, Tensor grad_score_weight) {
  AdditiveAttentionBackward a{};
  const Check check = take(a, query, key, value, score_weight, bias, mask, key_lengths);
  check(grad_out, "grad_out").dtype(query.scalar_type()).shape({a.batch, a.queries, a.value_width}).contiguous();
  check(grad_weights, "grad_weights").dtype(ScalarType::Float).shape({a.batch, a.queries, a.keys}).contiguous();
  check(weights, "weights").dtype(ScalarType::Float).shape({a.batch, a.queries, a.keys}).contiguous();
  check(grad_query, "grad_query").dtype(ScalarType::Float).shape_of(query).contiguous();
  check(grad_key, "grad_key").dtype(query.scalar_type()).shape_of(key).contiguous();
  check(grad_value, "grad_value").dtype(query.scalar_type()).shape_of(value).contiguous();
  check(grad_score_weight, "grad_score_weight").dtype(ScalarType::Float).shape({a.batch, a.width}).contiguous();
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
