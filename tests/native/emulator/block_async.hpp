// What the scheduler tells the asynchronous parts of the machine.
#pragma once
#include "machine.hpp"

namespace tf::emulator {

void block_begins();
void block_ends();       // fails for work that nobody waited for
void block_abandoned();  // after a fault
void thread_exits();
bool finish_some_async();  // when no thread can run: whether some work was done that may wake one

// For the detector of races.
void barrier_arrived(int id);
void barrier_complete(int id);
void barrier_passed(int id, Thread& thread);

}  // namespace tf::emulator
