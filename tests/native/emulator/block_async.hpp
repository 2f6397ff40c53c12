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
void mbarrier_load_starts(uint32_t bar, uint32_t shared, uint32_t bytes);

// Acts in the name of a thread, for messages, where the scheduler itself is at work.
class InNameOf {
 public:
  explicit InNameOf(unsigned thread) : before_(block->current) { block->current = &block->all[thread]; }
  ~InNameOf() { block->current = before_; }

 private:
  Thread* before_;
};

// The detector of races (race.cpp). Asynchronous accesses are of the current thread; a load is written by its mbarrier,
// a read may take place at any time from start to end.
void races_begin();
void async_load_starts(uint32_t offset, uint32_t bytes, unsigned mbarrier, uint64_t phase);
void async_read_starts(uint32_t offset, uint32_t bytes);
void async_read_ends(uint32_t offset, uint32_t bytes);
void barrier_arrived(int id);
void barrier_complete(int id);
void barrier_passed(int id, Thread& thread);
unsigned mbarrier_meeting();  // a new mbarrier's number
void mbarrier_arrived(unsigned number);
void mbarrier_phase_over(unsigned number, uint64_t phase);
void mbarrier_passed(unsigned number);

}  // namespace tf::emulator
