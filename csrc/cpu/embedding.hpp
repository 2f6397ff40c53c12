// Arguments of the embedding kernels: v = word[id] + token_type[id] + position[id]; y = dropout(layer_norm(v)).
#pragma once
#include "types.hpp"

namespace tf {

struct EmbeddingLayerNorm {
  DType dtype;
  const int64_t* ids[3];  // word, token type, position
  const void* tables[3];  // null if absent
  int64_t strides[3];     // between the rows of a table
  const float* norm_weight;  // may be null
  int64_t rows, width;
  Philox dropout;
};

struct EmbeddingLayerNormForward : EmbeddingLayerNorm {
  const float* norm_bias;  // may be null
  void* y;                 // contiguous
  float *mean, *rstd;
  float eps;
};

struct EmbeddingLayerNormBackward : EmbeddingLayerNorm {
  const void* grad_y;  // contiguous
  const float *mean, *rstd;
  float* grad_v;                   // contiguous
  float *grad_weight, *grad_bias;  // may be null
};

struct EmbeddingGradient {  // grad_table[e] = sum of grad_v[r] over rows r with ids[r] == e
  DType dtype;
  const float* grad_v;
  const int64_t* ids;
  void* grad_table;  // contiguous; every element is written
  int64_t rows, width, entries;
  int64_t padding_idx;  // the entry whose gradient is zero; negative: none
};

}  // namespace tf
