// Tensors -> pointers and strides of an attention call, for the CPU and for CUDA.
#pragma once
#include "attention_call.hpp"
#include "check.hpp"

namespace tf {

// Arguments of every attention op: the fields of AttentionSpec (transformer_fast/backends/specs.py) in their order. But
// relative_bias is given per distance: float32 (H, 2 * reach + 1) for distances -reach .. reach.
struct AttentionArguments {
  const Tensor &query, &key, &value;
  const OptionalTensor &bias, &mask, &key_lengths, &cu_seqlens_q, &cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  const OptionalTensor &relative_bias, &rng;
  double scale;
  int64_t bottom_right, window_left, window_right;
  double softcap, dropout_p;
};
#define TF_ATTENTION_SCHEMA_OF(KEY, VALUE)                                                                          \
  "Tensor query, " KEY " key, " VALUE                                                                              \
  " value, Tensor? bias, Tensor? mask, Tensor? key_lengths, Tensor? cu_seqlens_q, "                                 \
  "Tensor? cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, Tensor? relative_bias, Tensor? rng, float scale, "     \
  "int bottom_right, int window_left, int window_right, float softcap, float dropout_p, "
#define TF_ATTENTION_SCHEMA TF_ATTENTION_SCHEMA_OF("Tensor", "Tensor")
#define TF_ATTENTION_PARAMETERS                                                                                       \
  Tensor query, Tensor key, Tensor value, OptionalTensor bias, OptionalTensor mask, OptionalTensor key_lengths,       \
      OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,           \
      OptionalTensor relative_bias, OptionalTensor rng, double scale, int64_t bottom_right, int64_t window_left,      \
      int64_t window_right, double softcap, double dropout_p
#define TF_ATTENTION_ARGUMENTS                                                                                     \
  AttentionArguments {                                                                                             \
    query, key, value, bias, mask, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,            \
        relative_bias, rng, scale, bottom_right, window_left, window_right, softcap, dropout_p                     \
  }

// 2^30 for 32 bits, 2^40 for 64: sums of a few positions do not overflow.
template <class Integer>
constexpr int64_t kFarthest = int64_t(1) << (sizeof(Integer) == 4 ? 30 : 40);

template <class Integer>
void narrow(int64_t n, Integer& to) {
  STD_TORCH_CHECK(0 <= n && n < kFarthest<Integer>, "transformer_fast: ", n, " is too large for the kernel");
  to = Integer(n);
}
template <class Integer>
Integer window_of(int64_t n) {  // at most kFarthest, which is past every position
  return Integer(n < 0 ? -1 : n < kFarthest<Integer> ? n : kFarthest<Integer>);
}

inline RowStrides strides_of(const Tensor& t) {
  if (t.dim() == 3) return {0, t.stride(1), t.stride(0)};
  return {t.stride(0), t.stride(1), t.stride(2)};
}

inline void broadcast_strides(const Tensor& t, int64_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = t.size(i) == 1 ? 0 : t.stride(i);
}

inline BiasType bias_type_of(const Tensor& t) {
  const DType type = dtype_of(t);
  return type == DType::f32 ? BiasType::f32 : type == DType::bf16 ? BiasType::bf16 : BiasType::f16;
}

// A bias or a mask; an axis of size 1 broadcasts.
inline void check_scores(const Check& check, const Tensor& t, const char* name, int64_t batch, int64_t heads,
                         int64_t queries, int64_t keys) {
  check(t, name).shape({kAny, kAny, kAny, kAny});
  const auto fit = [&](int64_t axis, int64_t size) { return t.size(axis) == 1 ? 1 : size; };
  check(t, name).shape({fit(0, batch), fit(1, heads), fit(2, queries), fit(3, keys)});
}

// A tensor of the shape and dtype of query or key.
inline Checked check_like(const Tensor& t, const char* name, const Tensor& like) {
  return Check{like}(t, name).dtype(like.scalar_type()).shape_of(like).unit();
}

// lse and its gradient: (B, H, Sq) or, unpadded, (H, total_q).
template <class Pointer>
void take_lse(const Tensor& t, const char* name, const Tensor& query, Pointer data, Pointer& to, int64_t& batch,
              int64_t& head) {
  const Checked checked = Check{query}(t, name).dtype(ScalarType::Float).unit();
  if (query.dim() == 3)
    checked.shape({query.size(1), query.size(0)});
  else
    checked.shape({query.size(0), query.size(1), query.size(2)});
  to = data;
  batch = t.dim() == 3 ? t.stride(0) : 0;
  head = t.stride(-2);
}

// Sets every argument except the sequence lengths and dropout.
template <class Integer, class Real>
void take_arguments(AttentionCall<Integer, Real>& a, const AttentionArguments& x) {
  const bool unpadded = x.cu_seqlens_q.has_value();
  STD_TORCH_CHECK(x.query.dim() == (unpadded ? 3 : 4) && unpadded == x.cu_seqlens_k.has_value(),
                  "transformer_fast: unpadded tensors have three axes and cu_seqlens, padded ones four");
  a.dtype = dtype_of(x.query);
  const Check check(x.query);
  const Checked key = check(x.key, "key").dtype(x.query.scalar_type()).unit();
  check(x.query, "query").unit();
  if (unpadded) {
    check(x.cu_seqlens_q, "cu_seqlens_q").shape({kAny});
    check(x.cu_seqlens_k, "cu_seqlens_k").shape_of(*x.cu_seqlens_q);
    key.shape({kAny, kAny, x.query.size(2)});
  } else {
    key.shape({x.query.size(0), kAny, kAny, x.query.size(3)});
  }
  check_like(x.value, "value", x.key);
  narrow(unpadded ? x.cu_seqlens_q->size(0) - 1 : x.query.size(0), a.batch);
  narrow(x.query.size(1), a.heads);
  narrow(x.key.size(1), a.key_heads);
  narrow(x.query.size(-1), a.dim);
  STD_TORCH_CHECK(a.key_heads > 0 && a.heads % a.key_heads == 0, "transformer_fast: key: wanted a divisor of ", a.heads,
                  " heads, got ", a.key_heads);
  STD_TORCH_CHECK(0 < a.dim && a.dim <= 256, "transformer_fast: query: wanted a head dim of 1 to 256, got ", a.dim);
  check(x.key_lengths, "key_lengths").shape({a.batch});
  const int64_t queries = unpadded ? x.max_seqlen_q : x.query.size(2), keys = unpadded ? x.max_seqlen_k : x.key.size(2);
  a.query = read(x.query);
  a.key = read(x.key);
  a.value = read(x.value);
  a.query_strides = strides_of(x.query);
  a.key_strides = strides_of(x.key);
  a.value_strides = strides_of(x.value);
  if (x.bias.has_value()) {
    check_scores(check, *x.bias, "bias", a.batch, a.heads, queries, keys);
    a.bias_type = bias_type_of(*x.bias);
    a.bias = read(x.bias);
    broadcast_strides(*x.bias, a.bias_strides);
  }
  if (x.mask.has_value()) {
    check(x.mask, "mask").dtype(ScalarType::Bool);
    check_scores(check, *x.mask, "mask", a.batch, a.heads, queries, keys);
    a.mask = static_cast<const uint8_t*>(read(x.mask));
    broadcast_strides(*x.mask, a.mask_strides);
  }
  if (x.relative_bias.has_value()) {
    check(x.relative_bias, "relative_bias").dtype(ScalarType::Float).shape({a.heads, kAny}).unit();
    STD_TORCH_CHECK(x.relative_bias->size(1) % 2 == 1,
                    "transformer_fast: relative_bias must be (heads, 2 * reach + 1)");
    a.relative_bias = read<float>(x.relative_bias);
    a.relative_bias_stride = x.relative_bias->stride(0);
    narrow(x.relative_bias->size(1) / 2, a.reach);
  }
  a.scale = Real(x.scale);
  a.softcap = float(x.softcap);
  a.bottom_right = x.bottom_right != 0;
  a.window_left = window_of<Integer>(x.window_left);
  a.window_right = window_of<Integer>(x.window_right);
}

template <class Call>
void take_outputs(AttentionOutputs<Call>& a, const Tensor& query, const Tensor& out, const OptionalTensor& lse) {
  check_like(out, "out", query).unshared();
  if (lse.has_value()) Checked(&*lse, "lse").unshared();
  a.out = write(out);
  a.out_strides = strides_of(out);
  if (lse.has_value()) take_lse(*lse, "lse", query, write<float>(*lse), a.lse, a.lse_batch, a.lse_head);
}

template <class Call>
void take_gradients(AttentionGradients<Call>& a, const AttentionArguments& x, const Tensor& grad_out,
                    const OptionalTensor& grad_lse, const Tensor& out, const Tensor& lse, const Tensor& dq,
                    const Tensor& dk, const Tensor& dv, const OptionalTensor& dbias,
                    const OptionalTensor& drelative_bias) {
  check_like(out, "out", x.query);
  check_like(grad_out, "grad_out", x.query);
  check_like(dq, "dq", x.query).unshared();
  check_like(dk, "dk", x.key).unshared();
  check_like(dv, "dv", x.key).unshared();
  a.out = read(out);
  a.grad_out = read(grad_out);
  a.out_strides = strides_of(out);
  a.grad_out_strides = strides_of(grad_out);
  take_lse(lse, "lse", x.query, read<float>(lse), a.lse, a.lse_batch, a.lse_head);
  if (grad_lse.has_value())
    take_lse(*grad_lse, "grad_lse", x.query, read<float>(*grad_lse), a.grad_lse, a.grad_lse_batch, a.grad_lse_head);
  a.dq = write(dq);
  a.dk = write(dk);
  a.dv = write(dv);
  a.dq_strides = strides_of(dq);
  a.dk_strides = strides_of(dk);
  a.dv_strides = strides_of(dv);
  if (dbias.has_value()) {
    STD_TORCH_CHECK(x.bias.has_value(), "transformer_fast: dbias: wanted only with bias");
    Check{x.query}(*dbias, "dbias").dtype(ScalarType::Float).shape_of(*x.bias).contiguous();
    a.dbias = write<float>(*dbias);
    broadcast_strides(*dbias, a.dbias_strides);
  }
  if (drelative_bias.has_value()) {
    STD_TORCH_CHECK(x.relative_bias.has_value(), "transformer_fast: drelative_bias: wanted only with relative_bias");
    Check{x.query}(*drelative_bias, "drelative_bias").dtype(ScalarType::Float).contiguous();
    a.drelative_bias = write<float>(*drelative_bias);
  }
}

}  // namespace tf
