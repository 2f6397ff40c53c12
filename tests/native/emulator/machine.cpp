#include "machine.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "async.hpp"
#include "block_async.hpp"
#include "fiber.hpp"

namespace tf::emulator {

Block* block = nullptr;
Settings settings;
Counters counters;

namespace {

constexpr size_t kStack = 256 * 1024;  // of a fiber; pages that are not touched cost nothing
constexpr int kSpins = 20000;         // rounds in which nobody but spinning threads ran: nobody will help them

void* scheduler_sp = nullptr;
const std::function<void()>* kernel = nullptr;
std::exception_ptr fault;
uint64_t random_state = 0;

char* stacks(unsigned threads) {
  static char* memory = nullptr;
  static unsigned count = 0;
  if (count < threads) {
    if (memory) munmap(memory, count * kStack);
    void* fresh = mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(fresh);
    count = threads;
    for (unsigned i = 0; i < threads; ++i) mprotect(memory + i * kStack, 4096, PROT_NONE);  // an overflow stops here
  }
  return memory;
}

void to_scheduler() {
  ++counters.switches;
  fiber_switch(&block->current->sp, scheduler_sp);
}

void entry() {
  try {
    (*kernel)();
    bulk_thread_exits();
    products_thread_exits();
  } catch (...) {
    fault = std::current_exception();
  }
  block->current->wait = Wait::done;
  to_scheduler();
}

std::string shape(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string describe(const Thread& t) {
  switch (t.wait) {
    case Wait::warp: return std::string("the rest of its warp at ") + t.what;
    case Wait::barrier: return t.barrier == 0 ? "__syncthreads" : "named barrier " + std::to_string(t.barrier);
    case Wait::mbarrier:
      return "mbarrier at shared offset " + std::to_string(t.address) + ", phase " + std::to_string(t.phase);
    case Wait::warpgroup: return std::string("the rest of its warpgroup at ") + t.what;
    case Wait::spin: return "memory that another block or warp should write (spinning)";
    case Wait::done: return "nothing: it has exited";
    default: return "nothing: it can run";
  }
}

// Nobody can run: says who waits for what.
[[noreturn]] void fail_deadlock() {
  std::map<std::string, std::vector<unsigned>> waiting;
  bool exited = false, at_barrier = false, in_warp = false;
  for (Thread& t : block->all) {
    waiting[describe(t)].push_back(t.index);
    exited |= t.wait == Wait::done;
    at_barrier |= t.wait == Wait::barrier && t.barrier == 0;
    in_warp |= t.wait == Wait::warp;
    if (t.wait != Wait::done && !block->current) block->current = &t;
  }
  std::string text = in_warp ? "divergent warp instruction" : at_barrier ? "divergent __syncthreads" : "deadlock";
  for (auto& [what, threads] : waiting) {
    text += "; " + std::to_string(threads.size()) + " thread(s) from " + std::to_string(threads.front()) +
            " wait for " + what;
  }
  throw Fault(text);
}

void run_lane(Thread& t) {
  block->current = &t;
  fiber_switch(&scheduler_sp, t.sp);
  block->current = nullptr;
  if (t.wait != Wait::none) block->ready[t.index / kWarp] &= ~(1u << (t.index % kWarp));
  if (fault) {
    block->current = &t;
    std::rethrow_exception(std::exchange(fault, nullptr));
  }
}

void run_warp(unsigned warp) {
  // Lanes take turns in an order of the seed, so that one which needs a __syncwarp does not get it by luck.
  const unsigned start = unsigned(random()), step = unsigned(random()) | 1u;
  while (block->ready[warp]) {
    for (unsigned i = 0; i < kWarp; ++i) {
      const unsigned l = (start + i * step) % kWarp;
      if (block->ready[warp] >> l & 1u) run_lane(block->all[warp * kWarp + l]);
    }
  }
}

void run_block() {
  const unsigned n = block->threads, warps = (n + kWarp - 1) / kWarp;
  char* memory = stacks(n);
  block->all.assign(n, Thread{});
  block->ready.assign(warps, 0);
  block->barriers = {};
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = block->all[i];
    t.index = i;
    t.id = dim3(i % block->shape.x, i / block->shape.x % block->shape.y, i / (block->shape.x * block->shape.y));
    t.sp = fiber_new(memory + i * kStack + 4096, kStack - 4096, entry);
    block->ready[i / kWarp] |= 1u << (i % kWarp);
  }
  std::memset(block->shared, 0xff, block->shared_bytes);  // NaN in every floating type
  races_begin();
  copies_begin();
  mbarriers_begin();
  bulk_begin();
  products_begin();
  int spins = 0;
  for (;;) {
    std::vector<unsigned> order;
    for (unsigned w = 0; w < warps; ++w) {
      if (block->ready[w]) order.push_back(w);
    }
    if (!order.empty()) {
      // One warp runs until it must wait, any that can: each schedule that a GPU may choose is possible.
      run_warp(order[random() % order.size()]);
      continue;
    }
    if (finish_some_load()) {
      spins = 0;
      continue;
    }
    bool spinning = false, running = false;
    for (Thread& t : block->all) {
      running |= t.wait != Wait::done;
      spinning |= t.wait == Wait::spin;
    }
    if (!running) break;
    if (!spinning || ++spins > kSpins) fail_deadlock();
    for (Thread& t : block->all) {
      if (t.wait == Wait::spin) wake(t);
    }
  }
  bulk_end();
  mbarriers_end();
}

unsigned char* shared_memory() {
  static unsigned char* memory = static_cast<unsigned char*>(std::aligned_alloc(1024, 256 * 1024));
  return memory;
}

}  // namespace

void fail(const std::string& what) { throw Fault(what); }

uint64_t random() {  // splitmix64
  uint64_t z = (random_state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

void sleep(Wait wait, const char* what) {
  block->current->wait = wait;
  block->current->what = what;
  to_scheduler();
}

void wake(Thread& t) {
  t.wait = Wait::none;
  block->ready[t.index / kWarp] |= 1u << (t.index % kWarp);
}

void spin() { sleep(Wait::spin, "spin"); }

void warp_instruction(const char* what, unsigned mask, void* payload, Execute execute) {
  Thread& me = *block->current;
  const unsigned first = me.index / kWarp * kWarp, l = me.index % kWarp;
  if (!(mask >> l & 1u)) fail(std::string(what) + ": the calling lane is not in its mask");
  void* payloads[kWarp] = {};
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1u)) continue;
    if (first + i >= block->threads) fail(std::string(what) + ": its mask names lanes that the block does not have");
    if (i == l) {
      payloads[i] = payload;
      continue;
    }
    Thread& t = block->all[first + i];
    if (t.wait == Wait::done) 
      fail(std::string("divergent warp instruction: ") + what + " waits for lane " + std::to_string(i) +
           ", which has exited");
    if (t.wait == Wait::warp) {
      if (t.mask >> l & 1u && (t.mask != mask || std::strcmp(t.what, what) != 0))
        fail(std::string("divergent warp instruction: lane ") + std::to_string(l) + " is at " + what +
             ", lane " + std::to_string(i) + " at " + t.what);
      if (t.mask == mask) {
        payloads[i] = t.payload;
        continue;
      }
    }
    me.mask = mask;
    me.payload = payload;
    return sleep(Wait::warp, what);
  }
  execute(payloads, mask);
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1u) && i != l) wake(block->all[first + i]);
  }
}

void barrier(int id, unsigned threads, bool wait) {
  Thread& me = *block->current;
  const bool whole = threads == 0;
  if (whole) threads = (block->threads + kWarp - 1) / kWarp * kWarp;
  if (id < 0 || id > 15) fail("named barrier " + std::to_string(id) + ": there are 0..15");
  const std::string name = "named barrier " + std::to_string(id);
  if (threads % kWarp) fail(name + ": " + std::to_string(threads) + " is not a multiple of 32");
  if (whole) threads = block->threads;
  NamedBarrier& b = block->barriers[size_t(id)];
  if (b.arrived == 0) {
    b.expected = threads;
    b.here.assign(block->threads, false);
  }
  if (b.expected != threads)
    fail(name + ": " + std::to_string(threads) + " threads here, " + std::to_string(b.expected) +
         " where others arrived");
  if (b.here[me.index]) fail(name + ": this thread arrives twice in one phase");
  b.here[me.index] = true;
  barrier_arrived(id);
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    barrier_complete(id);
    for (Thread& t : block->all) {
      if (t.wait == Wait::barrier && t.barrier == id) {
        barrier_passed(id, t);
        wake(t);
      }
    }
    if (wait) barrier_passed(id, me);
    return;
  }
  if (!wait) return;
  me.barrier = id;
  sleep(Wait::barrier, "barrier");
}

void launch(const char* name, dim3 grid, dim3 shape_of_block, size_t shared_bytes, const std::function<void()>& body) {
  const auto configuration = [&] {
    return std::string("transformer_fast: emulated CUDA kernel ") + name + ", grid " + shape(grid) + ", block " +
           shape(shape_of_block) + ", " + std::to_string(shared_bytes) + " bytes of shared memory";
  };
  const uint64_t threads = uint64_t(shape_of_block.x) * shape_of_block.y * shape_of_block.z;
  if (threads == 0 || threads > 1024 || shape_of_block.z > 64 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535 || shared_bytes > 227 * 1024)
    throw std::runtime_error(configuration() + ": invalid configuration argument");
  static std::mutex one_at_a_time;  // Python may have several threads; the machine is one
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Block here;
  here.grid = grid;
  here.shape = shape_of_block;
  here.threads = unsigned(threads);
  here.shared = shared_memory();
  here.shared_bytes = shared_bytes;
  block = &here;
  kernel = &body;
  random_state = settings.seed;
  ++counters.launches;
  try {
    for (here.id.z = 0; here.id.z < grid.z; ++here.id.z) {
      for (here.id.y = 0; here.id.y < grid.y; ++here.id.y) {
        for (here.id.x = 0; here.id.x < grid.x; ++here.id.x) {
          ++counters.blocks;
          here.current = nullptr;
          run_block();
        }
      }
    }
  } catch (const std::exception& error) {
    std::string where = ", at block " + shape(here.id);
    if (here.current) where += ", thread " + shape(here.current->id);
    block = nullptr;
    throw std::runtime_error(configuration() + where + ": " + error.what());
  }
  block = nullptr;
}

}  // namespace tf::emulator
