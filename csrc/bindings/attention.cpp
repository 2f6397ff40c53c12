// Tensors -> pointers and strides for attention. Arguments were checked in Python (ops/attention.py); what is looked at
// again here is what a wrong value would turn into a wild read.
#include "cpu/attention.hpp"

#include <vector>

#include "tensors.hpp"

namespace tf {
namespace {

Rows rows_of(const Tensor& t) {
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, "transformer_fast: the last axis must be contiguous");
  if (t.dim() == 3) return {0, t.stride(1), t.stride(0)};
  return {t.stride(0), t.stride(1), t.stride(2)};
}

void broadcast_strides(const Tensor& t, int64_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = t.size(i) == 1 ? 0 : t.stride(i);
}

std::vector<int64_t> integers(const Tensor& t) {
  const int64_t n = t.size(0), step = t.stride(0);
  std::vector<int64_t> values(n);
  if (t.scalar_type() == ScalarType::Int) {
    const int32_t* p = read<int32_t>(t);
    for (int64_t i = 0; i < n; ++i) values[i] = p[i * step];
  } else {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, "transformer_fast: lengths must be int32 or int64");
    const int64_t* p = read<int64_t>(t);
    for (int64_t i = 0; i < n; ++i) values[i] = p[i * step];
  }
  return values;
}

struct Sequences {
  std::vector<int64_t> q_start, q_count, k_start, k_count, key_rows;
};

void split(const std::vector<int64_t>& cu, int64_t total, std::vector<int64_t>& start, std::vector<int64_t>& count) {
  for (size_t b = 0; b + 1 < cu.size(); ++b) {
    STD_TORCH_CHECK(0 <= cu[b] && cu[b] <= cu[b + 1] && cu[b + 1] <= total,
                    "transformer_fast: cu_seqlens must rise from 0 to at most ", total);
    start.push_back(cu[b]);
    count.push_back(cu[b + 1] - cu[b]);
  }
}

Sequences sequences_of(const Tensor& q, const Tensor& k, const OptionalTensor& key_lengths,
                       const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k) {
  Sequences s;
  if (cu_seqlens_q.has_value()) {
    split(integers(*cu_seqlens_q), q.size(0), s.q_start, s.q_count);
    split(integers(*cu_seqlens_k), k.size(0), s.k_start, s.k_count);
    s.key_rows = s.k_count;
    return s;
  }
  const int64_t batch = q.size(0), keys = k.size(2);
  s.q_start.assign(batch, 0);
  s.k_start.assign(batch, 0);
  s.q_count.assign(batch, q.size(2));
  s.key_rows.assign(batch, keys);
  s.k_count = s.key_rows;
  if (key_lengths.has_value()) {
    s.k_count = integers(*key_lengths);
    for (int64_t& n : s.k_count) n = n < 0 ? 0 : n > keys ? keys : n;
  }
  return s;
}

void fill(Attention& a, const Sequences& s, const Tensor& q, const Tensor& k, const Tensor& v,
          const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& relative,
          int64_t relative_zero, const OptionalTensor& rng, double scale, bool bottom_right, int64_t window_left,
          int64_t window_right, double softcap, double dropout_p) {
  a.dtype = dtype_of(q);
  a.batch = int64_t(s.q_count.size());
  a.heads = q.size(1);
  a.key_heads = k.size(1);
  a.dim = q.size(-1);
  a.q = read(q);
  a.k = read(k);
  a.v = read(v);
  a.q_rows = rows_of(q);
  a.k_rows = rows_of(k);
  a.v_rows = rows_of(v);
  a.q_start = s.q_start.data();
  a.q_count = s.q_count.data();
  a.k_start = s.k_start.data();
  a.k_count = s.k_count.data();
  a.key_rows = s.key_rows.data();
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
    a.relative_zero = relative_zero;
  }
  a.scale = scale;
  a.softcap = float(softcap);
  a.bottom_right = bottom_right;
  // Farther than any position: sums with positions must not overflow.
  const int64_t farthest = int64_t(1) << 40;
  a.window_left = window_left < farthest ? window_left : farthest;
  a.window_right = window_right < farthest ? window_right : farthest;
  a.dropout = philox_of(rng, dropout_p);
}

}  // namespace

void cpu_attention_forward(Tensor q, Tensor k, Tensor v, OptionalTensor bias, OptionalTensor mask,
                           OptionalTensor key_lengths, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                           OptionalTensor relative, int64_t relative_zero, OptionalTensor rng, double scale,
                           bool bottom_right, int64_t window_left, int64_t window_right, double softcap,
                           double dropout_p, Tensor out, OptionalTensor lse) {
  AttentionForward a{};
  const Sequences s = sequences_of(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k);
  fill(a, s, q, k, v, bias, mask, relative, relative_zero, rng, scale, bottom_right, window_left, window_right,
       softcap, dropout_p);
  a.out = write(out);
  a.out_rows = rows_of(out);
  if (lse.has_value()) {
    a.lse = write<float>(*lse);
    a.lse_batch = lse->dim() == 3 ? lse->stride(0) : 0;
    a.lse_head = lse->stride(-2);
  }
  kernels().attention_forward(a);
}

void cpu_attention_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k,
                            Tensor v, OptionalTensor bias, OptionalTensor mask, OptionalTensor key_lengths,
                            OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor relative,
                            int64_t relative_zero, OptionalTensor rng, double scale, bool bottom_right,
                            int64_t window_left, int64_t window_right, double softcap, double dropout_p, Tensor dq,
                            Tensor dk, Tensor dv, OptionalTensor dbias, OptionalTensor drelative) {
  AttentionBackward a{};
  const Sequences s = sequences_of(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k);
  fill(a, s, q, k, v, bias, mask, relative, relative_zero, rng, scale, bottom_right, window_left, window_right,
       softcap, dropout_p);
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
  kernels().attention_backward(a);
}

}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_attention_forward", TORCH_BOX(&tf::cpu_attention_forward));
  m.impl("cpu_attention_backward", TORCH_BOX(&tf::cpu_attention_backward));
}
