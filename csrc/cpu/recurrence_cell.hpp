// The gates of a GRU and an LSTM, on vectors of products.
#pragma once
#include "recurrence.hpp"
#include "simd.hpp"

namespace tf::TF_ISA {

// NaN stays NaN: min and max return their second argument.
static inline Vec sigmoid(Vec x) {
  return reciprocal(1.f + exp_bounded(max(broadcast(-87.f), min(broadcast(87.f), -x))));
}

// gates: arguments of i, f, g, o, replaced by the gates. Returns the new memory; the hidden state is o tanh(memory).
static inline Vec lstm_memory(Vec (&gates)[4], Vec memory) {
  for (int g = 0; g < 4; ++g) gates[g] = g == 2 ? tanh_accurate(gates[g]) : sigmoid(gates[g]);
  return fma(gates[1], memory, gates[0] * gates[2]);
}

// gates: the input's terms of r, z, n, replaced by the gates; products: the hidden state's terms. Returns the new
// hidden state.
static inline Vec gru_hidden(Vec (&gates)[3], const Vec (&products)[3], Vec hidden) {
  gates[0] = sigmoid(gates[0] + products[0]);
  gates[1] = sigmoid(gates[1] + products[1]);
  gates[2] = tanh_accurate(fma(gates[0], products[2], gates[2]));
  return fma(gates[1], hidden - gates[2], gates[2]);
}

}  // namespace tf::TF_ISA
