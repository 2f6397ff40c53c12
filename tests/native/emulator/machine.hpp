// The emulated machine: blocks of fibers, one a CUDA thread, on one thread of the CPU. See README.md.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace tf::emulator {

constexpr unsigned kWarp = 32;

// A fault of a kernel. Becomes RuntimeError in Python, with kernel, block and thread in front.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] void fail(const std::string& what);

enum class Wait : uint8_t { none, warp, barrier, mbarrier, warpgroup, spin, done };

struct Thread {
  void* sp = nullptr;
  unsigned index = 0;  // in the block
  dim3 id;
  Wait wait = Wait::none;
  const char* what = "";  // the warp instruction or the object it waits for, for messages
  unsigned mask = 0;
  void* payload = nullptr;
  int barrier = -1;
  uint32_t address = 0, phase = 0;  // of the mbarrier it waits for
};

struct NamedBarrier {
  unsigned expected = 0, arrived = 0;
  std::vector<bool> here;  // threads of this phase
};

struct Block {
  dim3 id, grid, shape;
  unsigned threads = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Thread* current = nullptr;  // null while the scheduler runs
  std::vector<Thread> all;
  std::vector<uint32_t> ready;  // of each warp, its lanes that can run
  std::array<NamedBarrier, 16> barriers;
};

extern Block* block;

inline unsigned lane() { return block->current->index % kWarp; }

// Puts the current thread to sleep until someone calls wake on it; `what` is what a report of a deadlock names.
void sleep(Wait wait, const char* what);
void wake(Thread& thread);
// Lets the others run while this thread waits for memory to change.
void spin();

// A warp instruction: blocks until every lane of `mask` has come to it, then `execute` is run once, for all of them.
using Execute = void (*)(void* const* payloads, unsigned mask);
void warp_instruction(const char* what, unsigned mask, void* payload, Execute execute);

// bar.sync (wait) and bar.arrive (!wait); threads = 0: all of the block.
void barrier(int id, unsigned threads, bool wait);

// ---- Memory. Global memory is the tensors that the binding has named for this call, and nothing else.
struct Range {
  uintptr_t begin = 1, end = 0;
  bool writable = false;
};
extern thread_local Range last_range __attribute__((tls_model("initial-exec")));
void find_range(uintptr_t address, size_t bytes, bool write);  // sets last_range or fails
[[noreturn]] void fail_alignment(const char* space, uintptr_t address, size_t alignment);
[[noreturn]] void fail_shared(uintptr_t address, size_t bytes);
void touch_shared(uint32_t offset, uint32_t bytes, bool write, const void* value);  // value: what is written, if known

inline void check_global(const void* p, size_t bytes, size_t alignment, bool write) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % alignment) fail_alignment("global", address, alignment);
  if (address < last_range.begin || address + bytes > last_range.end || (write && !last_range.writable))
    find_range(address, bytes, write);
}
inline uint32_t check_shared(const void* p, size_t bytes, size_t alignment, bool write, const void* value = nullptr) {
  const auto address = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(block->shared);
  if (address < base || address + bytes > base + block->shared_bytes) fail_shared(address, bytes);
  if (address % alignment) fail_alignment("shared", address - base, alignment);
  touch_shared(uint32_t(address - base), uint32_t(bytes), write, value);
  return uint32_t(address - base);
}

// ---- Host.
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
void add_range(const void* begin, size_t bytes, bool writable);
void clear_ranges();

struct Settings {
  bool late = true;  // asynchronous work is done at the last moment that is legal; else at once
  uint64_t seed = 0;
  int multiprocessors = 4;
  int compute_capability = 90;
};
extern Settings settings;

struct Counters {
  uint64_t launches, blocks, switches, mma, wgmma, tma_loads, cp_async, ldmatrix, ldmatrix_conflicts;
};
extern Counters counters;

uint64_t random();  // of the run's seed

}  // namespace tf::emulator
