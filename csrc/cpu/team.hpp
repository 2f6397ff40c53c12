// Threads that go through the phases of one computation together, without sleeping in between.
//
// Every thread runs the same program. A phase assigns its items one chunk at a time and ends when all of them are done,
// by whichever threads. So any number of threads may take part: one that wakes late skips the phases that have ended,
// and no thread is waited for. A result must not depend on which thread computes it.
//
// Each thread first works through a share of its own, then helps with the others'. So it reads one stretch of memory,
// which the hardware prefetches, and what it wrote in one phase is in its cache in the next.
#pragma once
#include <cstdint>

extern "C" void tf_yield();

namespace tf {
constexpr int64_t kShares = 14;
struct alignas(64) PhaseCounter {
  int64_t done;
  int32_t next[kShares];
};
}  // namespace tf

#ifdef TF_ISA
namespace tf::TF_ISA {

class Team {
 public:
  // counters: zeros, one per phase. index: this thread's, below `threads`.
  Team(PhaseCounter* counters, int64_t index, int64_t threads)
      : counter_(counters), shares_(threads < kShares ? threads : kShares), own_(index % shares_) {}

  // f(i) for every i in [0, items); then all of them are done and visible.
  template <class F>
  void phase(int64_t items, int64_t chunk, const F& f) {
    PhaseCounter& c = *counter_++;
    int64_t mine = 0;
    for (int64_t s = 0; s < shares_; ++s) {
      const int64_t share = (own_ + s) % shares_;
      const int64_t first = items * share / shares_, last = items * (share + 1) / shares_;
      while (first + __atomic_load_n(&c.next[share], __ATOMIC_RELAXED) < last) {
        const int64_t begin = first + __atomic_fetch_add(&c.next[share], int32_t(chunk), __ATOMIC_RELAXED);
        if (begin >= last) break;
        const int64_t end = begin + chunk < last ? begin + chunk : last;
        for (int64_t i = begin; i < end; ++i) f(i);
        mine += end - begin;
      }
    }
    if (mine) __atomic_fetch_add(&c.done, mine, __ATOMIC_RELEASE);
    for (int spins = 0; __atomic_load_n(&c.done, __ATOMIC_ACQUIRE) < items;) {
      if (++spins < kSpins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        tf_yield();  // more threads than free processors
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;
  PhaseCounter* counter_;
  const int64_t shares_, own_;
};

}  // namespace tf::TF_ISA
#endif
