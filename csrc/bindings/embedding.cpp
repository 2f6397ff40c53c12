#include "check.hpp"

namespace tf {
namespace {

Check take(EmbeddingLayerNorm& a, const Tensor& ids, const Tensor& word, const OptionalTensor& position_ids,
           const OptionalTensor& position, const OptionalTensor& type_ids, const OptionalTensor& token_type,
           const OptionalTensor& norm_weight, const OptionalTensor& rng, double dropout_p) {
  const Check check(word);
  check(ids, "ids").shape({kAny});
  check(word, "word").shape({kAny, kAny});
  check(norm_weight, "norm_weight").dtype(ScalarType::Float).numel(word.size(1)).contiguous();
  a.dtype = dtype_of(word);
  const OptionalTensor all_ids[3] = {ids, type_ids, position_ids}, tables[3] = {word, token_type, position};
  const char *id_names[3] = {"ids", "type_ids", "position_ids"}, *names[3] = {"word", "token_type", "position"};
  for (int k = 0; k < 3; ++k) {
    check(all_ids[k], id_names[k]).dtype(ScalarType::Long).shape({ids.size(0)}).contiguous();
    check(tables[k], names[k]).dtype(word.scalar_type()).shape({kAny, word.size(1)}).unit();
    STD_TORCH_CHECK(all_ids[k].has_value() == tables[k].has_value(), "transformer_fast: ", id_names[k],
                    ": wanted together with ", names[k], ", or neither");
    if (tables[k].has_value())
      check_values(read<int64_t>(all_ids[k]), ids.size(0), tables[k]->size(0), id_names[k]);
    a.ids[k] = read<int64_t>(all_ids[k]);
    a.tables[k] = read(tables[k]);
    a.strides[k] = tables[k].has_value() ? tables[k]->stride(0) : 0;
  }
  a.norm_weight = read<float>(norm_weight);
  a.rows = ids.size(0);
  a.width = word.size(1);
  a.dropout = philox_of(rng, dropout_p);
  return check;
}

void embedding_layer_norm_forward(Tensor ids, Tensor word, OptionalTensor position_ids, OptionalTensor position,
                                  OptionalTensor type_ids, OptionalTensor token_type, OptionalTensor norm_weight,
                                  OptionalTensor norm_bias, OptionalTensor rng, double eps, double dropout_p, Tensor y,
                                  Tensor mean, Tensor rstd) {
  EmbeddingLayerNormForward a{};
  const Check check = take(a, ids, word, position_ids, position, type_ids, token_type, norm_weight, rng, dropout_p);
  check(norm_bias, "norm_bias").dtype(ScalarType::Float).numel(a.width).contiguous();
  check(y, "y").dtype(word.scalar_type()).shape({a.rows, a.width}).contiguous();
  check(mean, "mean").dtype(ScalarType::Float).shape({a.rows}).contiguous();
  check(rstd, "rstd").dtype(ScalarType::Float).shape({a.rows}).contiguous();
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
  const Check check = take(a, ids, word, position_ids, position, type_ids, token_type, norm_weight, rng, dropout_p);
  check(grad_y, "grad_y").dtype(word.scalar_type()).shape({a.rows, a.width}).contiguous();
  check(mean, "mean").dtype(ScalarType::Float).shape({a.rows}).contiguous();
  check(rstd, "rstd").dtype(ScalarType::Float).shape({a.rows}).contiguous();
  check(grad_v, "grad_v").dtype(ScalarType::Float).shape({a.rows, a.width}).contiguous();
  check(grad_weight, "grad_weight").dtype(ScalarType::Float).numel(a.width).contiguous();
  check(grad_bias, "grad_bias").dtype(ScalarType::Float).numel(a.width).contiguous();
  a.grad_y = read(grad_y);
  a.mean = read<float>(mean);
  a.rstd = read<float>(rstd);
  a.grad_v = write<float>(grad_v);
  a.grad_weight = write<float>(grad_weight);
  a.grad_bias = write<float>(grad_bias);
  kernels().embedding_layer_norm_backward(a);
}

void embedding_gradient(Tensor grad_v, Tensor ids, int64_t padding_idx, Tensor grad_table) {
  const Check check(grad_table);
  check(grad_v, "grad_v").dtype(ScalarType::Float).shape({kAny, kAny}).contiguous();
  const int64_t rows = grad_v.size(0);
  check(ids, "ids").dtype(ScalarType::Long).shape({rows}).contiguous();
  check(grad_table, "grad_table").shape({kAny, grad_v.size(1)}).contiguous();
  check_values(read<int64_t>(ids), rows, grad_table.size(0), "ids");
  STD_TORCH_CHECK(padding_idx < grad_table.size(0), "transformer_fast: padding_idx: wanted less than ",
                  grad_table.size(0), ", got ", padding_idx);
  STD_TORCH_CHECK(rows <= INT32_MAX, "transformer_fast: ids: wanted at most ", INT32_MAX, " of them, got ", rows);
  if (!grad_table.numel()) return;
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
