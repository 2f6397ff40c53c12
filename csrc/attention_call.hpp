// What the arguments of the attention kernels for the CPU and for CUDA have in common. Fields that AttentionSpec
// (transformer_fast/backends/specs.py) has too are named as there. Strides count elements; the last axis of every
// tensor is contiguous.
#pragma once
#include "types.hpp"

namespace tf {

// Of a (batch, heads, rows, dim) tensor. An unpadded one, (rows, heads, dim), has batch 0.
struct RowStrides {
  int64_t batch, head, row;
};

enum class BiasType : int32_t { none, f32, bf16, f16 };

// Integer, Real: what a kernel computes with. CUDA's take 32 bits, which fit its registers better.
template <class Integer, class Real>
struct AttentionCall {
  DType dtype;
  Integer batch, heads, key_heads, dim;
  const void *query, *key, *value;
  RowStrides query_strides, key_strides, value_strides;
  BiasType bias_type;
  const void* bias;         // (batch, heads, queries, keys)
  int64_t bias_strides[4];  // 0 where it is broadcast
  const uint8_t* mask;      // likewise; nonzero: takes part
  int64_t mask_strides[4];
  // (heads, 2 * reach + 1): the bias of each head at distances key position - query position of -reach .. reach; null
  const float* relative_bias;
  int64_t relative_bias_stride;
  Integer reach;
  Real scale;
  float softcap;      // 0: none
  bool bottom_right;  // the last query stands at the last key, else the first at the first
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
  float* dbias;  // of the bias's shape, zeros before; or null
  int64_t dbias_strides[4];
  float* drelative_bias;  // zeros before; or null. CPU: (batch, heads, 2 * reach + 1), CUDA: relative_bias's shape
};

}  // namespace tf
