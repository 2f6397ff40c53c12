#include "tensors.hpp"

namespace tf {
namespace {

void fill(EmbeddingLayerNorm& a, const Tensor& ids, const Tensor& word, const OptionalTensor& position_ids,
          const OptionalTensor& position, const OptionalTensor& type_ids, const OptionalTensor& token_type,
          const OptionalTensor& norm_weight, const OptionalTensor& rng, double dropout_p) {
  a.dtype = dtype_of(word);
  const OptionalTensor all_ids[3] = {ids, type_ids, position_ids}, tables[3] = {word, token_type, position};
  for (int k = 0; k < 3; ++k) {
    a.ids[k] = read<int64_t>(all_ids[k]);
    a.tables[k] = read(tables[k]);
    a.strides[k] = tables[k].has_value() ? tables[k]->stride(0) : 0;
  }
  a.norm_weight = read<float>(norm_weight);
  a.rows = ids.size(0);
  a.width = word.size(1);
  a.dropout = philox_of(rng, dropout_p);
}

void embedding_layer_norm_forward(Tensor ids, Tensor word, OptionalTensor position_ids, OptionalTensor position,
                                  OptionalTensor type_ids, OptionalTensor token_type, OptionalTensor norm_weight,
                                  OptionalTensor norm_bias, OptionalTensor rng, double eps, double dropout_p, Tensor y,
                                  Tensor mean, Tensor rstd) {
  EmbeddingLayerNormForward a{};
  fill(a, ids, word, position_ids, position, type_ids, token_type, norm_weight, rng, dropout_p);
  a.norm_bias = read<float>(norm_bias);
  a.y = write(y);
  a.mean = write<float>(mean);
  a.rstd = write<float>(rstd);
  a.eps = float(eps);
  kernels().embedding_layer_norm_forward(a);
}

void embedding_layer_norm_backward(Tensor grad_y, Tensor ids, Tensor word, OptionalTensor position_ids,
                                   OptionalTensor position, OptionalTensor type_ids, OptionalTensor token_type,
                                   OptionalTensor norm_weight, Tensor mean, Tensor rstd, OptionalTensor rng,
                                   double dropout_p, Tensor grad_v, OptionalTensor grad_weight,
                                   OptionalTensor grad_bias) {
  EmbeddingLayerNormBackward a{};
  fill(a, ids, word, position_ids, position, type_ids, token_type, norm_weight, rng, dropout_p);
  a.grad_y = read(grad_y);
  a.mean = read<float>(mean);
  a.rstd = read<float>(rstd);
  a.grad_v = write<float>(grad_v);
  a.grad_weight = write<float>(grad_weight);
  a.grad_bias = write<float>(grad_bias);
  kernels().embedding_layer_norm_backward(a);
}

void embedding_gradient(Tensor grad_v, Tensor ids, int64_t padding_idx, Tensor grad_table) {
  EmbeddingGradient a{};
  a.dtype = dtype_of(grad_table);
  a.grad_v = read<float>(grad_v);
  a.ids = read<int64_t>(ids);
  a.grad_table = write(grad_table);
  a.rows = grad_v.size(0);
  a.width = grad_v.size(1);
  a.entries = grad_table.size(0);
  a.padding_idx = padding_idx;
  kernels().embedding_gradient(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_embedding_layer_norm_forward", TORCH_BOX(&tf::embedding_layer_norm_forward));
  m.impl("cpu_embedding_layer_norm_backward", TORCH_BOX(&tf::embedding_layer_norm_backward));
  m.impl("cpu_embedding_gradient", TORCH_BOX(&tf::embedding_gradient));
}
