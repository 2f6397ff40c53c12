// Arguments of the CUDA attention kernels: plain pointers and strides, for bindings that no CUDA header reaches.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "attention_call.hpp"

namespace tf::cuda {

using Stream = void*;

struct Attention : AttentionCall<int32_t, float> {
  int32_t max_seqlen_q, max_seqlen_k;  // of the longest sequence
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // unpadded: batch + 1 offsets, on the device; else null
  int64_t total_q, total_k;    // unpadded: rows of all sequences, which bounds what TMA may touch
  const int32_t* key_lengths;  // padded: keys in use of each sequence, on the device; or null
  const int64_t* rng;          // {seed, offset}, on the device
  uint32_t threshold;          // of 65536, dropped below it; 0: no dropout
  float keep_scale;
};

struct AttentionForward : AttentionOutputs<Attention> {
  // Two, zeros before and after: free blocks take the next tile, as tiles differ in length. null: each has its own.
  int32_t* counters;
};

struct AttentionBackward : AttentionGradients<Attention> {
  float* delta;    // scratch, (B, H, Sq) or (H, total): rowsum(grad_out * out) - grad_lse
  float* scratch;  // as many floats as the kernel's *_scratch says, aligned to 16 bytes; null without one
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
