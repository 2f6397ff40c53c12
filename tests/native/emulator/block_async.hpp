// What the scheduler and the parts of the machine tell each other.
#pragma once
#include "async.hpp"

namespace tf::emulator {

// When a block begins; when its last thread has exited, where work that nobody waited for is a fault; when a thread
// exits.
void copies_begin();
void mbarriers_begin();
void mbarriers_end();
void bulk_begin();
void bulk_end();
void bulk_thread_exits();
void products_begin();
void products_thread_exits();

// When no thread can run: does a copy that may wake one. False when there is none.
bool finish_some_load();

void mbarrier_complete(uint32_t offset, uint32_t bytes);  // bytes have arrived
uint32_t mbarrier_checked(const void* bar);               // its offset in shared memory

// Acts in the name of a thread, for messages, where the scheduler itself is at work.
class InNameOf {
 public:
  explicit InNameOf(unsigned thread) : before_(block->current) { block->current = &block->all[thread]; }
  ~InNameOf() { block->current = before_; }

 private:
  Thread* before_;
};

// Shared memory as TMA and wgmma see it, which other threads' plain writes reach through fence_async_shared alone.
void touch_shared_async(uint32_t offset, uint32_t bytes, bool write);

// For the detector of races.
void races_begin();
void barrier_arrived(int id);
void barrier_complete(int id);
void barrier_passed(int id, Thread& thread);

}  // namespace tf::emulator
