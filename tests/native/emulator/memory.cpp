#include <algorithm>

#include "block_async.hpp"
#include "machine.hpp"
#include "simt_model.hpp"

namespace tf::emulator {

thread_local Range last_range;
namespace {
thread_local std::vector<Range> ranges;
}

void add_range(const void* begin, size_t bytes, bool writable) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  if (bytes) ranges.push_back({at, at + bytes, writable});
}
void clear_ranges() {
  ranges.clear();
  last_range = {};
}

void find_range(uintptr_t address, size_t bytes, bool write) {
  bool readable = false;
  for (const Range& r : ranges) {
    if (address < r.begin || address + bytes > r.end) continue;
    readable = true;
    if (write && !r.writable) continue;
    last_range = r;
    return;
  }
  if (readable) fail("writes to global memory that the binding gave for reading only");
  std::string text = "global memory out of bounds: " + std::to_string(bytes) + " bytes " + (write ? "written" : "read");
  const Range* nearest = nullptr;
  uintptr_t distance = ~uintptr_t(0);
  for (const Range& r : ranges) {
    const uintptr_t d = address < r.begin ? r.begin - address : address + bytes - r.end;
    if (d < distance) {
      distance = d;
      nearest = &r;
    }
  }
  if (!nearest) fail(text + "; the binding named no tensor");
  const bool before = address < nearest->begin;
  fail(text + ", " + std::to_string(before ? nearest->begin - address : address - nearest->begin) +
       (before ? " bytes before" : " bytes behind") + " the start of the nearest tensor, which has " +
       std::to_string(nearest->end - nearest->begin) + " bytes");
}

void fail_alignment(const char* space, uintptr_t address, size_t alignment) {
  fail(std::string("misaligned access to ") + space + " memory: address is " + std::to_string(address % alignment) +
       " past a multiple of " + std::to_string(alignment));
}
void fail_shared(uintptr_t address, size_t bytes) {
  const auto base = reinterpret_cast<uintptr_t>(block->shared);
  fail("shared memory out of bounds: " + std::to_string(bytes) + " bytes at offset " +
       std::to_string(int64_t(address - base)) + ", the block has " + std::to_string(block->shared_bytes));
}

void execute_shuffle(void* const* payloads, unsigned mask) {
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1u)) continue;
    auto* s = static_cast<Shuffle*>(payloads[i]);
    const unsigned source = s->source % kWarp;
    if (!(mask >> source & 1u)) fail("shuffle reads lane " + std::to_string(source) + ", which takes no part");
    s->result = static_cast<Shuffle*>(payloads[source])->value;
  }
}

void execute_ballot(void* const* payloads, unsigned mask) {
  unsigned result = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1u) && static_cast<Vote*>(payloads[i])->value) result |= 1u << i;
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1u) static_cast<Vote*>(payloads[i])->result = result;
  }
}

}  // namespace tf::emulator
