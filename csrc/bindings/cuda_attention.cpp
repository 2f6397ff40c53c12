// Tensors -> pointers and strides for attention on a GPU, and which kernel takes a call. Arguments were checked in
// Python (ops/attention.py); what is looked at again here is what a wrong value would turn into a wild read.
#include "cuda.hpp"

#if TF_CUDA_KERNELS
#include <cstdint>
#include <string>

#include "cuda/attention.hpp"
#include "cuda/attention_decode.hpp"

namespace tf::cuda {

// A build may lack some of them: wgmma is for sm_90a alone.
#define TF_OPTIONAL __attribute__((weak))
TF_OPTIONAL const char* attention_forward_wgmma_refuses(const AttentionForward&);
TF_OPTIONAL bool attention_forward_wgmma_counts(const AttentionForward&);
TF_OPTIONAL void attention_forward_wgmma(const AttentionForward&, Stream);
TF_OPTIONAL const char* attention_backward_mma_refuses(const AttentionBackward&);
TF_OPTIONAL void attention_backward_mma(const AttentionBackward&, Stream);
TF_OPTIONAL const char* attention_backward_wgmma_refuses(const AttentionBackward&);
TF_OPTIONAL int64_t attention_backward_mma_scratch(const AttentionBackward&);
TF_OPTIONAL int64_t attention_backward_wgmma_scratch(const AttentionBackward&);
TF_OPTIONAL void attention_backward_wgmma(const AttentionBackward&, Stream);

namespace {

template <class Call>
struct Kernel {
  const char* (*refuses)(const Call&);
  void (*run)(const Call&, Stream);
  int64_t (*scratch)(const Call&) = nullptr;  // floats, where the kernel wants some
};

// launch(kernel) with the first that takes the call; an error with every reason when none does.
template <class Call, size_t N, class Launch>
void launch_first(const Kernel<Call> (&kernels)[N], const Call& call, const char* what, Launch&& launch) {
  std::string reasons;
  const auto add = [&](const std::string& reason) { reasons += (reasons.empty() ? "" : "; ") + reason; };
  for (const Kernel<Call>& kernel : kernels) {
    if (!kernel.refuses) continue;
    if (const char* reason = kernel.refuses(call)) {
      add(reason);
      continue;
    }
    try {
      return launch(kernel);
    } catch (const Refused& reason) {
      add(reason.what());
    }
  }
  STD_TORCH_CHECK(false, "transformer_fast: no CUDA kernel of attention ", what,
                  " takes this call: ", reasons.empty() ? std::string("none was compiled") : reasons);
}

int32_t narrow(int64_t n) {
  STD_TORCH_CHECK(0 <= n && n < INT64_C(1) << 30, "transformer_fast: ", n, " is past what a CUDA kernel counts to");
  return int32_t(n);
}

Rows rows_of(const Tensor& t) {
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, "transformer_fast: the last axis must be contiguous");
  if (t.dim() == 3) return {0, t.stride(1), t.stride(0)};
  return {t.stride(0), t.stride(1), t.stride(2)};
}

void broadcast_strides(const Tensor& t, int64_t* out) {
  STD_TORCH_CHECK(t.dim() == 4, "transformer_fast: biases and masks must have four axes");
  for (int i = 0; i < 4; ++i) out[i] = t.size(i) == 1 ? 0 : t.stride(i);
}

const int32_t* integers(const OptionalTensor& t, int64_t count) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->dim() == 1 && t->size(0) == count && t->is_contiguous(),
                  "transformer_fast: lengths must be a contiguous int32 vector of ", count);
  return read<int32_t>(t);
}

BiasType bias_type_of(const Tensor& t) {
  const DType type = dtype_of(t);
  return type == DType::f32 ? BiasType::f32 : type == DType::bf16 ? BiasType::bf16 : BiasType::f16;
}

const float* float_rows(const Tensor& t, const char* name) {  // of (B, H, Sq), (H, total) or (H, n), last stride 1
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && (t.stride(-1) == 1 || t.size(-1) == 1),
                  "transformer_fast: ", name, " must be float32 and its last axis contiguous");
  return read<float>(t);
}
int64_t batch_stride(const Tensor& t) { return t.dim() == 3 ? t.stride(0) : 0; }

void fill(Attention& a, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
          const OptionalTensor& mask, const OptionalTensor& key_lengths, const OptionalTensor& cu_seqlens_q,
          const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
          const OptionalTensor& relative, const OptionalTensor& rng, double scale, bool bottom_right,
          int64_t window_left, int64_t window_right, double softcap, int64_t threshold) {
  const bool packed = cu_seqlens_q.has_value();
  STD_TORCH_CHECK(q.dim() == (packed ? 3 : 4) && packed == cu_seqlens_k.has_value(),
                  "transformer_fast: packed tensors have three axes and cu_seqlens, padded ones four");
  a.dtype = dtype_of(q);
  a.batch = narrow(packed ? cu_seqlens_q->size(0) - 1 : q.size(0));
  a.heads = narrow(q.size(1));
  a.key_heads = narrow(k.size(1));
  a.dim = narrow(q.size(-1));
  a.queries = narrow(packed ? max_seqlen_q : q.size(2));
  a.keys = narrow(packed ? max_seqlen_k : k.size(2));
  STD_TORCH_CHECK(a.key_heads > 0 && a.heads % a.key_heads == 0 && k.size(-1) == a.dim && v.size(-1) == a.dim,
                  "transformer_fast: query, key and value do not fit each other");
  a.q = read(q);
  a.k = read(k);
  a.v = read(v);
  a.q_rows = rows_of(q);
  a.k_rows = rows_of(k);
  a.v_rows = rows_of(v);
  a.total_q = packed ? q.size(0) : 0;
  a.total_k = packed ? k.size(0) : 0;
  a.cu_q = integers(cu_seqlens_q, a.batch + 1);
  a.cu_k = integers(cu_seqlens_k, a.batch + 1);
  a.key_lengths = integers(key_lengths, a.batch);
  if (bias.has_value()) {
    a.bias_type = bias_type_of(*bias);
    a.bias = read(bias);
    broadcast_strides(*bias, a.bias_stride);
  }
  if (mask.has_value()) {
    a.mask = static_cast<const uint8_t*>(read(mask));
    broadcast_strides(*mask, a.mask_stride);
  }
  if (relative.has_value()) {
    STD_TORCH_CHECK(relative->size(0) == a.heads && relative->size(1) % 2 == 1,
                    "transformer_fast: relative must be (heads, 2 * reach + 1)");
    a.relative = float_rows(*relative, "relative");
    a.relative_stride = relative->stride(0);
    a.reach = narrow(relative->size(1) / 2);
  }
  const int64_t unlimited = INT64_C(1) << 30;  // a window this wide has no effect, and sums with it fit 32 bits
  a.scale = float(scale);
  a.softcap = float(softcap);
  a.bottom_right = bottom_right;
  a.window_left = int32_t(window_left < unlimited ? window_left : unlimited);
  a.window_right = int32_t(window_right < unlimited ? window_right : unlimited);
  a.keep_scale = 1.f;
  if (threshold > 0) {
    STD_TORCH_CHECK(rng.has_value() && rng->scalar_type() == ScalarType::Long && rng->numel() == 2 &&
                        rng->is_contiguous() && threshold < 65536,
                    "transformer_fast: rng must be {seed, offset} in int64, the threshold below 65536");
    a.rng = read<int64_t>(rng);
    a.threshold = uint32_t(threshold);
    a.keep_scale = float(65536.0 / double(65536 - threshold));
  }
}

void attention_forward(Tensor q, Tensor k, Tensor v, OptionalTensor bias, OptionalTensor mask,
                       OptionalTensor key_lengths, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                       int64_t max_seqlen_q, int64_t max_seqlen_k, OptionalTensor relative, OptionalTensor rng,
                       double scale, bool bottom_right, int64_t window_left, int64_t window_right, double softcap,
                       int64_t threshold, Tensor out, OptionalTensor lse) {
  static const Kernel<AttentionForward> kernels[] = {
      {attention_forward_wgmma_refuses, attention_forward_wgmma},
      {attention_forward_mma_refuses, attention_forward_mma},
  };
  Device device(q);
  AttentionForward a{};
  fill(a, q, k, v, bias, mask, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, relative, rng,
       scale, bottom_right, window_left, window_right, softcap, threshold);
  a.out = write(out);
  a.out_rows = rows_of(out);
  if (lse.has_value()) {
    float_rows(*lse, "lse");
    a.lse = write<float>(*lse);
    a.lse_batch = batch_stride(*lse);
    a.lse_head = lse->stride(-2);
  }
  launch_first(kernels, a, "forward", [&](const Kernel<AttentionForward>& kernel) {
    const bool counts = kernel.run == attention_forward_wgmma && attention_forward_wgmma_counts(a);
    a.counters = counts ? counters_of(q, device) : nullptr;
    kernel.run(a, device.stream());
  });
}

Rows new_rows(const OptionalTensor& t, const Attention& a) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(t->dim() == 4 && t->size(0) == a.batch && t->size(1) == a.key_heads && t->size(2) == a.queries &&
                      t->size(3) == a.dim && dtype_of(*t) == a.dtype,
                  "transformer_fast: new keys and values must be as the queries, with the cache's heads");
  return rows_of(*t);
}

void attention_decode_op(Tensor q, Tensor k, Tensor v, OptionalTensor new_k, OptionalTensor new_v, OptionalTensor bias,
                         OptionalTensor mask, OptionalTensor key_lengths, OptionalTensor cu_seqlens_q,
                         OptionalTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                         OptionalTensor relative, double scale, bool bottom_right, int64_t window_left,
                         int64_t window_right, double softcap, Tensor out, Tensor lse) {
  Device device(q);
  AttentionDecode a{};
  const bool wide = key_lengths.has_value() && key_lengths->scalar_type() == ScalarType::Long;
  fill(a, q, k, v, bias, mask, wide ? OptionalTensor() : key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
       max_seqlen_k, relative, OptionalTensor(), scale, bottom_right, window_left, window_right, softcap, 0);
  a.out = write(out);
  a.out_rows = rows_of(out);
  float_rows(lse, "lse");
  a.lse = write<float>(lse);
  a.lse_batch = batch_stride(lse);
  a.lse_head = lse.stride(-2);
  if (wide) {
    STD_TORCH_CHECK(key_lengths->dim() == 1 && key_lengths->size(0) == a.batch && key_lengths->is_contiguous(),
                    "transformer_fast: lengths must be a contiguous vector of ", a.batch);
    a.wide_lengths = read<int64_t>(key_lengths);
  }
  if (new_k.has_value()) {
    STD_TORCH_CHECK(new_v.has_value() && key_lengths.has_value(),
                    "transformer_fast: new keys want new values and key_lengths");
    write(k);  // the kernel extends them
    write(v);
    a.new_k = read(new_k);
    a.new_v = read(new_v);
    a.new_k_rows = new_rows(new_k, a);
    a.new_v_rows = new_rows(new_v, a);
  }
  const char* reason = attention_decode_refuses(a);
  STD_TORCH_CHECK(!reason,
                  "transformer_fast: the CUDA decoding kernel does not take this call: ", reason ? reason : "");
  a.splits = attention_decode_splits(a);
  OptionalTensor partial;
  if (const int64_t floats = attention_decode_scratch(a)) {
    partial = new_scratch(lse, {floats}, ScalarType::Float);
    a.partial = write<float>(*partial);
  }
  const int64_t arrivals = attention_decode_arrivals(a);
  if (0 < arrivals && arrivals <= kCounters) {
    a.arrivals = reinterpret_cast<uint32_t*>(counters_of(q, device));
  }
  attention_decode(a, device.stream());
}

void attention_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                        OptionalTensor bias, OptionalTensor mask, OptionalTensor key_lengths,
                        OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, OptionalTensor relative, OptionalTensor rng, double scale,
                        bool bottom_right, int64_t window_left, int64_t window_right, double softcap,
                        int64_t threshold, bool deterministic, Tensor delta, Tensor dq, Tensor dk, Tensor dv,
                        OptionalTensor dbias, OptionalTensor drelative) {
  static const Kernel<AttentionBackward> kernels[] = {
      {attention_backward_wgmma_refuses, attention_backward_wgmma, attention_backward_wgmma_scratch},
      {attention_backward_mma_refuses, attention_backward_mma, attention_backward_mma_scratch},
  };
  Device device(q);
  AttentionBackward a{};
  fill(a, q, k, v, bias, mask, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, relative, rng,
       scale, bottom_right, window_left, window_right, softcap, threshold);
  a.out = read(out);
  a.grad_out = read(grad_out);
  a.out_rows = rows_of(out);
  a.grad_out_rows = rows_of(grad_out);
  a.lse = float_rows(lse, "lse");
  a.lse_batch = batch_stride(lse);
  a.lse_head = lse.stride(-2);
  if (grad_lse.has_value()) {
    a.grad_lse = float_rows(*grad_lse, "grad_lse");
    a.grad_lse_batch = batch_stride(*grad_lse);
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
    a.dbias = write<float>(*dbias);
    broadcast_strides(*dbias, a.dbias_stride);
  }
  if (drelative.has_value()) {
    STD_TORCH_CHECK(relative.has_value() && drelative->is_contiguous() && drelative->numel() == relative->numel(),
                    "transformer_fast: drelative must be contiguous, of relative's shape");
    a.drelative = write<float>(*drelative);
  }
  a.deterministic = deterministic;
  launch_first(kernels, a, "backward", [&](const Kernel<AttentionBackward>& kernel) {
    OptionalTensor scratch;
    const int64_t floats = kernel.scratch ? kernel.scratch(a) : 0;
    if (floats) scratch = new_scratch(q, {floats}, ScalarType::Float);
    a.scratch = floats ? write<float>(*scratch) : nullptr;
    kernel.run(a, device.stream());
  });
}

}  // namespace
}  // namespace tf::cuda

TF_CUDA_IMPL(m) {
  m.impl("cuda_attention_forward", TORCH_BOX(&tf::cuda::attention_forward));
  m.impl("cuda_attention_decode", TORCH_BOX(&tf::cuda::attention_decode_op));
  m.impl("cuda_attention_backward", TORCH_BOX(&tf::cuda::attention_backward));
}
#endif

// query, key, value, out and their gradients: (B, H, S, D) or, with cu_seqlens, (total, H, D); last stride 1. bias,
// mask: 4-D. key_lengths, cu_seqlens: int32. relative: float32 (H, 2 * reach + 1), the bias at distances -reach ..
// reach, and beyond at its ends. rng: int64 {seed, offset}. threshold: of 65536, dropout; 0 for none. lse, grad_lse,
// delta: float32 (B, H, Sq) or (H, total_q). delta: scratch. dbias: float32, zeros, of bias's shape. drelative: float32,
// zeros, of relative's shape.
#define TF_ATTENTION                                                                                                \
  "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? key_lengths, Tensor? cu_seqlens_q, " \
  "Tensor? cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, Tensor? relative, Tensor? rng, float scale, "          \
  "bool bottom_right, int window_left, int window_right, float softcap, int threshold, "
TF_CUDA_SCHEMA(m) {
  m.def("cuda_attention_forward(" TF_ATTENTION "Tensor(a!) out, Tensor(b!)? lse) -> ()");
  // With new_key and new_value key and value are a cache, changed in place: row key_lengths[b] + i gets new row i, and
  // query i stands there. key_lengths: int32 or int64.
  m.def(
      "cuda_attention_decode(Tensor query, Tensor(a!) key, Tensor(b!) value, Tensor? new_key, Tensor? new_value, "
      "Tensor? bias, Tensor? mask, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_seqlen_q, "
      "int max_seqlen_k, Tensor? relative, float scale, bool bottom_right, int window_left, int window_right, "
      "float softcap, Tensor(c!) out, Tensor(d!) lse) -> ()");
  m.def("cuda_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, " TF_ATTENTION
        "bool deterministic, Tensor(a!) delta, Tensor(b!) dq, Tensor(c!) dk, Tensor(d!) dv, "
        "Tensor(e!)? dbias, Tensor(f!)? drelative) -> ()");
}
