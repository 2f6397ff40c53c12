// Arguments of the attention kernels. Strides count elements; the last axis of every tensor is contiguous.
#pragma once
#include "types.hpp"

namespace tf {

struct Rows {  // (batch, head, position) strides of a tensor whose rows hold `dim` contiguous elements
  int64_t batch, head, row;
};

enum class BiasType : int32_t { none = 0, f32 = 1, bf16 = 2, f16 = 3 };

struct Attention {
  DType dtype;
  int64_t batch, heads, key_heads, dim;
  const void *q, *k, *v;
  Rows q_rows, k_rows, v_rows;
  // Sequence b: q_count[b] queries from row q_start[b], k_count[b] keys from row k_start[b]. Packed tensors have a
  // batch stride of 0. key_rows[b] >= k_count[b] counts the rows that belong to b, padding included.
  const int64_t *q_start, *q_count, *k_start, *k_count, *key_rows;
  BiasType bias_type;
  const void* bias;
  int64_t bias_stride[4];  // 0 where broadcast
  const uint8_t* mask;     // nonzero takes part
  int64_t mask_stride[4];
  // relative[h * relative_stride + relative_zero + position of query - position of key]
  const float* relative;
  int64_t relative_stride, relative_zero;
  double scale;
  float softcap;
  bool bottom_right;
  int64_t window_left, window_right;  // -1: unlimited
  Philox dropout;
};

struct AttentionForward : Attention {
  void* out;
  Rows out_rows;
  float* lse;  // may be null
  int64_t lse_batch, lse_head;
};

struct AttentionBackward : Attention {
  const void *out, *grad_out;
  Rows out_rows, grad_out_rows;
  const float *lse, *grad_lse;  // grad_lse may be null
  int64_t lse_batch, lse_head, grad_lse_batch, grad_lse_head;
  void *dq, *dk, *dv;
  Rows dq_rows, dk_rows, dv_rows;
  float* dbias;  // zero-filled, of the bias's own shape; may be null
  int64_t dbias_stride[4];
  float* drelative;  // zero-filled, laid out as `relative`; may be null
};

}  // namespace tf
