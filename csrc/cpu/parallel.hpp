// Parallel loops for kernels that do not include torch. They run on torch's own thread pool (csrc/ops.cpp), so that
// OMP_NUM_THREADS and torch.set_num_threads hold.
#pragma once
#include <cstdint>

extern "C" {
void tf_parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int tf_num_threads();
}

namespace tf {
// No std headers: code here is compiled once per instruction set, and the linker could take a shared inline function
// (of std::vector, say) from the widest one.
template <class Body>
static inline void parallel_for(int64_t n, int64_t grain, const Body& body) {
  tf_parallel_for(
      n, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// On each of at most `threads` threads work = make(); then work(item) for every item in [0, items), each on whichever
// thread is free.
template <class Make>
static inline void share_out(int64_t items, int64_t threads, const Make& make) {
  int64_t next = 0;
  if (threads > items) threads = items;
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    auto work = make();
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= items) return;
      work(item);
    }
  });
}
}  // namespace tf
