// Attention on a GPU: sequence lengths, and which kernel takes a call.
#include "attention.hpp"
#include "cuda.hpp"

#if TF_CUDA_KERNELS
#include <cstdint>
#include <string>

#include "cuda/attention.hpp"
#include "cuda/attention_decode.hpp"

namespace tf::cuda {

// Weak, as a build may lack some of them: wgmma is only for sm_90a.
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
  int64_t (*scratch)(const Call&) = nullptr;  // floats; null if the kernel needs none
};

// Calls launch(kernel) with the first kernel that takes the call; throws every kernel's reason when none does.
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

const int32_t* integers(const OptionalTensor& t, int64_t count) {
  if (!t.has_value()) return nullptr;
  Checked(&*t, "lengths").dtype(ScalarType::Int).shape({count}).contiguous();
  return read<int32_t>(t);
}

void take_call(Attention& a, const AttentionArguments& x) {
  take_arguments(a, x);
  const bool unpadded = x.cu_seqlens_q.has_value();
  narrow(unpadded ? x.max_seqlen_q : x.query.size(2), a.max_seqlen_q);
  narrow(unpadded ? x.max_seqlen_k : x.key.size(2), a.max_seqlen_k);
  a.total_q = unpadded ? x.query.size(0) : 0;
  a.total_k = unpadded ? x.key.size(0) : 0;
  a.cu_seqlens_q = integers(x.cu_seqlens_q, a.batch + 1);
  a.cu_seqlens_k = integers(x.cu_seqlens_k, a.batch + 1);
  a.key_lengths = integers(x.key_lengths, a.batch);
  a.keep_scale = 1.f;
  if (x.dropout_p > 0.) {
    STD_TORCH_CHECK(x.rng.has_value(), "transformer_fast: rng: wanted with dropout_p, got none");
    Check{x.query}(x.rng, "rng").dtype(ScalarType::Long).numel(2).contiguous();
    a.rng = read<int64_t>(x.rng);
    a.threshold = dropout_threshold(x.dropout_p);
    a.keep_scale = keep_scale_of(a.threshold);
  }
}

void attention_forward(TF_ATTENTION_PARAMETERS, Tensor out, OptionalTensor lse) {
  static const Kernel<AttentionForward> kernels[] = {
      {attention_forward_wgmma_refuses, attention_forward_wgmma},
      {attention_forward_mma_refuses, attention_forward_mma},
  };
  Device device(query);
  check_some(query, "query");
  AttentionForward a{};
  take_call(a, TF_ATTENTION_ARGUMENTS);
  take_outputs(a, query, out, lse);
  launch_first(kernels, a, "forward", [&](const Kernel<AttentionForward>& kernel) {
    const bool counts = kernel.run == attention_forward_wgmma && attention_forward_wgmma_counts(a);
    a.counters = counts ? counters_of(query, device) : nullptr;
    kernel.run(a, device.stream());
  });
}

RowStrides new_strides(const Tensor& t, const char* name, const Attention& a, const Tensor& query) {
  const Checked checked = Check{query}(t, name).dtype(query.scalar_type()).unit();
  checked.shape({a.batch, a.key_heads, a.max_seqlen_q, a.dim});
  return strides_of(t);
}

void attention_decode_op(TF_ATTENTION_PARAMETERS, OptionalTensor new_key, OptionalTensor new_value, Tensor out,
                         Tensor lse) {
  Device device(query);
  check_some(query, "query");
  AttentionDecode a{};
  const bool wide = key_lengths.has_value() && key_lengths->scalar_type() == ScalarType::Long;
  const OptionalTensor all_lengths = key_lengths;
  if (wide) key_lengths.reset();
  take_call(a, TF_ATTENTION_ARGUMENTS);
  take_outputs(a, query, out, lse);
  if (wide) {
    Check{query}(all_lengths, "key_lengths").shape({a.batch}).contiguous();
    a.wide_lengths = read<int64_t>(all_lengths);
  }
  if (new_key.has_value()) {
    STD_TORCH_CHECK(new_value.has_value() && all_lengths.has_value(),
                    "transformer_fast: new keys need new values and key_lengths");
    write(key);  // the kernel appends to both
    write(value);
    a.new_key = read(new_key);
    a.new_value = read(new_value);
    a.new_key_strides = new_strides(*new_key, "new_key", a, query);
    a.new_value_strides = new_strides(*new_value, "new_value", a, query);
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
    a.arrivals = reinterpret_cast<uint32_t*>(counters_of(query, device));
  }
  attention_decode(a, device.stream());
}

void attention_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor out, Tensor lse, TF_ATTENTION_PARAMETERS,
                        bool deterministic, Tensor delta, Tensor dq, Tensor dk, Tensor dv, OptionalTensor dbias,
                        OptionalTensor drelative_bias) {
  static const Kernel<AttentionBackward> kernels[] = {
      {attention_backward_wgmma_refuses, attention_backward_wgmma, attention_backward_wgmma_scratch},
      {attention_backward_mma_refuses, attention_backward_mma, attention_backward_mma_scratch},
  };
  Device device(query);
  check_some(query, "query");
  check_some(key, "key");
  AttentionBackward a{};
  const AttentionArguments x = TF_ATTENTION_ARGUMENTS;
  take_call(a, x);
  take_gradients(a, x, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, drelative_bias);
  if (drelative_bias.has_value()) Checked(&*drelative_bias, "drelative_bias").shape_of(*relative_bias);
  Check{query}(delta, "delta").dtype(ScalarType::Float).shape_of(lse).contiguous();
  a.delta = write<float>(delta);
  a.deterministic = deterministic;
  launch_first(kernels, a, "backward", [&](const Kernel<AttentionBackward>& kernel) {
    OptionalTensor scratch;
    const int64_t floats = kernel.scratch ? kernel.scratch(a) : 0;
    if (floats) scratch = new_scratch(query, {floats}, ScalarType::Float);
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

// query, key, value, out and their gradients: (B, H, S, D) or, unpadded, (total, H, D); last stride 1. bias, mask: 4-D.
// key_lengths, cu_seqlens: int32, contiguous. relative_bias: farther keys take the value at the end. rng: int64 {seed,
// offset}, on the device. lse, grad_lse, delta: float32 (B, H, Sq) or (H, total_q); delta: scratch. dbias,
// drelative_bias: float32 zeros, shapes of bias and relative_bias.
TF_CUDA_SCHEMA(m) {
  m.def("cuda_attention_forward(" TF_ATTENTION_SCHEMA "Tensor(a!) out, Tensor(b!)? lse) -> ()");
  // With new_key and new_value, key and value are a cache, changed in place: row key_lengths[b] + i becomes new row i,
  // and query i has its position. key_lengths: int32 or int64.
  m.def("cuda_attention_decode(" TF_ATTENTION_SCHEMA_OF("Tensor(a!)", "Tensor(b!)")
        "Tensor? new_key, Tensor? new_value, Tensor(c!) out, Tensor(d!) lse) -> ()");
  m.def("cuda_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, " TF_ATTENTION_SCHEMA
        "bool deterministic, Tensor(a!) delta, Tensor(b!) dq, Tensor(c!) dk, Tensor(d!) dv, "
        "Tensor(e!)? dbias, Tensor(f!)? drelative_bias) -> ()");
}
