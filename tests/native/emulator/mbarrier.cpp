// mbarrier: phases of arrivals and of bytes.
#include <map>

#include "block_async.hpp"

namespace tf::emulator {
namespace {

constexpr uint64_t kMagic = 0x5f7265697272616dull;  // in the barrier's own eight bytes: they must not be overwritten

struct Barrier {
  uint32_t count = 0;
  int64_t arrivals = 0, bytes = 0;  // still to come in this phase
  uint64_t phase = 0;               // number of phases that are over
  unsigned owner = 0, number = 0;   // number: for the detector of races
  bool fenced = false;
  std::vector<bool> carried, seen;  // of each phase: whether it brought bytes, whether anyone waited for it
};
std::map<uint32_t, Barrier> barriers;

std::string name(uint32_t offset) { return "mbarrier at shared offset " + std::to_string(offset); }

void mark(std::vector<bool>& flags, uint64_t phase) {
  if (flags.size() <= phase) flags.resize(phase + 1);
  flags[phase] = true;
}

Barrier& at(uint32_t offset) {
  const auto found = barriers.find(offset);
  if (found == barriers.end()) fail(name(offset) + " is used before mbarrier_init");
  Barrier& b = found->second;
  uint64_t magic;
  std::memcpy(&magic, block->shared + offset, sizeof magic);
  if (magic != kMagic) fail(name(offset) + " was overwritten");
  if (!b.fenced && block->current && block->current->index != b.owner)
    fail(name(offset) + " is used by another thread before mbarrier_fence_init");
  return b;
}

void advance(uint32_t offset, Barrier& b) {
  if (b.arrivals > 0 || b.bytes != 0) return;
  b.arrivals = b.count;
  mbarrier_phase_over(b.number, b.phase++);
  for (Thread& t : block->all) {
    if (t.wait == Wait::mbarrier && t.address == offset) wake(t);
  }
}

}  // namespace

uint32_t mbarrier_checked(const void* bar) {
  const auto address = reinterpret_cast<uintptr_t>(bar), base = reinterpret_cast<uintptr_t>(block->shared);
  if (address < base || address + 8 > base + block->shared_bytes) fail_shared(address, 8);
  if (address % 8) fail_alignment("shared", address, 8);
  return uint32_t(address - base);
}

void mbarrier_init(uint64_t* bar, uint32_t count) {
  const uint32_t offset = mbarrier_checked(bar);
  if (count == 0 || count >= (1u << 20)) fail(name(offset) + ": count " + std::to_string(count));
  if (barriers.count(offset)) fail(name(offset) + " is initialised twice");
  Barrier b;
  b.count = count;
  b.arrivals = count;
  b.owner = block->current->index;
  b.number = mbarrier_meeting();
  barriers[offset] = b;
  *bar = kMagic;
}

void mbarrier_fence_init() {
  for (auto& [offset, b] : barriers) b.fenced |= b.owner == block->current->index;
}

void mbarrier_arrive(uint64_t* bar, uint32_t expected) {
  const uint32_t offset = mbarrier_checked(bar);
  Barrier& b = at(offset);
  if (expected) {
    b.bytes += expected;
    if (b.bytes >= (1 << 20)) fail(name(offset) + ": more than 2^20 - 1 bytes expected");
    mark(b.carried, b.phase);
  }
  mbarrier_arrived(b.number);
  if (--b.arrivals < 0) fail(name(offset) + ": more arrivals than its count, " + std::to_string(b.count));
  advance(offset, b);
}

void mbarrier_complete(uint32_t offset, uint32_t bytes) {
  Barrier& b = at(offset);
  b.bytes -= bytes;
  mark(b.carried, b.phase);
  advance(offset, b);
}

void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  const uint32_t offset = mbarrier_checked(bar);
  Barrier& b = at(offset);
  if (parity > 1) fail(name(offset) + ": parity " + std::to_string(parity) + " is neither 0 nor 1");
  if ((b.phase & 1u) != parity) {
    if (b.phase) mark(b.seen, b.phase - 1);
    mbarrier_passed(b.number);
    return;
  }
  const uint64_t awaited = b.phase;
  Thread& me = *block->current;
  me.address = offset;
  me.phase = uint32_t(awaited);
  sleep(Wait::mbarrier, "mbarrier");
  if (b.phase > awaited + 1)
    fail(name(offset) + " went on two phases before this thread saw the end of phase " + std::to_string(awaited));
  mark(b.seen, awaited);
  mbarrier_passed(b.number);
}

void mbarrier_load_starts(uint32_t bar, uint32_t shared, uint32_t bytes) {
  const Barrier& b = at(bar);
  async_load_starts(shared, bytes, b.number, b.phase);
}

void mbarriers_begin() { barriers.clear(); }

void mbarriers_end() {
  for (const auto& [offset, b] : barriers) {
    if (b.bytes != 0)
      fail(name(offset) + " ends with " + std::to_string(b.bytes) + " bytes that were expected and did not come");
    for (uint64_t p = 0; p < b.carried.size(); ++p) {
      if (b.carried[p] && (p >= b.seen.size() || !b.seen[p]))
        fail(name(offset) + ": nobody waited for phase " + std::to_string(p) + ", which brought data");
    }
  }
}

}  // namespace tf::emulator
