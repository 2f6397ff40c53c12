// Arguments of one decoding step: one token per row through a whole decoder, with caches that are written in place.
#pragma once
#include "step_weight.hpp"
#include "team.hpp"

namespace tf {

struct StepNorm {  // absent when eps is negative
  const float *weight, *bias;
  float eps;
  bool rms;
};

struct DecoderLayer {
  StepNorm attention_norm, cross_norm, output_norm;
  StepNorm query_norm, key_norm;                       // per head
  StepNorm attention_after_norm, output_after_norm;    // of the sublayer's output, before it is added to the residual
  StepWeight qkv[3];  // outputs side by side; an absent weight's rows are part of the weight before it
  StepWeight attention_output, cross_query, cross_output, up, gate, down;
  float scale, cross_scale;               // of the scores
  int64_t window;                         // keys that a query sees, its own included; 0: all
  const float* relative;  // (heads, relative_count): bias per distance, the last for all beyond; may be null
  int64_t relative_count;
  void *keys, *values;                    // (cache rows, key heads, capacity, head_dim)
  void *cross_keys, *cross_values;        // (sources, heads, cross_capacity, head_dim); null without cross-attention
};

constexpr int64_t kLayerPhases = 24, kStackPhases = 5;  // at most

// Its layers follow it in memory; bindings/decoder_step.cpp fills it.
struct DecoderPlan {
  int64_t layers, width, heads, key_heads, head_dim, feed_forward, rows;  // rows: at most
  bool pre_norm;
  bool parallel;                 // x + attention(norm(x)) + feed_forward(output norm(x))
  bool qkv_by_head;              // qkv is (heads, 3, head_dim); else all queries, then all keys, then all values
  float softcap, logits_softcap;  // s tanh(scores / s); 0: none
  const float *cos, *sin;        // (rotary_positions, rotary_half), see rotary.hpp; null without rotary positions
  int64_t rotary_half, rotary_positions;
  bool rotary_interleaved;
  Activation activation;
  DType embedding_dtype, cache_dtype;
  const void *token, *position;  // (entries, width); position may be null
  int64_t tokens, positions;     // entries of the two tables
  float embed_scale;             // of the token embedding
  StepNorm embedding_norm, final_norm;
  StepWeight head;
  float head_scale;
  int64_t capacity, cross_capacity;
  int64_t weight_bytes;
  int64_t split_room;      // floats per row for split_floats()
  float* workspace;        // the buffers of all rows (decoder_step.cpp), then split_room floats per row
  PhaseCounter* counters;  // kLayerPhases * layers + kStackPhases
};
static inline DecoderLayer* layers_of(DecoderPlan* p) { return reinterpret_cast<DecoderLayer*>(p + 1); }
static inline const DecoderLayer* layers_of(const DecoderPlan* p) {
  return reinterpret_cast<const DecoderLayer*>(p + 1);
}

struct DecoderStep {
  const DecoderPlan* plan;
  const Int8Kernels* int8;
  const int64_t *ids, *positions;  // (rows,); positions may be null
  int32_t* table;                  // (rows, capacity): which cache row holds the row's key t; -1: the key is masked
  const int32_t* sources;          // (rows,): whose cross keys a row attends to
  const int32_t* cross_lengths;    // (sources,)
  int64_t rows, length;            // keys so far; this step's go to position `length` of its own row
  float* logits;                   // (rows, head.out); null with choice unless choice.values is given
  RowChoice choice;
};

}  // namespace tf
