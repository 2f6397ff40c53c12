// Arguments that the attention kernels for the CPU and for CUDA share. Fields of AttentionSpec
// (transformer_fast/backends/specs.py) have the same names as there. Strides count elements; the last axis of every
// tensor is contiguous.
#pragma once
#include "types.hpp"

namespace tf {

// Of a (batch, heads, rows, dim) tensor. batch is 0 for an unpadded one, (rows, heads, dim).
struct RowStrides {
  int64_t batch, head, row;
};

enum class BiasType : int32_t { none, f32, bf16, f16 };

// Integer, Real: the types that a kernel computes with. CUDA's have 32 bits, to save registers.
template <class Integer, class Real>
struct AttentionCall {
  DType dtype;
  Integer batch, heads, key_heads, dim;
  const void *query, *key, *value;
  RowStrides query_strides, key_strides, value_strides;
  BiasType bias_type;
  const void* bias;         // (batch, heads, queries, keys)
  int64_t bias_strides[4];  // 0 along axes that broadcast
  const uint8_t* mask;      // the same shape; nonzero: takes part
  int64_t mask_strides[4];
  // (heads, 2 * reach + 1), the bias at distances key position - query position of -reach .. reach; or null
  const float* relative_bias;
  int64_t relative_bias_stride;
  Integer reach;
  Real scale;
  float softcap;      // 0: none
  bool bottom_right;  // the last query has the last key's position; else the first query has the first key's
  Integer window_left, window_right;  // keys from position - left to position + right; -1: unlimited; causal: right 0
};

template <class Call>
struct AttentionOutputs : Call {
  void* out;
  RowStrides out_strides;
  float* lse;  // natural logarithm; -inf where a row has nothing to attend to; or null
  int64_t lse_batch, lse_head;
};

template <class Call>
struct AttentionGradients : Call {
  const void *out, *grad_out;
  RowStrides out_strides, grad_out_strides;
  const float *lse, *grad_lse;  // grad_lse: or null
  int64_t lse_batch, lse_head, grad_lse_batch, grad_lse_head;
  void *dq, *dk, *dv;
  RowStrides dq_strides, dk_strides, dv_strides;
  float* dbias;  // shape of bias, zeros before; or null
  int64_t dbias_strides[4];
  float* drelative_bias;  // zeros before; or null. CPU: (batch, heads, 2 * reach + 1); CUDA: shape of relative_bias
};

}  // namespace tf
