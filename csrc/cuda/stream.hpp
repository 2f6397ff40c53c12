// What tells the launches of one stream, and of one graph capture on it, from all others.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tf::cuda {

struct StreamIdentity {
  bool known;
  uint64_t stream, capture;  // of the current device; capture: 0 outside one
};

// Not known: the legacy stream while another stream captures, which may not be asked.
StreamIdentity identity_of(void* stream);
void fill_zero_async(void* global, size_t bytes, void* stream);

}  // namespace tf::cuda
