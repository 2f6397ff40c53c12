// Arguments of a recurrent layer over whole sequences. The products of its input with the gates are computed before.
#pragma once
#include "types.hpp"

namespace tf {

enum class Cell : int32_t { gru, lstm };

struct Recurrence {
  Cell cell;
  DType dtype;                       // of gates, out, states and their gradients
  const int64_t *offsets, *lengths;  // (batch,): the first position of each sequence, and its number of positions
  const int64_t* order;              // (batch,): sequences, longest first
  bool reverse;                      // from the last position of a sequence to its first
  int64_t batch, steps, width;       // steps: of the longest sequence
  const void *hidden, *memory;  // (batch, width), before the first step; memory: of an LSTM
};

// LSTM gates: input, forget, cell, output; GRU: reset, update, new.
static inline int64_t gates_of(Cell cell) { return cell == Cell::lstm ? 4 : 3; }

struct RecurrenceForward : Recurrence {
  const void* gates;  // (positions, gates * width), last stride 1
  int64_t gates_stride;
  const float* panels;       // (gates * ceil(width / 32), width, 32): the weights of the gates, see linear.hpp
  const float* bias;         // (gates * width,), of the hidden state; may be null
  void *out, *last_hidden, *last_memory;  // contiguous; out (positions, width)
  float* saved;       // (positions, 4 * width): i, f, g, o or r, z, n, W_n h + b_n; null if no gradient is wanted
  float* memories;    // (positions, width) of an LSTM; null with saved
};

struct RecurrenceBackward : Recurrence {
  const void *grad_out, *grad_last_hidden, *grad_last_memory;  // contiguous; each may be null
  const float* panels;  // (ceil(width / 32), gates * width, 32): the transposed weight, from gates to hidden state
  const void* out;
  const float *saved, *memories;
  void* grad_gates;     // (positions, gates * width)
  void* grad_products;  // gradient of W h + b: that of the gates, but for a GRU's new gate; null for an LSTM
  void *grad_hidden, *grad_memory;
};

}  // namespace tf
