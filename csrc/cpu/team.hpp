// Threads that go through the phases of one computation together, without sleeping in between.
//
// Every thread runs the same program. A phase hands out its items one chunk at a time and is over when all of them are
// done, by whichever threads. So any number of threads may take part: one that wakes late skips the phases that are
// over, and none is waited for. A result must not depend on which thread computes it.
#pragma once
#include <cstdint>

extern "C" void tf_yield();

namespace tf {
struct alignas(64) PhaseCounter {
  int64_t next, done;
  int64_t ends[2];  // of a phase that is taken from both
};
}  // namespace tf

#ifdef TF_ISA
namespace tf::TF_ISA {

class Team {
 public:
  explicit Team(PhaseCounter* counters) : counter_(counters) {}  // zeros, one per phase

  // f(i) for every i in [0, items); then all of them are done and visible.
  template <class F>
  void phase(int64_t items, int64_t chunk, const F& f) {
    PhaseCounter& c = *counter_++;
    int64_t mine = 0;
    for (;;) {
      const int64_t begin = __atomic_fetch_add(&c.next, chunk, __ATOMIC_RELAXED);
      if (begin >= items) break;
      const int64_t end = begin + chunk < items ? begin + chunk : items;
      for (int64_t i = begin; i < end; ++i) f(i);
      mine += end - begin;
    }
    meet(c, items, mine);
  }

  // The same, but threads with back take the last items first: of phases over the same items each finds much of what it
  // used in the one before in its own cache.
  template <class F>
  void phase_from(bool back, int64_t items, const F& f) {
    PhaseCounter& c = *counter_++;
    int64_t mine = 0;
    // Who takes one of `items` turns finds an item at either end: no more than that many are taken from both.
    for (; __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED) < items; ++mine) {
      const int64_t i = __atomic_fetch_add(&c.ends[back], 1, __ATOMIC_RELAXED);
      f(back ? items - 1 - i : i);
    }
    meet(c, items, mine);
  }

 private:
  static void meet(PhaseCounter& c, int64_t items, int64_t mine) {
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

  static constexpr int kSpins = 2000;
  PhaseCounter* counter_;
};

}  // namespace tf::TF_ISA
#endif
