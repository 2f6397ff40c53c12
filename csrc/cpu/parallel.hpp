// Parallel loops for kernels that do not include torch. They run on torch's own thread pool (csrc/ops.cpp), so that
// OMP_NUM_THREADS and torch.set_num_threads apply.
#pragma once
#include <cstdint>

extern "C" {
void tf_parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int tf_num_threads();
}

namespace tf {
// No std headers: this code is compiled once per instruction set, and for an inline function of the standard library
// the linker could choose the copy of the widest set.
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Body>
static inline void parallel_for(int64_t n, int64_t grain, const Body& body) {
  tf_parallel_for(
      n, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Each of at most `threads` threads calls work = make() once. Then work(item) runs for every item in [0, items), on
// whichever thread is free.
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
