// Tensors -> pointers and strides for the CUDA kernels of attention's backward.
#include "cuda.hpp"

#include "cuda/attention.hpp"

#if TF_CUDA_KERNELS
namespace tf::cuda {
namespace {

Rows rows_of(const Tensor& t) {
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, "transformer_fast: the last axis must be contiguous");
  if (t.dim() == 3) return {0, t.stride(1), t.stride(0)};
  return {t.stride(0), t.stride(1), t.stride(2)};
}

void broadcast_strides(const Tensor& t, int64_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = t.size(i) == 1 ? 0 : t.stride(i);
}

const int32_t* offsets(const OptionalTensor& t) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous(),
                  "transformer_fast: lengths must be contiguous int32");
  return read<int32_t>(*t);
}

void attention_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                        OptionalTensor bias, OptionalTensor mask, OptionalTensor key_lengths,
                        OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, OptionalTensor relative, OptionalTensor rng, double scale,
                        bool bottom_right, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
                        bool deterministic, Tensor delta, Tensor dq, Tensor dk, Tensor dv, OptionalTensor dbias,
                        OptionalTensor drelative) {
  const Device device(q);
  AttentionBackward a{};
  a.dtype = dtype_of(q);
  a.batch = int32_t(cu_seqlens_q.has_value() ? cu_seqlens_q->size(0) - 1 : q.size(0));
  a.heads = int32_t(q.size(1));
  a.key_heads = int32_t(k.size(1));
  a.dim = int32_t(q.size(-1));
  a.queries = int32_t(max_seqlen_q);
  a.keys = int32_t(max_seqlen_k);
  a.q = read(q);
  a.k = read(k);
  a.v = read(v);
  a.q_rows = rows_of(q);
  a.k_rows = rows_of(k);
  a.v_rows = rows_of(v);
  a.cu_q = offsets(cu_seqlens_q);
  a.cu_k = offsets(cu_seqlens_k);
  a.key_lengths = offsets(key_lengths);
  if (bias.has_value()) {
    const DType type = dtype_of(*bias);
    a.bias_type = type == DType::f32 ? BiasType::f32 : type == DType::bf16 ? BiasType::bf16 : BiasType::f16;
    a.bias = read(bias);
    broadcast_strides(*bias, a.bias_stride);
  }
  if (mask.has_value()) {
    a.mask = static_cast<const uint8_t*>(read(mask));
    broadcast_strides(*mask, a.mask_stride);
  }
  if (relative.has_value()) {
    a.relative = read<float>(relative);
    a.relative_stride = relative->stride(0);
    a.reach = int32_t(relative->size(1) / 2);
  }
  a.scale = float(scale);
  a.softcap = float(softcap);
  a.bottom_right = bottom_right;
  a.window_left = int32_t(window_left);
  a.window_right = int32_t(window_right);
  a.keep_scale = 1.f;
  if (rng.has_value() && dropout_p > 0) {
    a.rng = read<int64_t>(rng);
    a.threshold = uint32_t(dropout_p * 65536.0 + 0.5);
    if (a.threshold > 65535) a.threshold = 65535;
    a.keep_scale = float(65536.0 / (65536.0 - double(a.threshold)));
  }
  a.out = read(out);
  a.grad_out = read(grad_out);
  a.out_rows = rows_of(out);
  a.grad_out_rows = rows_of(grad_out);
  a.lse = read<float>(lse);
  a.lse_batch = lse.dim() == 3 ? lse.stride(0) : 0;
  a.lse_head = lse.stride(-2);
  if (grad_lse.has_value()) {
    a.grad_lse = read<float>(grad_lse);
    a.grad_lse_batch = grad_lse->dim() == 3 ? grad_lse->stride(0) : 0;
    a.grad_lse_head = grad_lse->stride(-2);
  }
  a.delta = write<float>(delta);
  a.dq = write(dq);
  a.dk = write(dk);
  a.dv = write(dv);
  a.dq_rows = rows_of(dq);
  a.dk_rows = rows_of(dk);
  a.dv_rows = rows_of(dv);
  if (dbias.has_value()) {
    a.dbias = write<float>(dbias);
    broadcast_strides(*dbias, a.dbias_stride);
  }
  a.drelative = write<float>(drelative);
  a.deterministic = deterministic;
  const char* refusal = attention_backward_mma_refuses(a);
  STD_TORCH_CHECK(refusal == nullptr, "transformer_fast: attention backward: ", refusal);
  attention_backward_mma(a, device.stream());
}

}  // namespace
}  // namespace tf::cuda

TF_CUDA_IMPL(m) { m.impl("cuda_attention_backward", TORCH_BOX(&tf::cuda::attention_backward)); }
#endif

TF_CUDA_SCHEMA(m) {
  m.def(
      "cuda_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor query, Tensor key, "
      "Tensor value, Tensor? bias, Tensor? mask, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "int max_seqlen_q, int max_seqlen_k, Tensor? relative, Tensor? rng, float scale, bool bottom_right, "
      "int window_left, int window_right, float softcap, float dropout_p, bool deterministic, Tensor(a!) delta, "
      "Tensor(b!) dq, Tensor(c!) dk, Tensor(d!) dv, Tensor(e!)? dbias, Tensor(f!)? drelative) -> ()");
}
