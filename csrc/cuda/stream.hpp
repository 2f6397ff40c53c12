// Identifies a stream, and a graph capture on it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tf::cuda {

struct StreamIdentity {
  bool known;
  uint64_t capture;  // of the graph that is captured; 0 outside a capture
  uint64_t stream;   // of the current device: its id, or its handle in a capture
};

// known is false for the legacy stream while another stream captures: it must not be queried then.
StreamIdentity identity_of(void* stream);
void fill_zero_async(void* global, size_t bytes, void* stream);

}  // namespace tf::cuda
