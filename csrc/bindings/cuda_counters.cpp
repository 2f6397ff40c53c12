#include "cuda.hpp"

#if TF_CUDA_KERNELS
#include <map>
#include <mutex>
#include <tuple>

namespace tf::cuda {

int32_t* counters_of(const Tensor& like, const Device& device) {
  using Key = std::tuple<int32_t, bool, uint64_t>;  // device, whether in a capture, stream
  struct Entry {
    uint64_t capture;
    Tensor memory;
  };
  constexpr size_t kStreams = 64;
  static std::mutex mutex;
  // Never destroyed: at exit torch's allocator may be destroyed first.
  static auto& entries = *new std::map<Key, Entry>();
  const StreamIdentity stream = identity_of(device.stream());
  if (!stream.known) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key(device.index(), stream.capture != 0, stream.stream);
  auto found = entries.find(key);
  if (found != entries.end() && found->second.capture != stream.capture) {
    entries.erase(found);  // of an earlier graph, which keeps its memory pool
    found = entries.end();
  }
  if (found == entries.end()) {
    // Streams come and go. Freed to the pool of the stream it was allocated on: its next use there comes later.
    if (entries.size() >= kStreams) entries.erase(entries.begin());
    const Tensor memory = new_scratch(like, {kCounters}, ScalarType::Int);
    fill_zero_async(write(memory), kCounters * sizeof(int32_t), device.stream());
    found = entries.emplace(key, Entry{stream.capture, memory}).first;
  }
  return write<int32_t>(found->second.memory);
}

}  // namespace tf::cuda
#endif
