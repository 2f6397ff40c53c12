#include "attention.hpp"

#include <vector>

#include "cpu/attention.hpp"

namespace tf {
namespace {

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
  std::vector<int64_t> query_starts, query_lengths, key_starts, key_lengths, key_rows;
};

void split(const std::vector<int64_t>& cu_seqlens, int64_t total, std::vector<int64_t>& starts,
           std::vector<int64_t>& lengths) {
  for (size_t b = 0; b + 1 < cu_seqlens.size(); ++b) {
    const int64_t start = cu_seqlens[b], end = cu_seqlens[b + 1];
    STD_TORCH_CHECK(0 <= start && start <= end && end <= total,
                    "transformer_fast: cu_seqlens must rise from 0 to at most ", total);
    starts.push_back(start);
    lengths.push_back(end - start);
  }
}

Sequences sequences_of(const AttentionArguments& x) {
  Sequences s;
  if (x.cu_seqlens_q.has_value()) {
    split(integers(*x.cu_seqlens_q), x.query.size(0), s.query_starts, s.query_lengths);
    split(integers(*x.cu_seqlens_k), x.key.size(0), s.key_starts, s.key_lengths);
    s.key_rows = s.key_lengths;
    return s;
  }
  const int64_t batch = x.query.size(0), keys = x.key.size(2);
  s.query_starts.assign(batch, 0);
  s.key_starts.assign(batch, 0);
  s.query_lengths.assign(batch, x.query.size(2));
  s.key_rows.assign(batch, keys);
  s.key_lengths = s.key_rows;
  if (x.key_lengths.has_value()) {
    s.key_lengths = integers(*x.key_lengths);
    for (int64_t& n : s.key_lengths) n = n < 0 ? 0 : n > keys ? keys : n;
  }
  return s;
}

// s must outlive the call.
void take_sequences(Attention& a, const AttentionArguments& x, const Sequences& s) {
  a.query_starts = s.query_starts.data();
  a.query_lengths = s.query_lengths.data();
  a.key_starts = s.key_starts.data();
  a.key_lengths = s.key_lengths.data();
  a.key_rows = s.key_rows.data();
  for (int64_t b = 0; a.relative_bias && b < a.batch; ++b)
    for (const int64_t n : {a.query_lengths[b], a.key_lengths[b]})
      STD_TORCH_CHECK(a.reach >= n + kAttentionQueries, "transformer_fast: relative_bias has distances up to ", a.reach,
                      ", wanted ", n + kAttentionQueries);
  a.dropout = philox_of(x.rng, x.dropout_p);
  if (!x.cu_seqlens_q.has_value() || (!x.bias.has_value() && !x.mask.has_value())) return;
  for (int64_t b = 0; b < a.batch; ++b)
    STD_TORCH_CHECK(a.query_lengths[b] <= x.max_seqlen_q && a.key_lengths[b] <= x.max_seqlen_k,
                    "transformer_fast: max_seqlen_q, max_seqlen_k: wanted at least ", a.query_lengths[b], " and ",
                    a.key_lengths[b], ", got ", x.max_seqlen_q, " and ", x.max_seqlen_k);
}

void forward(TF_ATTENTION_PARAMETERS, Tensor out, OptionalTensor lse) {
  const AttentionArguments x = TF_ATTENTION_ARGUMENTS;
  AttentionForward a{};
  take_arguments(a, x);
  const Sequences s = sequences_of(x);
  take_sequences(a, x, s);
  take_outputs(a, query, out, lse);
  kernels().attention_forward(a);
}

void backward(Tensor grad_out, OptionalTensor grad_lse, Tensor out, Tensor lse, TF_ATTENTION_PARAMETERS, Tensor dq,
              Tensor dk, Tensor dv, OptionalTensor dbias, OptionalTensor drelative_bias) {
  const AttentionArguments x = TF_ATTENTION_ARGUMENTS;
  AttentionBackward a{};
  take_arguments(a, x);
  const Sequences s = sequences_of(x);
  take_sequences(a, x, s);
  take_gradients(a, x, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, drelative_bias);
  if (drelative_bias.has_value())
    Checked(&*drelative_bias, "drelative_bias").shape({a.batch, a.heads, relative_bias->size(1)});
  kernels().attention_backward(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_attention_forward", TORCH_BOX(&tf::forward));
  m.impl("cpu_attention_backward", TORCH_BOX(&tf::backward));
}
