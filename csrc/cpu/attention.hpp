// Arguments of the CPU's attention kernels.
#pragma once
#include "attention_call.hpp"

namespace tf {

constexpr int64_t kAttentionQueries = 64;  // per tile

// relative_bias covers all distances of the call and kAttentionQueries more at both ends: tiles read whole vectors.
struct Attention : AttentionCall<int64_t, double> {
  // Sequence b: query_lengths[b] queries from row query_starts[b], key_lengths[b] keys from row key_starts[b].
  // key_rows[b] >= key_lengths[b] counts its rows with padding.
  const int64_t *query_starts, *query_lengths, *key_starts, *key_lengths, *key_rows;
  Philox dropout;
};

using AttentionForward = AttentionOutputs<Attention>;
using AttentionBackward = AttentionGradients<Attention>;

}  // namespace tf
