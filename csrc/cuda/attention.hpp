// Arguments of the CUDA attention kernels: plain pointers and strides, for bindings that no CUDA header reaches.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "../cpu/types.hpp"

namespace tf::cuda {

using Stream = void*;

struct Rows {  // strides in elements; the last axis is contiguous; packed tensors have batch 0
  int64_t batch, head, row;
};

enum class BiasType : int32_t { none, f32, bf16, f16 };

struct Attention {
  DType dtype;
  int32_t batch, heads, key_heads, dim, queries, keys;  // queries, keys: of the longest sequence
  const void *q, *k, *v;
  Rows q_rows, k_rows, v_rows;
  const int32_t *cu_q, *cu_k;  // packed: batch + 1 offsets, on the device; else null
  int64_t total_q, total_k;    // packed: rows of all sequences, which bounds what TMA may touch
  const int32_t* key_lengths;  // padded: keys in use of each sequence, on the device; or null
  BiasType bias_type;
  const void* bias;
  int64_t bias_stride[4];  // b, h, i, j; 0 where broadcast
  const uint8_t* mask;     // nonzero takes part
  int64_t mask_stride[4];
  // (heads, 2 * reach + 1): the bias at distance clamp(key - query position, -reach, reach) + reach
  const float* relative;
  int64_t relative_stride;
  int32_t reach;
  float scale, softcap;  // softcap 0: none
  bool bottom_right;     // the last query stands at the last key, instead of the first at the first
  int32_t window_left, window_right;  // keys from position - left to position + right; -1: unlimited; causal: right 0
  const int64_t* rng;                 // device {seed, offset}
  uint32_t threshold;                 // of 65536, dropped below it; 0: no dropout
  float keep_scale;
};

struct AttentionForward : Attention {
  void* out;
  Rows out_rows;
  float* lse;  // natural logarithm; -inf where a row has nothing to attend to; or null
  int64_t lse_batch, lse_head;
  // Two, zeros before and after: tiles of unequal length go to whichever block is free. null: each block has its own.
  int32_t* counters;
};

struct AttentionBackward : Attention {
  const void *out, *grad_out;
  Rows out_rows, grad_out_rows;
  const float *lse, *grad_lse;  // grad_lse: or null
  int64_t lse_batch, lse_head, grad_lse_batch, grad_lse_head;
  float* delta;  // scratch, (B, H, Sq) or (H, total): rowsum(grad_out * out) - grad_lse
  void *dq, *dk, *dv;
  Rows dq_rows, dk_rows, dv_rows;
  float* scratch;         // as many floats as the kernel's *_scratch says, aligned to 16 bytes; null without one
  float* dbias;           // zeros before; or null
  int64_t dbias_stride[4];
  float* drelative;       // (heads, 2 * reach + 1), zeros before; or null
  bool deterministic;
};

// What a launcher throws, before it has launched anything, where the driver does not take the call.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Why a kernel does not take the call (static text), or nullptr: it does.
const char* attention_forward_mma_refuses(const AttentionForward&);
const char* attention_forward_wgmma_refuses(const AttentionForward&);
const char* attention_backward_mma_refuses(const AttentionBackward&);
const char* attention_backward_wgmma_refuses(const AttentionBackward&);

void attention_forward_mma(const AttentionForward&, Stream);
bool attention_forward_wgmma_counts(const AttentionForward&);  // whether `counters` are of use
void attention_forward_wgmma(const AttentionForward&, Stream);
void attention_backward_mma(const AttentionBackward&, Stream);
int64_t attention_backward_mma_scratch(const AttentionBackward&);  // floats
int64_t attention_backward_wgmma_scratch(const AttentionBackward&);
void attention_backward_wgmma(const AttentionBackward&, Stream);

}  // namespace tf::cuda
