// Attention of a few queries on many keys (decoding), which may extend the cache of keys and values it reads.
#pragma once
#include "attention.hpp"

namespace tf::cuda {

// With new_k and new_v, k and v are the cache: query i stands at the place behind those in use where row i of new_k
// goes, and the kernel writes it there. New rows past the cache's end are dropped.
struct AttentionDecode : AttentionForward {
  const int64_t* wide_lengths;  // key_lengths as torch makes them, in their place; or null
  const void *new_k, *new_v;
  Rows new_k_rows, new_v_rows;
  int32_t splits;  // parts that the keys are cut into: attention_decode_splits
  float* partial;  // attention_decode_scratch floats; null with one split
  // Blocks that have finished, of each (tile, chunk): zeros before and after. null: another launch joins the parts.
  uint32_t* arrivals;
};

constexpr int32_t kDecodeRows = 16;  // most queries times heads that share a key head

const char* attention_decode_refuses(const AttentionDecode&);
int32_t attention_decode_splits(const AttentionDecode&);  // on the current device
int64_t attention_decode_scratch(const AttentionDecode&);
int64_t attention_decode_arrivals(const AttentionDecode&);  // counters that `arrivals` has; 0: none are wanted
void attention_decode(const AttentionDecode&, Stream);

}  // namespace tf::cuda
