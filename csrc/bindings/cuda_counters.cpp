#include "cuda.hpp"

#if TF_CUDA_KERNELS
#include <map>
#include <mutex>
#include <utility>

namespace tf::cuda {

int32_t* counters_of(const Tensor& like, const Device& device) {
  struct Entry {
    uint64_t capture;
    Tensor memory;
  };
  constexpr size_t kStreams = 64;
  static std::mutex mutex;
  // Never destroyed: at exit torch's allocator may be destroyed first.
  static auto& entries = *new std::map<std::pair<int32_t, uint64_t>, Entry>();
  const StreamIdentity stream = identity_of(device.stream());
  if (!stream.known) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<int32_t, uint64_t> key(device.index(), stream.stream);
  auto found = entries.find(key);
  if (found != entries.end() && found->second.capture != stream.capture) {
    // Freed to the pool of the stream it was allocated on: its next use there is ordered after this one.
    entries.erase(found);
    found = entries.end();
  }
  if (found == entries.end()) {
    if (entries.size() >= kStreams) entries.erase(entries.begin());  // streams come and go
    const Tensor memory = new_scratch(like, {kCounters}, ScalarType::Int);
    fill_zero_async(write(memory), kCounters * sizeof(int32_t), device.stream());
    found = entries.emplace(key, Entry{stream.capture, memory}).first;
  }
  return write<int32_t>(found->second.memory);
}

}  // namespace tf::cuda
#endif
