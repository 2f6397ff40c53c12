// Attention of a few queries on many keys (decoding). It may append to the cache of keys and values that it reads.
#pragma once
#include "attention.hpp"

namespace tf::cuda {

// With new_key and new_value, key and value are a cache: the kernel writes row i of new_key and new_value after the
// rows in use, and query i has that position. New rows past the cache's end are dropped.
struct AttentionDecode : AttentionForward {
  const int64_t* wide_lengths;  // key_lengths if they are int64, else null
  const void *new_key, *new_value;
  RowStrides new_key_strides, new_value_strides;
  int32_t splits;  // of the keys: attention_decode_splits
  float* partial;  // attention_decode_scratch floats; null with one split
  // How many blocks of each (tile, chunk) have finished: zeros before and after. null: another launch joins the parts.
  uint32_t* arrivals;
};

constexpr int32_t kDecodeRows = 16;  // at most: queries times query heads per key head

const char* attention_decode_refuses(const AttentionDecode&);
int32_t attention_decode_splits(const AttentionDecode&);  // on the current device
int64_t attention_decode_scratch(const AttentionDecode&);
int64_t attention_decode_arrivals(const AttentionDecode&);  // size of `arrivals`; 0: pass null
void attention_decode(const AttentionDecode&, Stream);

}  // namespace tf::cuda
