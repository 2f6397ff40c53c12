// Identifies a stream, and a graph capture on it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tf::cuda {

struct StreamIdentity {
  bool known;
  uint64_t stream, capture;  // of the current device; capture: 0 outside one
};

// known is false for the legacy stream while another stream captures: it must not be queried then.
StreamIdentity identity_of(void* stream);
void fill_zero_async(void* global, size_t bytes, void* stream);

}  // namespace tf::cuda
