// Arguments of one step of a recurrent decoder: one token per row through its cells, attention and output.
#pragma once
#include "recurrence.hpp"
#include "step_weight.hpp"

namespace tf {

struct RecurrentCell {
  StepWeight input[4], hidden[4];  // one per gate, with its bias; panels or rows
};

// What a step reads of the source, besides its state.
enum class Context : int32_t {
  none,
  given,     // one state per source
  dot,       // softmax(keys . query) values
  additive,  // softmax(v . tanh(keys + query)) values
};

struct RecurrentStep {
  Cell cell;
  Context context;
  bool maxout;  // context of the state before the step, for the cells and a maxout of state, word and context;
                // else context of the state after it: readout = tanh(W [context; state])
  int64_t rows, layers, width, embedding;
  const int64_t* ids;        // (rows,)
  DType token_dtype;
  const void* token;         // (tokens, embedding)
  const RecurrentCell* cells;
  StepWeight query, readout, head;       // query and readout may be absent
  const float *hidden, *memory;          // (layers, rows, width) before the step; memory of an LSTM
  const float* feed;                     // (rows, readout.out), input of the cells next to the word; may be null
  const float *keys, *values;            // (sources, length, score width), (sources, length, width)
  const float* score_weight;             // (score width,)
  const bool* mask;                      // (sources, length); may be null; true: takes part
  const int32_t* sources;                // (rows,): the source a row attends to; null: source r for row r
  int64_t length, score_width;
  int64_t weight_bytes, split_floats;    // of all weights; the largest of query, readout and head
  const Int8Kernels* int8;
  float *next_hidden, *next_memory, *next_feed;  // next_feed may be null
  float* logits;                                 // (rows, head.out); null with choice
  HeadChoice choice;
};

}  // namespace tf
