// Arguments of the CUDA attention kernels: plain pointers and strides, so that bindings include no CUDA header.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "attention_call.hpp"

namespace tf::cuda {

using Stream = void*;

struct Attention : AttentionCall<int32_t, float> {
  int32_t max_seqlen_q, max_seqlen_k;  // of the longest sequence
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // unpadded: batch + 1 offsets, on the device; else null
  int64_t total_q, total_k;    // unpadded: rows of all sequences, the bound for TMA's accesses
  const int32_t* key_lengths;  // padded: keys in use per sequence, on the device; or null
  const int64_t* rng;          // {seed, offset}, on the device
  uint32_t threshold;          // of 65536: dropped below it; 0: no dropout
  float keep_scale;
};

struct AttentionForward : AttentionOutputs<Attention> {
  // (2,), zeros before and after: tiles differ in length, so a free block takes the next one. null: fixed tiles.
  int32_t* counters;
};

struct AttentionBackward : AttentionGradients<Attention> {
  float* delta;    // scratch, (B, H, Sq) or (H, total): rowsum(grad_out * out) - grad_lse
  float* scratch;  // *_scratch floats, aligned to 16 bytes; null if the kernel needs none
  bool deterministic;
};

// Thrown by a launcher, before any launch, when the driver does not take the call.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Why a kernel does not take the call (static text), or nullptr if it does.
const char* attention_forward_mma_refuses(const AttentionForward&);
const char* attention_forward_wgmma_refuses(const AttentionForward&);
const char* attention_backward_mma_refuses(const AttentionBackward&);
const char* attention_backward_wgmma_refuses(const AttentionBackward&);

void attention_forward_mma(const AttentionForward&, Stream);
bool attention_forward_wgmma_counts(const AttentionForward&);  // whether `counters` help
void attention_forward_wgmma(const AttentionForward&, Stream);
void attention_backward_mma(const AttentionBackward&, Stream);
int64_t attention_backward_mma_scratch(const AttentionBackward&);  // floats
int64_t attention_backward_wgmma_scratch(const AttentionBackward&);
void attention_backward_wgmma(const AttentionBackward&, Stream);

}  // namespace tf::cuda
