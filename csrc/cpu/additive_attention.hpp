// Arguments of additive attention: s_ij = v . tanh(q_i + k_j + b), w = softmax_j(s), out_i = sum_j w_ij value_j.
#pragma once
#include "types.hpp"

namespace tf {

struct AdditiveAttention {
  DType dtype;  // of query, key, value, out and their gradients
  const void *query, *key, *value;
  int64_t query_strides[2], key_strides[2], value_strides[2];  // between sequences, between positions
  const float *score_weight, *bias;                            // (width,); bias may be null
  const bool* mask;                                            // may be null; true: takes part
  int64_t mask_strides[3];
  const int64_t* key_lengths;  // (batch,), may be null
  int64_t batch, queries, keys, width, value_width;
};

struct AdditiveAttentionForward : AdditiveAttention {
  void* out;       // all results are contiguous
  float* weights;  // (batch, queries, keys)
};

struct AdditiveAttentionBackward : AdditiveAttention {
  const void* grad_out;       // contiguous
  const float* grad_weights;  // contiguous, may be null
  const float* weights;
  float* grad_query;  // (batch, queries, width)
  void *grad_key, *grad_value;
  float* grad_score_weight;  // (batch, width): one part per sequence
};

}  // namespace tf
